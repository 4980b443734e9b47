import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gatewright.data import load_images
from gatewright.train import evaluate, load_config, load_run, save_config, train
from gatewright.train.checkpoint.format import checkpoints, load_checkpoint, newest_checkpoint
from tests.train.runs import digits_config, write_image_folder


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run, at another place."""
    return Path(shutil.copytree(finished[1], tmp_path / "elsewhere"))


def test_a_loaded_run_is_the_one_that_was_evaluated(finished):
    config, output, result = finished
    trained = load_run(output)
    assert trained.config == config
    assert not trained.model.training
    assert trained.fingerprint["class_names"] == list("0123456789")
    assert trained.fingerprint["image_shape"] == [1, 8, 8]
    found = evaluate(trained.task, trained.model, load_images(config.data).test, batch_size=100)
    assert found.confusion.tolist() == result["confusion"]


def test_the_data_set_is_not_needed(tmp_path):
    folder = write_image_folder(tmp_path / "images", num_train=24, num_classes=3)
    data = {"name": "folder", "path": str(folder), "batch_size": 8, "holdout": 0.0, "cache": str(tmp_path / "cache")}
    _, output = train(digits_config(tmp_path / "run", data=data))
    shutil.rmtree(folder)
    shutil.rmtree(tmp_path / "cache")
    trained = load_run(output)
    assert trained.fingerprint == {
        "num_images": 24,
        "class_names": ["class0", "class1", "class2"],
        "image_shape": [3, 16, 16],
    }
    saved = load_checkpoint(newest_checkpoint(output / "checkpoints"))["engine"]["model"]
    assert torch.equal(trained.model.mean, saved["mean"])
    assert trained.model.mean.any()
    assert trained.model(torch.rand(2, 3, 16, 16)).shape == (2, 3)


def test_averaged_weights_are_chosen_where_there_are_any(tmp_path):
    config = digits_config(tmp_path / "run", optim={"ema_decay": 0.9}, data={"batch_size": 256})
    result, output = train(config)
    trained = load_run(output)
    engine = load_checkpoint(newest_checkpoint(output / "checkpoints"))["engine"]
    for name, value in trained.model.state_dict().items():
        assert torch.equal(value, engine["average"][name])
    assert not torch.equal(trained.model.network.features[0].weight, engine["model"]["network.features.0.weight"])
    found = evaluate(trained.task, trained.model, load_images(config.data).test, batch_size=1000)
    assert found.confusion.tolist() == result["confusion"]


def test_a_run_that_was_moved_is_loaded(copied, finished):
    expected = load_run(finished[1]).model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in load_run(copied).model.state_dict().items())


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"No run at .*: it has no config.yaml. Name a folder that train wrote."
    ):
        load_run(tmp_path)


def test_a_run_without_a_checkpoint_is_refused(copied):
    shutil.rmtree(copied / "checkpoints")
    with pytest.raises(FileNotFoundError, match=r"The run at .*elsewhere has no checkpoint yet. Go on with it"):
        load_run(copied)


def test_a_broken_checkpoint_is_refused(copied):
    for path in checkpoints(copied / "checkpoints"):
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"is truncated or not a safetensors file"):
        load_run(copied)


def test_a_config_of_another_model_is_refused(copied):
    config = load_config(copied / "config.yaml")
    save_config(replace(config, model=replace(config.model, width=16)), copied / "config.yaml")
    with pytest.raises(ValueError, match="The checkpoint holds another model than this config describes"):
        load_run(copied)
