"""Training, evaluation and what is kept of them. Needs ``pip install 'gatewright[train]'``."""

from gatewright.train.checkpoint.restore import Trained, load_run
from gatewright.train.config import OptimConfig, RunConfig
from gatewright.train.config_file import load_config, save_config
from gatewright.train.diagnosis import TrainingDiverged
from gatewright.train.evaluate import evaluate
from gatewright.train.folder import program
from gatewright.train.launch.elastic import launch, needs_launch, was_restarted
from gatewright.train.launch.signals import Interrupted
from gatewright.train.launch.watchdog import LostProcess
from gatewright.train.loop import train
from gatewright.train.preview import preview
from gatewright.train.tracking.base import TrackingConfig

__all__ = [
    "Interrupted",
    "LostProcess",
    "OptimConfig",
    "RunConfig",
    "TrackingConfig",
    "Trained",
    "TrainingDiverged",
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
