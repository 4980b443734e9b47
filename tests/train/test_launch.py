"""Starting processes: settings are refused once, and before any of them."""

from dataclasses import replace

import pytest

from gatewright.train import launch, save_config, train
from gatewright.train.launch.elastic import how_to_go_on
from tests.train.runs import FIVE_STEPS, call, digits_config, write_image_folder

FOUR = {"processes": 4, "data": FIVE_STEPS}


def test_a_refusal_is_one_line_for_all_processes(tmp_path):
    words = ("train", "digits", "--processes", 4, "--optim.accumulation-steps", 30, "--output", "run")
    status, printed, errors = call(*words, folder=tmp_path)
    assert (status, printed) == (2, "")
    assert errors == (
        "error: An epoch of 1294 images has 21 batches of 64, fewer than --optim.accumulation-steps (30). Use "
        "smaller batches, or accumulate fewer.\n"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel": "ep_size"}, r"`parallel.ep_size` \(3\) divides the number of processes \(4\)"),
        ({"device": "gpu"}, "There is no device 'gpu' here"),
        ({"data": {"name": "folder", "path": "nowhere"}}, "there is no folder .*nowhere"),
        ({"model": {"upcycle_epoch": 2}, "epochs": 2}, "until epoch 2, counted from 0"),
        (
            {"recipe": "cifar10-cnn", "data": {"name": "digits"}, "model": {"upcycle_epoch": 0}},
            "at least 16 x 16 pixels",
        ),
    ],
)
def test_whatever_each_process_would_refuse_is_refused_before_any_starts(tmp_path, changes, message):
    config = digits_config(tmp_path / "run", **{**FOUR, **{k: v for k, v in changes.items() if k != "parallel"}})
    if "parallel" in changes:
        config = replace(config, parallel=replace(config.parallel, ep_size=3))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        launch(config, [])
    assert not (tmp_path / "run").exists()


def test_a_run_that_cannot_go_on_so_is_refused_before_any_process_starts(tmp_path):
    folder = write_image_folder(tmp_path / "images")
    data = {"name": "folder", "path": str(folder), "batch_size": 16, "holdout": 0.0}
    config = digits_config(tmp_path / "run", data=data)
    train(config)
    two = replace(config, processes=2)
    with pytest.raises(FileExistsError, match="holds a run already"):
        launch(two, [])
    with pytest.raises(ValueError, match="seed was 0 and is 7"):
        launch(replace(two, seed=7), [], resume=True)
    more = replace(config.data, path=str(write_image_folder(tmp_path / "more", num_train=40)))
    with pytest.raises(ValueError, match="was trained on 32 images, and now there are 40"):
        launch(replace(two, data=more), [], resume=True)


def test_a_run_that_is_stopped_says_what_it_saved_and_what_to_type(tmp_path):
    config = digits_config(tmp_path / "run", data=FIVE_STEPS)
    assert how_to_go_on(config) == (
        "Stopped before training began, and nothing was saved. Give the same command again."
    )
    (tmp_path / "run").mkdir()
    save_config(config, tmp_path / "run" / "config.yaml")
    assert "Stopped, and nothing was saved yet. Go on with: " in how_to_go_on(config)
    train(config, resume=True)  # What it says to type begins again.
    said = how_to_go_on(config)
    assert "Stopped, and the newest checkpoint is step-00000006.safetensors. Go on with: " in said
    assert said.endswith(f"train digits --output {tmp_path / 'run'} --resume")
