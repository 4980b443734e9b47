"""Training, evaluation and what is kept of them. Needs ``pip install 'gatewright[train]'``."""

from gatewright.train.config import OptimConfig, RunConfig
from gatewright.train.config_file import load_config, save_config
from gatewright.train.engine import TrainingDiverged
from gatewright.train.evaluate import Evaluation, LayerUse, evaluate
from gatewright.train.folder import check_same_images
from gatewright.train.heartbeat import LostProcess
from gatewright.train.launch import launch, needs_launch, was_restarted
from gatewright.train.loop import train
from gatewright.train.preview import preview
from gatewright.train.program import program
from gatewright.train.restore import Trained, load_run
from gatewright.train.signals import Interrupted
from gatewright.train.tracking import TrackingConfig

__all__ = [
    "Evaluation",
    "Interrupted",
    "LayerUse",
    "LostProcess",
    "OptimConfig",
    "RunConfig",
    "TrackingConfig",
    "Trained",
    "TrainingDiverged",
    "check_same_images",
    "evaluate",
    "launch",
    "load_config",
    "load_run",
    "needs_launch",
    "preview",
    "program",
    "save_config",
    "train",
    "was_restarted",
]
