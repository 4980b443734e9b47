"""The command line on real processes, with every way to spread a run: it ends, and what it saved serves one."""

import json
import re

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
