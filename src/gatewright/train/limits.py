"""What a network cannot be trained with, said before its first step."""

import os
import shutil

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from gatewright.layers import ExpertLayer
from gatewright.train.config import RunConfig

COMPILERS = ("g++", "clang++")


def check_network(model: nn.Module, config: RunConfig, device: torch.device) -> None:
    """Refuse batches without a variance, and compiling without a compiler.

    Raises:
        ValueError: The sentence says what to change.
    """
    inside = {norm for layer in model.modules() if isinstance(layer, ExpertLayer) for norm in layer.experts.modules()}
    if config.data.batch_size == 1 and any(isinstance(m, _BatchNorm) and m not in inside for m in model.modules()):
        raise ValueError(
            "This network has BatchNorm, which learns from the variance of a batch; got --data.batch-size 1. Use at "
            "least 2."
        )
    compilers = (os.environ.get("CXX", COMPILERS[0]), *COMPILERS)
    if config.compile and device.type == "cpu" and not any(map(shutil.which, compilers)):
        raise ValueError(
            f"--compile needs a C++ compiler on the CPU, and none of {', '.join(dict.fromkeys(compilers))} is here. "
            "Install one, name it in CXX, or leave --compile out."
        )
