import json
import os
import shlex
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from gatewright.cli.train import parse_train
from gatewright.recipes import RECIPES
from gatewright.train import save_config, train
from tests.train.runs import digits_config, write_image_folder


def test_training_prints_the_result_the_experts_and_what_to_do_next(gatewright):
    status, output, errors = gatewright(
        "train", "digits", "--epochs", "1", "--output", "my [runs]/a run", "--tracking.no-enabled", "--seed", "7"
    )
    assert (status, errors) == (0, "")
    result = json.loads(Path("my [runs]/a run/result.json").read_text())
    assert (result["seed"], result["epochs"]) == (7, 1)
    assert output.startswith(
        "digits on cpu: 1 epoch of 21 steps; 1,294 images to train on, 144 held out, 359 to test on\n"
        "The run's folder: my [runs]/a run\nepoch 1/1 "
    )
    assert "Experts of network.mixture" in output
    assert f"{result['test_accuracy']:.2%}" in output
    assert "\nThe run is in my [runs]/a run: report.html, classes-network.mixture.png, confusion.png" in output
    commands = [shlex.split(line, comments=True) for line in output.splitlines() if line.startswith("  gatewright ")]
    assert [words[:2] for words in commands] == [
        ["gatewright", name] for name in ("evaluate", "predict", "train", "list")
    ]
    assert commands[0][2:] == ["my [runs]/a run", "--flip"]
    assert commands[1][2:] == ["my [runs]/a run", "my [runs]/a run/examples/0.png"]
    for words in (commands[0], commands[1], commands[-1]):  # what it says to try next works
        assert gatewright(*words[1:])[0] == 0


def test_evaluating_a_run_gives_its_result_again(gatewright, trained):
    result = json.loads((trained / "result.json").read_text())
    status, output, errors = gatewright("evaluate", trained)
    assert (status, errors) == (0, "")
    assert output.endswith(f"test accuracy {result['test_accuracy']:.2%} of 359 images\n")
    assert "Experts of network.mixture" in output
    for name, accuracy in result["test_accuracy_per_class"].items():
        assert f"│ {name}     │ {accuracy:>8.2%}" in output
    for name, row in zip(result["test_accuracy_per_class"], result["confusion"], strict=True):
        assert [name, *map(str, row)] in [line.replace("│", " ").split() for line in output.splitlines()]


def test_evaluating_on_data_at_another_place_and_on_data_that_do_not_fit(gatewright, tmp_path):
    data = {"name": "folder", "path": str(write_image_folder(tmp_path / "images")), "batch_size": 16, "holdout": 0.0}
    _, output = train(digits_config(tmp_path / "run", data=data))
    (tmp_path / "images").rename(tmp_path / "moved")
    write_image_folder(tmp_path / "others", num_classes=3)
    write_image_folder(tmp_path / "larger", size=24)
    for flags, sentence in (
        ((), f"there is no folder {tmp_path}/images"),
        (("--data.path", tmp_path / "others"), "has class0, class1, class2 (3)."),
        (("--data.path", tmp_path / "larger"), "has (3, 24, 24). Set "),
    ):
        status, printed, errors = gatewright("evaluate", output, *flags)
        assert (status, printed, errors.count("\n")) == (2, "", 1)
        assert sentence in errors
    status, printed, _ = gatewright("evaluate", output, "--data.path", tmp_path / "moved")
    assert status == 0
    assert printed.endswith("of 8 images\n")
    assert "class1" in printed
    flags = ("--output", output, "--resume", "--epochs", "2", "--data.path", tmp_path / "moved")
    status, printed, errors = gatewright("train", "digits", *flags)
    assert status == 0
    assert errors.startswith("resumed: epochs was 1 until the end of epoch 1, and is 2 from there on.\n")


def test_a_soft_mixture_is_trained_evaluated_and_asked_like_any_other(gatewright):
    """Every image goes to every expert: counts become sums of weights, and predictions name the shares."""
    flags = "--epochs 1 --output soft --tracking.no-enabled --model.router soft --model.router-options group_size 1"
    status, printed, errors = gatewright("train", "digits", *flags.split())
    assert (status, errors) == (0, "")
    result = json.loads(Path("soft/result.json").read_text())
    layer = result["layers"]["network.mixture"]
    tokens, seen = torch.tensor(layer["tokens_per_expert"]), torch.tensor(layer["class_by_expert"])
    assert_close(tokens.sum(), torch.tensor(359.0))
    assert_close(seen.sum(0), tokens)
    assert_close(seen.sum(1), torch.tensor(layer["tokens_per_class"]).float())
    assert (layer["dead_experts"], layer["dropped_fraction"]) == ([], 0)
    assert result["num_active_parameters"] == result["num_parameters"]
    assert f"{tokens[0] / 359:6.1%}" in printed
    assert {"classes-network.mixture.png", "load-network.mixture.png", "report.html"} <= set(os.listdir("soft"))
    status, output, errors = gatewright("evaluate", "soft")
    assert (status, errors) == (0, "")
    assert f"{tokens[0] / 359:6.1%}" in output
    assert output.endswith(f"test accuracy {result['test_accuracy']:.2%} of 359 images\n")
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save("empty.png")
    status, output, _ = gatewright("predict", "soft", "empty.png")
    assert status == 0
    shares = output.strip().split("; network.mixture experts ")[1].split(", ")
    assert [share.split()[0] for share in shares] == ["0", "1", "2", "3"]
    assert sum(float(share.split()[1].rstrip("%")) for share in shares) == pytest.approx(100, abs=0.3)


def test_a_dense_run_has_no_experts_to_name(gatewright, tmp_path):
    _, output = train(digits_config(tmp_path / "run", recipe="digits-dense", data={"batch_size": 256}))
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save("empty.png")
    status, printed, _ = gatewright("predict", output, "empty.png")
    assert status == 0
    assert "experts" not in printed
    assert "Experts of" not in gatewright("evaluate", output)[1]


def test_a_finished_run_is_not_trained_again_nor_by_another_recipe(gatewright, trained):
    status, _, errors = gatewright("train", "digits", "--output", trained)
    assert status == 2
    assert f"{trained} holds a run already. Go on with it by --resume, or name another --output." in errors
    status, _, errors = gatewright("train", "digits-dense", "--output", trained, "--resume")
    assert status == 2
    assert "No recipe of this run is called 'digits-dense'; did you mean 'digits'?" in errors


@pytest.mark.parametrize(
    ("words", "setting", "value"),
    [
        ("--precision bfloat16", "precision", "bfloat16"),
        ("--optim.clip-norm None", "optim.clip_norm", None),
        ("--optim.betas 0.5 0.9", "optim.betas", (0.5, 0.9)),
        ("--no-channels-last", "channels_last", False),
        ("--model.losses importance 0.5 load 0.25", "model.losses", {"importance": 0.5, "load": 0.25}),
        ("--model.losses", "model.losses", {}),
        ("--model.losses None", "model.losses", None),  # the router's own, in place of the recipe's
        ("--model.router top-k", "model.losses", None),  # the recipe's are for its own router
        ("--model.router-options", "model.router_options", {}),
        (
            "--model.router top-k --model.router-options jitter 0.1 score sigmoid normalize OFF",
            "model.router_options",
            {"jitter": 0.1, "score": "sigmoid", "normalize": False},
        ),
    ],
)
def test_every_setting_is_a_flag(words, setting, value):
    arguments = parse_train(RECIPES["digits"](), words.split())
    assert repr(attrgetter(setting)(arguments.run)) == repr(value)  # False is not 0
    assert (arguments.run.recipe, arguments.resume) == ("digits", False)


def test_without_flags_the_recipe_is_as_it_is():
    for name, recipe in RECIPES.items():
        assert parse_train(recipe(), []).run == recipe(), name


def test_the_split_follows_the_epochs_unless_it_is_said_or_the_run_is_resumed(tmp_path):
    recipe = RECIPES["cifar10-cnn"]()
    for words, split in (("", 8), ("--epochs=6", 2), ("--epochs 1", 0), ("--epochs 6 --model.upcycle-epoch 4", 4)):
        assert parse_train(recipe, words.split()).run.model.upcycle_epoch == split
    save_config(recipe, tmp_path / "config.yaml")
    words = ["--epochs", "48", "--output", str(tmp_path), "--resume"]
    assert parse_train(recipe, words).run.model.upcycle_epoch == 8


def test_a_resumed_run_has_its_own_settings_and_those_of_the_flags(trained):
    arguments = parse_train(RECIPES["digits"](), ["--output", str(trained), "--resume", "--seed", "4"])
    assert arguments.resume
    assert (arguments.run.epochs, arguments.run.seed, arguments.run.tracking.enabled) == (2, 4, False)
