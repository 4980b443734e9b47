"""The command line on real processes, with every way to spread a run: it ends, and what it saved serves one."""

import json
import re

import pytest

from tests.train.runs import finish, logged, start

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


@pytest.mark.parametrize("shard", ["none", "fsdp"])
def test_a_run_that_diverges_on_two_processes_says_so_and_does_not_start_again(tmp_path, shard):
    flags = "--processes 2 --parallel.ep-size 2 --optim.name sgd --optim.lr 1e30 --optim.warmup-epochs 0"
    words = ("train", "digits", *SETTINGS.split(), *flags.split(), "--parallel.shard", shard)
    status, _, errors = finish(start(*words, folder=tmp_path))
    assert status == 4, errors
    assert len(re.findall("^error: The (?:loss|gradient norm) became", errors, re.MULTILINE)) >= 1
    assert "Traceback" not in errors
    assert "start again" not in errors


def test_sixteen_bits_by_deepspeeds_json(tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps({"bf16": {"enabled": True}}))
    flags = "--engine deepspeed --deepspeed.config settings.json --processes 2 --parallel.ep-size 2"
    status, printed, errors = finish(start("train", "digits", *SETTINGS.split(), *flags.split(), folder=tmp_path))
    assert status == 0, errors
    assert json.loads((tmp_path / "run" / "result.json").read_text())["test_accuracy"] > 0.85
    assert "begin with it" in printed  # its own checkpoint is a pickle
    status, _, errors = finish(start("evaluate", "run", folder=tmp_path))
    assert status == 0, errors


def test_tracked_loads_are_those_of_the_global_batch(tmp_path):
    found = []
    for output, flags in (("one", ""), ("two", "--processes 2 --parallel.ep-size 2")):
        words = f"--epochs 1 --tracking.no-enabled --tracking.log-interval 1 --output {output} {flags}"
        status, _, errors = finish(start("train", "digits", *words.split(), folder=tmp_path))
        assert status == 0, errors
        found.append(logged(tmp_path / output)[0]["values"])
    one, two = ({name: value for name, value in values.items() if name.startswith("train/layers/")} for values in found)
    assert one == pytest.approx(two, abs=1e-5)
    assert any("/load/" in name for name in one)
