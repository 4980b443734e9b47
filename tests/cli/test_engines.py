"""The command line on real processes, with every way to spread a run: it ends, and what it saved serves one."""

import json
import re

import pytest

from tests.train.runs import finish, logged, start

pytestmark = pytest.mark.distributed

SETTINGS = "--epochs 1 --tracking.no-enabled --tracking.log-interval 1 --output run"
BF16 = {"bf16": {"enabled": True}}


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        ("--parallel.ep-size 2 --parallel.shard fsdp --checkpoint-in-background --checkpoint-every-steps 10", None),
        pytest.param(
            "--parallel.ep-size 2 --engine deepspeed --deepspeed.config settings.json", BF16, marks=pytest.mark.slow
        ),  # its steps are in tests/integrations/deepspeed/test_engine.py
    ],
)
def test_a_run_on_several_processes_ends_well(gatewright, trained, tmp_path, flags, settings):
    """The loads that it logs are those of the global batch."""
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    words = ("train", "digits", *SETTINGS.split(), "--processes", "2", *flags.split())
    status, printed, errors = finish(start(*words, folder=tmp_path))
    assert status == 0, errors
    assert "Warning" not in errors
    accuracy = json.loads((tmp_path / "run" / "result.json").read_text())["test_accuracy"]
    assert accuracy > 0.5
    assert f"{accuracy:.2%}" in printed
    assert ("begin with it" in printed) == (settings is not None)  # its own checkpoint is a pickle
    status, printed, errors = gatewright("evaluate", "run")
    assert status == 0, errors
    assert re.search(rf"test accuracy +{accuracy:.2%}", printed) or settings
    one, two = (
        {name: value for name, value in logged(output)[0]["values"].items() if name.startswith("train/layers/")}
        for output in (trained, tmp_path / "run")
    )
    assert one == pytest.approx(two, abs=1e-5 if settings is None else 0.05)
    assert any("/load/" in name for name in one)


def test_a_run_that_diverges_on_two_processes_says_so_and_does_not_start_again(tmp_path):
    flags = "--processes 2 --parallel.ep-size 2 --optim.name sgd --optim.lr 1e30 --optim.warmup-epochs 0"
    words = ("train", "digits", *SETTINGS.split(), *flags.split(), "--parallel.shard", "fsdp")
    status, _, errors = finish(start(*words, folder=tmp_path))
    assert status == 4, errors
    assert len(re.findall("^error: The (?:loss|gradient norm) became", errors, re.MULTILINE)) >= 1
    assert "Traceback" not in errors
    assert "start again" not in errors
