"""The command line on real processes, with every way to spread a run: it ends, and what it saved serves one."""

import json
import re
import socket

import pytest

from tests.train.runs import finish, start

pytestmark = pytest.mark.distributed

SETTINGS = "--epochs 2 --tracking.no-enabled --output run"


@pytest.mark.parametrize(
    "flags",
    [
        "--processes 2 --parallel.ep-size 2",
        "--processes 2 --parallel.ep-size 2 --checkpoint-in-background --checkpoint-every-steps 3",
        "--processes 2 --parallel.ep-size 2 --parallel.shard fsdp",
        "--processes 2 --parallel.shard fsdp --checkpoint-in-background",
        pytest.param("--processes 4 --parallel.ep-size 2 --parallel.shard fsdp", marks=pytest.mark.slow),
        "--processes 2 --parallel.ep-size 2 --engine deepspeed",
    ],
)
def test_a_run_on_several_processes_ends_well(tmp_path, flags):
    status, printed, errors = finish(start("train", "digits", *SETTINGS.split(), *flags.split(), folder=tmp_path))
    assert status == 0, errors
    assert "Warning" not in errors
    accuracy = json.loads((tmp_path / "run" / "result.json").read_text())["test_accuracy"]
    assert accuracy > 0.85
    assert f"{accuracy:.2%}" in printed
    status, printed, errors = finish(start("evaluate", "run", folder=tmp_path))
    assert status == 0, errors
    assert re.search(rf"test accuracy +{accuracy:.2%}", printed)


@pytest.mark.slow
def test_deepspeeds_own_launcher_starts_a_run(tmp_path):
    """It appends --local_rank, and its processes find each other by its variables."""
    pytest.importorskip("deepspeed")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    launcher = ("-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", port, "--module", "gatewright")
    run = ("train", "digits", *SETTINGS.split(), "--engine", "deepspeed", "--parallel.ep-size", "2")
    status, printed, errors = finish(start(*run, folder=tmp_path, program=launcher, DS_ACCELERATOR="cpu"))
    assert status == 0, errors
    assert len(re.findall("^epoch", printed, re.MULTILINE)) == 2  # said by one process
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert len(result["processes"]) == 2
    assert all(process["all_to_all_bytes"] > 0 for process in result["processes"])
