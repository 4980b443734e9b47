"""A run is loaded from its folder alone, with the weights that were evaluated; what cannot be is one sentence."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gatewright.data import load_images
from gatewright.train import evaluate, load_config, load_run, save_config, train
from gatewright.train.checkpoint.format import checkpoints, load_checkpoint, newest_checkpoint
from tests.train.runs import digits_config, write_image_folder


def test_a_run_that_was_moved_is_the_one_that_was_evaluated(finished, tmp_path):
    config, output, result = finished
    trained = load_run(shutil.copytree(output, tmp_path / "elsewhere"))
    assert trained.config == config
    assert not trained.model.training
    assert trained.fingerprint["class_names"] == list("0123456789")
    assert trained.fingerprint["image_shape"] == [1, 8, 8]
    found = evaluate(trained.task, trained.model, load_images(config.data).test, batch_size=100)
    assert found.confusion.tolist() == result["confusion"]


def test_averaged_weights_are_chosen_where_there_are_any_and_the_data_set_is_not_needed(tmp_path):
    folder = write_image_folder(tmp_path / "images", num_train=24, num_classes=3)
    data = {"name": "folder", "path": str(folder), "batch_size": 8, "holdout": 0.0, "cache": str(tmp_path / "cache")}
    config = digits_config(tmp_path / "run", data=data, optim={"ema_decay": 0.9})
    result, output = train(config)
    test = load_images(config.data).test
    shutil.rmtree(folder)
    shutil.rmtree(tmp_path / "cache")
    trained = load_run(output)
    names = ["class0", "class1", "class2"]
    assert trained.fingerprint == {"num_images": 24, "class_names": names, "image_shape": [3, 16, 16]}
    engine = load_checkpoint(newest_checkpoint(output / "checkpoints"))["engine"]
    assert all(torch.equal(value, engine["average"][name]) for name, value in trained.model.state_dict().items())
    assert not torch.equal(trained.model.network.features[0].weight, engine["model"]["network.features.0.weight"])
    assert trained.model.mean.any()
    found = evaluate(trained.task, trained.model, test, batch_size=1000)
    assert found.confusion.tolist() == result["confusion"]


def test_what_is_no_run_is_refused(finished, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No run at .*: it has no config.yaml, and no model.safetensors as a"):
        load_run(tmp_path)
    copied = Path(shutil.copytree(finished[1], tmp_path / "elsewhere"))
    config = load_config(copied / "config.yaml")
    save_config(replace(config, model=replace(config.model, width=16)), copied / "config.yaml")
    with pytest.raises(ValueError, match="The checkpoint holds another model than this config describes"):
        load_run(copied)
    for path in checkpoints(copied / "checkpoints"):
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"is truncated or not a safetensors file"):
        load_run(copied)
    shutil.rmtree(copied / "checkpoints")
    with pytest.raises(FileNotFoundError, match=r"The run at .*elsewhere has no checkpoint yet. Train it on with"):
        load_run(copied)
