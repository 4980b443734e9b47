import sys
from dataclasses import replace

import pytest
import torch

from gatewright.data import DataConfig, ImageSplits
from gatewright.recipes import RECIPES
from gatewright.tasks import Classification
from gatewright.train.provenance import changed_settings, command
from tests.train.runs import image_set

NONE = torch.tensor([], dtype=torch.long)


def test_a_digest_is_that_of_the_images_and_labels():
    def digest(train, **changes):
        config = DataConfig(name="folder", path="photos", **changes)
        return Classification().describe_data(config, ImageSplits(train, train.select(NONE), train))[0].digest

    images = image_set(8)
    assert digest(images) == digest(image_set(8), batch_size=2)
    assert len({digest(images), digest(image_set(8, seed=1)), digest(replace(images, labels=images.labels * 0))}) == 3


def test_what_a_run_changes_of_its_recipe():
    recipe = RECIPES["digits"]()
    run = replace(
        recipe,
        seed=1,
        output="elsewhere",
        data=replace(recipe.data, cache="elsewhere"),
        optim=replace(recipe.optim, lr=0.1),
        model=replace(recipe.model, losses={"importance": 0.5}),
        tracking=replace(recipe.tracking, enabled=False),
    )
    assert changed_settings(recipe, recipe) == {}
    assert changed_settings(run, recipe) == {
        "model.losses.importance": {"run": 0.5, "recipe": 1.0},
        "model.losses.load": {"run": None, "recipe": 1.0},
        "optim.lr": {"run": 0.1, "recipe": 3e-3},
        "seed": {"run": 1, "recipe": 0},
    }


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("/lib/gatewright_command/__main__.py", "gatewright train digits --output 'my run'"),
        ("my script.py", "python 'my script.py' train digits --output 'my run'"),
    ],
)
def test_the_command_can_be_typed_again(program, said, monkeypatch):
    monkeypatch.setattr(sys, "argv", [program, "train", "digits", "--output", "my run"])
    assert command() == said


def test_the_command_keeps_no_password(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gatewright", "train", "digits", "--tracking.uri", "https://me:secret@host/x"])
    assert command() == "gatewright train digits --tracking.uri https://host/x"
