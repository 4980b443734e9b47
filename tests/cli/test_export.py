import json

import pytest
import safetensors
import torch
from safetensors.torch import load_file

from gatewright.models import ImageClassifier
from gatewright.train import load_config, load_run, train
from gatewright.train.checkpoint import newest_checkpoint
from tests.train.runs import FIVE_STEPS, digits_config


@pytest.mark.parametrize("experts", ["separate", "split on the way", "still one"])
def test_the_file_holds_the_evaluated_model_and_what_it_is_for(gatewright, tmp_path, experts):
    """With averaged weights, which are not the last ones, in the model that the file's own settings describe."""
    split_epoch = 0 if experts == "separate" else 1
    settings = {"data": FIVE_STEPS, "optim": {"ema_decay": 0.5}, "model": {"split_epoch": split_epoch}}
    _, output = train(digits_config(tmp_path / "run", epochs=1 + split_epoch, **settings))
    if experts == "still one":
        newest_checkpoint(output / "checkpoints").unlink()
    file = tmp_path / "model.safetensors"
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
    assert classes == [str(digit) for digit in range(10)]


@pytest.mark.parametrize("name", ["model.bin", "here.safetensors"])
def test_nothing_is_written_over_and_nothing_is_called_what_it_is_not(gatewright, trained, tmp_path, name):
    (tmp_path / "here.safetensors").write_text("mine")
    status, _, errors = gatewright("export", trained, tmp_path / name)
    assert status == 2
    assert (
        errors == f"error: export writes a new file that ends in .safetensors; got {tmp_path / name}. Name another.\n"
    )
    assert (tmp_path / "here.safetensors").read_text() == "mine"
    assert not (tmp_path / "model.bin").exists()


def test_there_must_be_a_run(gatewright, tmp_path):
    status, _, errors = gatewright("export", tmp_path / "none", tmp_path / "model.safetensors")
    assert status == 2
    assert errors.startswith("error: No run at ")
