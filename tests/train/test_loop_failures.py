"""Runs that end early say why, and keep what is good."""

import json
import resource
from dataclasses import replace

import pytest

from gatewright.train import Interrupted, TrainingDiverged, train
from gatewright.train.checkpoint.format import load_checkpoint, newest_checkpoint
from tests.train.runs import FIVE_STEPS, digits_config, signal_at, write_image_folder


def test_a_folder_that_holds_a_run_is_not_written_over(finished):
    config, output, _ = finished
    before = sorted((path, path.stat().st_mtime_ns) for path in output.rglob("*"))
    with pytest.raises(FileExistsError, match=r"holds a run already. Go on with it by `resume=True`, or name another"):
        train(replace(config, seed=5))
    assert sorted((path, path.stat().st_mtime_ns) for path in output.rglob("*")) == before


def test_a_diverging_run_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    config = digits_config(
        tmp_path / "run", epochs=3, data=FIVE_STEPS, optim={"name": "sgd", "lr": 1e-3}, log_interval=1
    )
    with signal_at(7), pytest.raises(Interrupted):
        train(config)
    good = newest_checkpoint(tmp_path / "run" / "checkpoints")
    before = good.read_bytes()
    hot = replace(config, optim=replace(config.optim, lr=1e30, clip_norm=None))
    with pytest.raises(
        TrainingDiverged, match=rf"(loss|gradient norm) became (nan|inf) at step \d+; .*checkpoint: {good}"
    ):
        train(hot, resume=True)
    assert newest_checkpoint(tmp_path / "run" / "checkpoints").read_bytes() == before
    assert all(value.isfinite().all() for value in load_checkpoint(good)["engine"]["model"].values())
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_checkpoint_of_which_nothing_finite_came_is_not_called_good(tmp_path):
    """The first step spoils the weights and is saved; the second one shows it."""
    optim = {"name": "sgd", "lr": 1e30, "warmup_epochs": 0.0}
    config = digits_config(tmp_path / "run", data=FIVE_STEPS, optim=optim, checkpoint_every_steps=1)
    with pytest.raises(TrainingDiverged, match=r"at step 2; .*The last good checkpoint: none yet\."):
        train(config)
    assert newest_checkpoint(tmp_path / "run" / "checkpoints").name == "step-00000001.safetensors"


def test_a_metrics_file_on_a_full_disk_ends_the_run_with_a_sentence(tmp_path):
    config = digits_config(tmp_path / "run", epochs=3, data=FIVE_STEPS, log_interval=1)
    with signal_at(7), pytest.raises(Interrupted):
        train(config)
    good = newest_checkpoint(tmp_path / "run" / "checkpoints")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as metrics:
        metrics.writelines(json.dumps({"step": 0, "time": 0.0, "values": {}}) + "\n" for _ in range(50_000))
        size = metrics.tell()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))  # a disk full of it; checkpoints are smaller
    try:
        with pytest.raises(
            OSError, match=r"no room to write the run's files to .*Make room, and .* is intact: go on"
        ) as full:
            train(config, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(good) in str(full.value)
    assert train(config, resume=True)[0]["epochs"] == 3


def test_images_of_other_classes_or_another_shape_are_refused_on_resuming(tmp_path):
    data = {"name": "folder", "path": str(write_image_folder(tmp_path / "images")), "batch_size": 16, "holdout": 0.0}
    config = digits_config(tmp_path / "run", epochs=2, data=data)
    with signal_at(2), pytest.raises(Interrupted):
        train(config)
    write_image_folder(tmp_path / "larger", size=12)
    for split in write_image_folder(tmp_path / "others").iterdir():
        (split / "class0").rename(split / "aardvark")
    for folder, message in (
        ("others", r"the classes class0, class1.*; .* has aardvark"),
        ("larger", r"\(3, 16, 16\) .* has \(3, 12, 12\)"),
    ):
        other = replace(config, data=replace(config.data, path=str(tmp_path / folder)))
        with pytest.raises(ValueError, match=message):
            train(other, resume=True)
    assert train(config, resume=True)[0]["epochs"] == 2


def test_a_run_that_never_began_leaves_no_run_behind(tmp_path):
    """A mistake in the settings of the data does not claim the folder."""
    missing = {"name": "folder", "path": str(tmp_path / "nowhere")}
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        train(digits_config(tmp_path / "run", data=missing))
    train(digits_config(tmp_path / "run", data=FIVE_STEPS))


def test_a_run_is_resumed_where_its_mixture_has_come_or_still_comes(tmp_path):
    config = digits_config(tmp_path / "run", epochs=2, data=FIVE_STEPS, model={"upcycle_epoch": 1})
    late = replace(config, model=replace(config.model, upcycle_epoch=2))
    with signal_at(2), pytest.raises(Interrupted):
        train(config)
    with pytest.raises(ValueError, match=r"until epoch 2, .* a `model.upcycle_epoch` below 2"):
        train(late, resume=True)
    result, _ = train(config, resume=True)
    assert result["layers"]
    with pytest.raises(ValueError, match=r"upcycle_epoch was 1 and is 2, but it trains a mixture since epoch 1"):
        train(replace(late, epochs=3), resume=True)


def test_a_file_in_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for output in ("file", "file/below"):
        with pytest.raises(FileExistsError, match=r"/file is a file, and `output` names the run's folder"):
            train(digits_config(tmp_path / output))
    assert (tmp_path / "file").read_text() == "in the way"
