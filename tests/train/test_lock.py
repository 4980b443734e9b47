"""Runs beside runs: one run per folder, and a lock that a killed process leaves free."""

import json
import subprocess
import sys

import pytest

from gatewright.train import train
from gatewright.train.folder import own_folder
from gatewright.train.lock import locked
from tests.train.runs import FIVE_STEPS, digits_config, environment, finish, start, steps_of

HOLD = "import sys; from pathlib import Path; from gatewright.train.lock import locked\n"
HOLD += "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    words = [sys.executable, "-c", HOLD, tmp_path / "file"]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(tmp_path), text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        with locked(tmp_path / "file", wait=False) as held:
            assert not held
        holder.kill()
    with locked(tmp_path / "file", wait=False) as held:
        assert held


def test_a_second_run_in_a_folder_is_refused_and_the_first_goes_on(tmp_path):
    config = digits_config(tmp_path / "run", data=FIVE_STEPS)
    busy = r"Another run is training in .*/run at this moment. Wait until it has ended, or stop it; or name another"
    with own_folder(config, resume=False), pytest.raises(FileExistsError, match=busy):
        train(config)
    train(config)
    result = (tmp_path / "run" / "result.json").read_text()
    with own_folder(config, resume=True), pytest.raises(FileExistsError, match=busy):
        train(config, resume=True)
    assert (tmp_path / "run" / "result.json").read_text() == result


@pytest.mark.slow
def test_runs_at_once_from_nothing_end_with_their_results_in_one_store(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    flags = ("--epochs", 1, "--data.batch-size", 256, "--tracking.log-interval", 1)
    runs = [start("train", "digits", *flags, "--seed", seed, folder=tmp_path) for seed in range(2)]
    ended = [finish(run, seconds=900) for run in runs]
    assert [status for status, _, _ in ended] == [0] * 2, [errors for _, _, errors in ended]
    assert not any("MLflow" in errors for _, _, errors in ended)

    outputs = sorted((tmp_path / "runs").glob("digits-*"))
    assert sorted(json.loads((output / "result.json").read_text())["seed"] for output in outputs) == [0, 1]
    for output in outputs:
        assert steps_of(output) == [1, 2, 3, 4, 5, 6]
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/runs/mlflow.db")
    (experiment,) = [found for found in client.search_experiments() if found.name == "gatewright"]
    tracked = client.search_runs([experiment.experiment_id])
    assert sorted(run.data.params["seed"] for run in tracked) == ["0", "1"]
    assert all(run.info.status == "FINISHED" and "test/accuracy" in run.data.metrics for run in tracked)
