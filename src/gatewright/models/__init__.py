"""Ready-made models, each with its dense twin: the same network with one expert and no router."""

from gatewright.models.classifier import ImageClassifier
from gatewright.models.cnn import Cnn, CnnConfig
from gatewright.models.convnet import ConvNet, ConvNetConfig
from gatewright.models.digits import DigitsCnn, DigitsConfig
from gatewright.models.mixture import CHOOSABLE_ROUTERS, MixtureConfig, RouterOption
from gatewright.models.resnet import RESNETS, ResNetShape
from gatewright.models.resnets import MixtureOfResNets, ResNetsConfig
from gatewright.models.transformer import Transformer, TransformerConfig
from gatewright.models.vit import VitConfig

ModelConfig = CnnConfig | ConvNetConfig | DigitsConfig | ResNetsConfig | VitConfig
"""The settings of any ready-made model."""

__all__ = [
    "CHOOSABLE_ROUTERS",
    "RESNETS",
    "Cnn",
    "CnnConfig",
    "ConvNet",
    "ConvNetConfig",
    "DigitsCnn",
    "DigitsConfig",
    "ImageClassifier",
    "MixtureConfig",
    "MixtureOfResNets",
    "ModelConfig",
    "ResNetShape",
    "ResNetsConfig",
    "RouterOption",
    "Transformer",
    "TransformerConfig",
    "VitConfig",
]
