"""Checkpoints: what is saved is loaded, in one file or in parts; what fails in writing leaves the older one."""

import math
import os
import signal
import subprocess
import sys

import pytest
import torch

from gatewright.parallel import Rows, whole_state
from gatewright.train.checkpoint.format import load_checkpoint, newest_checkpoint, save_checkpoint
from tests.train.runs import differences

# Writes a checkpoint in a process that may write no file of more than 64 KiB, and says what happened.
LIMITED = """
import resource, signal, sys, torch
from pathlib import Path
from gatewright.train.checkpoint.format import save_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
signal.signal(signal.SIGXFSZ, getattr(signal, sys.argv[2]))
try:
    save_checkpoint({"weight": torch.ones(100_000)}, Path(sys.argv[1]), 2)
except OSError as error:
    print(error)
"""


def small(step=1):
    return {"step": step, "weight": torch.full((10,), float(step))}


@pytest.fixture
def small_disk(tmp_path):
    """A real disk of 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", place], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"mounting a small disk needs rights that this user has not: {mount.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_loaded(folder):
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8)
    state = {
        "numbers": [0, -1, 2**60, 0.1, 1e-300, math.inf, -math.inf, math.nan],
        "words": ["", "Ünïcode", "a/b", 'quoted "', "line\nbreak"],
        "nothing": None,
        "switches": [True, False],
        "empty": [{}, []],
        "numbered": {0: {"step": torch.tensor(3.0)}, 1: {"step": torch.tensor(4.0)}, -7: "minus"},
        "kinds": [torch.arange(-2, 4).abs().to(dtype) for dtype in dtypes],
        "mask": torch.tensor([True, False]),
        "zero-dimensional": torch.tensor(7),
        "no elements": torch.zeros(0, 3),
        "not finite": torch.tensor([math.nan, math.inf, -0.0]),
        "random": torch.get_rng_state(),
    }
    assert differences(load_checkpoint(save_checkpoint(state, folder, 1)), state) == []


def test_a_tuple_comes_back_as_a_list(folder):
    loaded = load_checkpoint(save_checkpoint({"betas": (0.9, (torch.ones(2), 1))}, folder, 1))
    assert differences(loaded, {"betas": [0.9, [torch.ones(2), 1]]}) == []


def test_tensors_of_any_layout_keep_their_values(folder):
    base = torch.randn(2, 3, 4, 5)
    state = {
        "channels last": base.contiguous(memory_format=torch.channels_last),
        "transposed": base.movedim(1, 3),
        "strided": base[:, ::2, 1:],
        "expanded": torch.ones(1, 3).expand(4, 3),
        "shared": base,
        "again": base,
        "trained": torch.nn.Parameter(base),
    }
    loaded = load_checkpoint(save_checkpoint(state, folder, 1))
    assert all(torch.equal(loaded[name], value) for name, value in state.items())
    loaded["shared"].zero_()
    assert loaded["again"].any()


def test_keys_that_join_to_one_path_stay_apart(folder):
    state = {"a/b": torch.zeros(1), "a": {"b": torch.ones(1)}, 1: torch.full((1,), 2.0), "1": torch.full((1,), 3.0)}
    assert differences(load_checkpoint(save_checkpoint(state, folder, 1)), state) == []


def test_only_the_newest_are_kept(folder):
    for step in (1, 2, 3, 10, 100):
        save_checkpoint(small(step), folder, step)
    assert names(folder) == ["step-00000010.safetensors", "step-00000100.safetensors"]
    assert load_checkpoint(newest_checkpoint(folder))["step"] == 100
    save_checkpoint(small(101), folder, 101, keep=1)
    assert names(folder) == ["step-00000101.safetensors"]


def test_the_same_step_is_written_over(folder):
    save_checkpoint(small(1), folder, 5)
    save_checkpoint(small(2), folder, 5)
    assert load_checkpoint(newest_checkpoint(folder))["step"] == 2


def in_parts(folder, step=1, parts=3):
    """A state of which every part has an expert of its own and rows of one tensor."""
    for number in range(1, parts):
        save_checkpoint(part(number), folder, step, number=number, parts=parts)
    return save_checkpoint({"step": step, **part(0)}, folder, step, parts=parts)


def part(number):
    rows = Rows(torch.full((number, 2), float(number)))
    model = {f"expert.{number}": torch.ones(2) * number, "stacked": rows, "count": torch.tensor(7)}
    return {"engine": {"model": model, "optimizers": [{f"expert.{number}|momentum": torch.ones(2) / 2**number}]}}


def test_parts_are_one_state(folder):
    loaded = load_checkpoint(in_parts(folder))
    model, (optimizer,) = loaded["engine"]["model"], loaded["engine"]["optimizers"]
    assert list(model) == ["expert.0", "stacked", "count", "expert.1", "expert.2"]
    assert [float(model[f"expert.{number}"][0]) for number in range(3)] == [0, 1, 2]
    assert [float(values[0]) for values in optimizer.values()] == [1, 1 / 2, 1 / 4]
    assert model["stacked"][0:3][:, 0].tolist() == [1, 2, 2]
    assert model["stacked"][1:2].tolist() == [[2, 2]]
    assert whole_state(model)["stacked"].shape == (3, 2)


def test_parts_go_with_their_checkpoint(folder):
    for step in (1, 2, 3):
        in_parts(folder, step)
    save_checkpoint(part(1), folder, 4, number=1, parts=2)  # and then its run was killed
    in_parts(folder, 5)
    steps = [name[-20:-12] for name in names(folder)]
    assert sorted(set(steps)) == ["00000003", "00000005"]
    assert len(steps) == 6
    assert load_checkpoint(newest_checkpoint(folder))["step"] == 5


@pytest.mark.parametrize("number", [1, 2])
def test_a_part_that_does_not_belong_is_found_out(folder, number):
    path = in_parts(folder)
    other = folder / f"part-{number}-of-3-{path.name}"
    content = other.read_bytes()
    other.write_bytes(content[:-3])
    assert f"{other} is truncated" in str(refused(path))
    save_checkpoint(part(number + 1), folder, 1, number=number, parts=3)
    assert str(refused(path)) == f"{path} is damaged: {other} is not the part that it was saved with."
    other.unlink()
    assert str(refused(path)) == f"{path} is not complete: its part {other} is missing."
    other.write_bytes(content)
    load_checkpoint(path)


def refused(path):
    with pytest.raises(ValueError, match=r"\w") as caught:
        load_checkpoint(path)
    return caught.value


def test_a_part_that_the_first_process_cannot_see(folder):
    with pytest.raises(OSError, match=r"part-1-of-2-step-00000001.safetensors is not there.*one that all share"):
        save_checkpoint(small(), folder, 1, parts=2)
    assert names(folder) == []


def test_there_is_no_newest_of_none(folder):
    assert newest_checkpoint(folder) is None
    folder.mkdir()
    (folder / "step-00000009.safetensors.partial").write_bytes(b"half of one")
    assert newest_checkpoint(folder) is None


def test_a_process_killed_in_the_middle_of_writing_leaves_no_checkpoint(folder):
    good = save_checkpoint(small(), folder, 1)
    killed = subprocess.run([sys.executable, "-c", LIMITED, folder, "SIG_DFL"], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGXFSZ, killed.stderr
    assert names(folder) == [good.name, "step-00000002.safetensors.partial"]
    assert newest_checkpoint(folder) == good
    assert load_checkpoint(good)["step"] == 1
    save_checkpoint(small(3), folder, 3)  # what was left does not stand in the way, and goes
    assert load_checkpoint(newest_checkpoint(folder))["step"] == 3
    assert names(folder) == [good.name, "step-00000003.safetensors"]


def test_a_file_that_may_not_grow_leaves_the_older_checkpoint(folder):
    good = save_checkpoint(small(), folder, 1)
    refused = subprocess.run([sys.executable, "-c", LIMITED, folder, "SIG_IGN"], capture_output=True, text=True)
    assert f"step 2 could not be written to {folder}: File too large." in refused.stdout, refused.stderr
    assert f"{good} is intact: go on from it with --resume" in refused.stdout
    assert names(folder) == [good.name]


def test_a_full_disk_leaves_the_older_checkpoint(small_disk):
    folder = small_disk / "checkpoints"
    good = save_checkpoint(small(), folder, 1)
    with pytest.raises(
        OSError, match=r"step 2 could not be written to .*: No space left on device\. Make room"
    ) as full:
        save_checkpoint({"weight": torch.ones(100_000)}, folder, 2)
    assert f"{good} is intact: go on from it with --resume" in str(full.value)
    assert names(folder) == [good.name]
    assert differences(load_checkpoint(good), small()) == []
    save_checkpoint(small(2), folder, 2)  # and the disk has room again


def test_the_first_checkpoint_on_a_full_disk(small_disk):
    with pytest.raises(OSError, match="there is no earlier one"):
        save_checkpoint({"weight": torch.ones(100_000)}, small_disk / "checkpoints", 1)


def test_a_file_in_place_of_the_folder(folder):
    folder.write_text("in the way")
    with pytest.raises(OSError, match=r"could not be written to .*checkpoints: File exists.*there is no earlier one"):
        save_checkpoint(small(), folder, 1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(folder):
    good = save_checkpoint(small(), folder, 1)
    folder.chmod(0o500)
    with pytest.raises(OSError, match="Permission denied"):
        save_checkpoint(small(2), folder, 2)
    folder.chmod(0o700)
    assert load_checkpoint(good)["step"] == 1
