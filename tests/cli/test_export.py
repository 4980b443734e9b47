import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import load_file

from gatewright.models import ImageClassifier
from gatewright.train import TrackingConfig, load_config, load_run, train
from gatewright.train.checkpoint.format import newest_checkpoint
from gatewright.train.phases import dense_phase
from tests.train.runs import FIVE_STEPS, digits_config


def test_the_file_holds_the_evaluated_model_and_what_it_is_for(gatewright, tmp_path):
    """With averaged weights, which are not the last ones, in the model that the file's own settings describe."""
    settings = {"data": FIVE_STEPS, "optim": {"ema_decay": 0.5}, "model": {"upcycle_epoch": 1}}
    _, output = train(digits_config(tmp_path / "run", epochs=2, **settings))
    config = load_config(output / "config.yaml")
    for place, described in (("mixture", config), ("dense", dense_phase(config))):
        if place == "dense":  # of the first epoch
            newest_checkpoint(output / "checkpoints").unlink()
        file = tmp_path / f"{place}.safetensors"
        status, said, errors = gatewright("export", output, file)
        assert (status, errors) == (0, "")
        assert said.startswith(f"{file}: ")

        with safetensors.safe_open(file, "pt") as opened:
            header = opened.metadata()
        (tmp_path / "config.yaml").write_text(header["config"])
        classes, shape = json.loads(header["class_names"]), tuple(json.loads(header["image_shape"]))
        network = load_config(tmp_path / "config.yaml").model.build(shape, len(classes))
        model = ImageClassifier(network, [0.0], [1.0]).eval()
        model.load_state_dict(load_file(file))
        images = torch.rand(5, *shape)
        assert torch.equal(model(images), load_run(output).model(images))
        again = load_run(str(file))
        assert torch.equal(again.model(images), model(images))
        assert not again.model.training
        assert again.config == replace(described, output=None, tracking=TrackingConfig())
        assert again.fingerprint == load_run(output).fingerprint
        assert classes == [str(digit) for digit in range(10)]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(b"nothing of use", "is truncated or not a safetensors file"), (None, "its header has no config")],
)
def test_a_file_that_is_no_export_is_said(tmp_path, content, sentence):
    file = tmp_path / "model.safetensors"
    file.write_bytes(safetensors.torch.save({"weight": torch.zeros(2)}) if content is None else content)
    with pytest.raises(ValueError, match=sentence):
        load_run(file)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("model.bin", "export writes a file that ends in .safetensors; got model.bin. Name another."),
        (
            "here.safetensors",
            "here.safetensors exists already, and export writes over nothing. Remove it, or name another.",
        ),
        ("no/m.safetensors", "export writes into a folder that is there; no is none. Make it first."),
    ],
)
def test_a_file_that_cannot_be_new_is_refused(gatewright, trained, name, sentence):
    Path("here.safetensors").write_text("mine")
    status, _, errors = gatewright("export", trained, name)
    assert (status, errors.count("\n")) == (2, 1)
    assert sentence in errors
    assert Path("here.safetensors").read_text() == "mine"
    assert os.listdir() == ["here.safetensors"]


@pytest.mark.usefixtures("read_only_folder")
def test_a_folder_that_cannot_be_written_to_is_named(gatewright, trained):
    status, _, errors = gatewright("export", trained, "folder/model.safetensors")
    assert (status, errors) == (2, "error: The folder folder cannot be written to. Name a file in another.\n")
