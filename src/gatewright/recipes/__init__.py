"""Recipes: functions that return the config of a whole run.

A variant is `dataclasses.replace`, and one of another length `with_epochs`.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from gatewright.names import imported, known
from gatewright.recipes.cifar10_cnn import cifar10_cnn, cifar10_cnn_dense
from gatewright.recipes.cifar10_fast import cifar10_fast, cifar10_fast_dense, cifar10_rotate, cifar10_rotate_dense
from gatewright.recipes.cifar10_resnets import (
    cifar10_resnet18s,
    cifar10_resnet34s,
    cifar10_resnets,
    cifar10_resnets_article,
    cifar10_resnets_dense,
    cifar10_resnets_stem,
)
from gatewright.recipes.cifar10_vit import cifar10_vit, cifar10_vit_dense
from gatewright.recipes.digits import digits, digits_dense
from gatewright.recipes.python_lm import python_lm, python_lm_dense
from gatewright.train import RunConfig

RECIPES: Mapping[str, Callable[[], RunConfig]] = MappingProxyType(
    {
        "cifar10-cnn": cifar10_cnn,
        "cifar10-cnn-dense": cifar10_cnn_dense,
        "cifar10-fast": cifar10_fast,
        "cifar10-fast-dense": cifar10_fast_dense,
        "cifar10-resnet18s": cifar10_resnet18s,
        "cifar10-resnet34s": cifar10_resnet34s,
        "cifar10-resnets": cifar10_resnets,
        "cifar10-resnets-article": cifar10_resnets_article,
        "cifar10-resnets-dense": cifar10_resnets_dense,
        "cifar10-resnets-stem": cifar10_resnets_stem,
        "cifar10-rotate": cifar10_rotate,
        "cifar10-rotate-dense": cifar10_rotate_dense,
        "cifar10-vit": cifar10_vit,
        "cifar10-vit-dense": cifar10_vit_dense,
        "digits": digits,
        "digits-dense": digits_dense,
        "python-lm": python_lm,
        "python-lm-dense": python_lm_dense,
    }
)
"""Every recipe by name. The contract suite runs over all of them."""


def recipe_named(name: str) -> RunConfig:
    """Return the settings of a recipe by its name, or of one of your own by module and function: ``"module:function"``.

    Raises:
        ValueError: If there is none; the sentence names the nearest.
    """
    if ":" not in name:
        return RECIPES[known(name, RECIPES, "recipe")]()
    config = imported(name, "recipe")()
    if not isinstance(config, RunConfig):
        raise ValueError(f"A recipe is a function that returns a RunConfig; {name} returned {type(config).__name__}.")
    return replace(config, recipe=name)  # by which a run is told how to go on


def with_epochs(config: RunConfig, epochs: int) -> RunConfig:
    """Return a run of another length, whose dense network is upcycled at the same share of its epochs.

    The learning rate's fall follows the number of epochs by itself; warm-up is as many epochs as before.
    """
    upcycle = min(round(config.model.upcycle_epoch * epochs / config.epochs), epochs - 1)
    return replace(config, epochs=epochs, model=replace(config.model, upcycle_epoch=upcycle))


__all__ = [
    "RECIPES",
    "cifar10_cnn",
    "cifar10_cnn_dense",
    "cifar10_fast",
    "cifar10_fast_dense",
    "cifar10_resnet18s",
    "cifar10_resnet34s",
    "cifar10_resnets",
    "cifar10_resnets_article",
    "cifar10_resnets_dense",
    "cifar10_resnets_stem",
    "cifar10_rotate",
    "cifar10_rotate_dense",
    "cifar10_vit",
    "cifar10_vit_dense",
    "digits",
    "digits_dense",
    "python_lm",
    "python_lm_dense",
    "recipe_named",
    "with_epochs",
]
