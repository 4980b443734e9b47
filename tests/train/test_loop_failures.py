"""Runs that end early say why, and keep what is good."""

import subprocess
from dataclasses import replace

import pytest

from gatewright.train import Interrupted, TrainingDiverged, train
from gatewright.train.checkpoint import load_checkpoint, newest_checkpoint
from tests.train.runs import FIVE_STEPS, digits_config, signal_at


def test_a_folder_that_holds_a_run_is_not_written_over(finished):
    config, output, _ = finished
    before = sorted((path, path.stat().st_mtime_ns) for path in output.rglob("*"))
    with pytest.raises(FileExistsError, match=r"holds a run already. Go on with it by --resume, or name another"):
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


def test_a_run_that_diverges_at_once_says_that_nothing_was_saved(tmp_path):
    config = digits_config(tmp_path / "run", data=FIVE_STEPS, optim={"name": "sgd", "lr": 1e30, "warmup_epochs": 0.0})
    with pytest.raises(TrainingDiverged, match=r"The last good checkpoint: none yet\."):
        train(config)


def test_a_run_that_never_began_leaves_no_run_behind(tmp_path):
    """A mistake in the settings of the data does not claim the folder."""
    missing = {"name": "folder", "path": str(tmp_path / "nowhere")}
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        train(digits_config(tmp_path / "run", data=missing))
    with pytest.raises(ValueError, match=r"has 3 batches of 500, fewer than accumulation_steps \(4\)"):
        train(digits_config(tmp_path / "run", data={"batch_size": 500}, optim={"accumulation_steps": 4}))
    with pytest.raises(ValueError, match="There is no device 'gpu' here"):
        train(digits_config(tmp_path / "run", device="gpu"))
    train(digits_config(tmp_path / "run", data=FIVE_STEPS))


def test_a_disk_that_fills_up_ends_the_run_with_a_sentence(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2400k", "tmpfs", disk], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"mounting a small disk needs rights that this user has not: {mount.stderr.strip()}")
    try:
        config = digits_config(disk / "run", epochs=4, data=FIVE_STEPS)  # a checkpoint takes 0.9 MiB
        with pytest.raises(
            OSError, match=r"could not be written .*No space left on device. .* is intact: go on"
        ) as full:
            train(config)
        good = newest_checkpoint(disk / "run" / "checkpoints")
        assert str(good) in str(full.value)
        assert load_checkpoint(good)["position"]["epoch"] == 2
        subprocess.run(["mount", "-o", "remount,size=10m", disk], check=True)
        result, _ = train(config, resume=True)
        assert result["epochs"] == 4
    finally:
        subprocess.run(["umount", disk], check=True)
