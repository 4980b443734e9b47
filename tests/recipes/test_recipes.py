"""What every recipe keeps to. A new one in `RECIPES` is run through all of it."""

import json
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch

from gatewright import moe_layers
from gatewright.data import ImageSet, TextSet
from gatewright.recipes import RECIPES, with_epochs
from gatewright.tasks import task_named
from gatewright.train.phases import dense_phase
from gatewright.train.step import TorchEngine

FINGERPRINTS = {
    "digits": {"image_shape": (1, 8, 8), "class_names": "0123456789"},
    "cifar10": {"image_shape": (3, 32, 32), "class_names": "0123456789"},
    "python": {},
}
TWINS = [(name, f"{name}-dense") for name in RECIPES if f"{name}-dense" in RECIPES]

MIXED = {"mixture", "mixtures", "router_features", "ffn"}
"""Modules that a mixture has in place of its dense twin's."""

RESULTS = Path(__file__).parents[2] / "studies" / "results"

recipes = pytest.mark.parametrize("name", RECIPES)


def build(config):
    return task_named(config.task).build(config.model, FINGERPRINTS[config.data.name])


def training_part(config):
    """Eight images, or a few windows of text."""
    if config.task == "language_model":
        return TextSet.pack([bytes(range(256)) * 2], context=16)
    shape = FINGERPRINTS[config.data.name]["image_shape"]
    return ImageSet(torch.randint(256, (8, *shape), dtype=torch.uint8), torch.arange(8), tuple("0123456789"))


@recipes
def test_it_bears_the_name_under_which_it_is_registered(name):
    assert RECIPES[name]().recipe == name
    assert RECIPES[name].__name__.replace("_", "-") == name
    assert RECIPES[name].__doc__


@recipes
def test_it_builds_a_network_of_as_many_experts_as_it_says(name):
    config = RECIPES[name]()
    with torch.device("meta"):
        layers = moe_layers(build(config))
        assert {layer.router.num_experts for _, layer in layers} == {config.model.num_experts} - {1}


@recipes
def test_it_trains_in_both_of_its_phases(name):
    config = RECIPES[name]()
    if config.model.num_experts * len(getattr(config.model, "resnet", "")) > 4 * len("small"):
        config = replace(config, model=replace(config.model, num_experts=2))  # Whole ResNet-34s take their time.
    config = replace(config, data=replace(config.data, batch_size=4), precision="float32")
    task = task_named(config.task)
    batches = task.training_batches(training_part(config), config.data, seed=0, epoch=0, start=0)
    for phase, batch in zip((dense_phase(config), config), batches, strict=False):
        model = build(phase)
        engine = TorchEngine(model, phase, device=torch.device("cpu"), steps_per_epoch=2)
        before = [parameter.clone() for parameter in model.parameters()]
        assert engine.step([batch]).task_loss > 0
        assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


@recipes
def test_its_phases_follow_the_number_of_epochs(name):
    config = RECIPES[name]()
    assert with_epochs(config, config.epochs) == config
    split = config.model.upcycle_epoch
    assert with_epochs(config, 10 * config.epochs).model.upcycle_epoch == 10 * split
    for epochs in range(1, config.epochs):
        shorter = with_epochs(config, epochs)
        assert shorter.epochs == epochs
        assert abs(shorter.model.upcycle_epoch - split * epochs / config.epochs) < 1
        assert shorter.model.upcycle_epoch < epochs


@pytest.mark.parametrize(("name", "twin"), TWINS)
def test_the_dense_twin_differs_in_the_mixture_alone(name, twin):
    mixture, dense = RECIPES[name](), RECIPES[twin]()
    assert dense.model.num_experts == 1
    assert replace(dense, recipe=name, model=mixture.model) == mixture
    with torch.device("meta"):
        parts = [
            {name for name, _ in build(config).named_parameters() if not MIXED & set(name.split("."))}
            for config in (mixture, dense)
        ]
    assert parts[0] == parts[1]


@pytest.mark.skipif(not RESULTS.is_dir(), reason="the studies are not part of this copy")
@recipes
def test_its_docstring_has_the_figures_that_were_measured(name):
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    found = [result for result in found if result["recipe"] == name]
    text = " ".join(RECIPES[name].__doc__.split())
    assert ("Not measured yet." in text) is (not found)
    if found:
        bits = [result["test_bits_per_byte"] for result in found if "test_bits_per_byte" in result]
        figures = bits or [100 * result["test_accuracy"] for result in found]
        digits, unit = (3, "bits per byte") if bits else (2, "%")
        assert f"{mean(figures):.{digits}f} " in text
        assert unit in text
        assert len(found) == 1 or f" ± {stdev(figures):.{digits}f} over seeds" in text
        seconds = [round(result["train_seconds"]) for result in found]
        assert f"{max(seconds)} s" in text
        assert f"; {min(seconds)} " in text
        for result in found:
            assert f"torch {result['versions']['torch'].partition('+')[0]} on CPU" in text
            assert str(result["seed"]) in text.partition("seed")[2].partition(";")[0]
