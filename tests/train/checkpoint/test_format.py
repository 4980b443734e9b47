"""What is saved is loaded, whole or in parts; a failure leaves the older one; what is damaged or code is refused."""

import json
import math
import pickle
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from gatewright.parallel import Rows, whole_state
from gatewright.train.checkpoint.format import FORMAT, load_checkpoint, newest_checkpoint, save_checkpoint
from tests.train.runs import differences

# Writes checkpoints in a process that may write no file of more than 64 KiB: it says what happened, then is killed.
LIMITED = """
import resource, signal, sys, torch
from pathlib import Path
from gatewright.train.checkpoint.format import save_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
for answer in (signal.SIG_IGN, signal.SIG_DFL):
    signal.signal(signal.SIGXFSZ, answer)
    try:
        save_checkpoint({"weight": torch.ones(100_000)}, Path(sys.argv[1]), 2)
    except OSError as error:
        print(error, *sorted(path.name for path in Path(sys.argv[1]).iterdir()), flush=True)
"""


def small(step=1):
    return {"step": step, "weight": torch.full((10,), float(step))}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def refusal(path):
    with pytest.raises(ValueError, match=r"\w") as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_saved_is_loaded(folder):
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8)
    state = {
        "numbers": [0, -1, 2**60, 0.1, 1e-300, math.inf, -math.inf, math.nan],
        "words": ["", "Ünïcode", "a/b", 'quoted "', "line\nbreak"],
        "nothing": [None, {}, [], True, False],
        "numbered": {0: {"step": torch.tensor(3.0)}, 1: {"step": torch.tensor(4.0)}, -7: "minus", "1": torch.ones(1)},
        "a/b": torch.zeros(1),  # whose path is that of the next one
        "a": {"b": torch.ones(1)},
        "kinds": [torch.arange(-2, 4).abs().to(dtype) for dtype in dtypes],
        "mask": torch.tensor([True, False]),
        "shapes": [torch.tensor(7), torch.zeros(0, 3)],
        "not finite": torch.tensor([math.nan, math.inf, -0.0]),
        "random": torch.get_rng_state(),
    }
    assert differences(load_checkpoint(save_checkpoint(state, folder, 1)), state) == []
    path = save_checkpoint({"word": "__import__('os')", "betas": (0.9, (torch.ones(2), 1))}, folder, 1)
    assert differences(load_checkpoint(path)["betas"], [0.9, [torch.ones(2), 1]]) == []  # a tuple is a list
    with safetensors.safe_open(path, "pt") as file:
        header = file.metadata()
    assert set(header) == {"format", "state", "checksum"}
    assert json.loads(header["state"])["dict"][0] == ["word", "__import__('os')"]  # JSON alone, and no code


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


def test_only_the_newest_are_kept_and_the_same_step_is_written_over(folder):
    assert newest_checkpoint(folder) is None
    folder.mkdir()
    (folder / "step-00000009.safetensors.partial").write_bytes(b"half of one")
    assert newest_checkpoint(folder) is None
    for step in (1, 2, 3, 10, 100):
        save_checkpoint(small(step), folder, step)
    save_checkpoint(small(7), folder, 100)
    assert names(folder) == ["step-00000010.safetensors", "step-00000100.safetensors"]
    assert load_checkpoint(newest_checkpoint(folder))["step"] == 7
    save_checkpoint(small(101), folder, 101, keep=1)
    assert names(folder) == ["step-00000101.safetensors"]


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
    assert [name[-20:-12] for name in names(folder)] == ["00000003", "00000005"] * 3
    assert load_checkpoint(newest_checkpoint(folder))["step"] == 5


def test_a_part_that_does_not_belong_is_found_out(folder):
    path = in_parts(folder)
    other = folder / f"part-2-of-3-{path.name}"
    content = other.read_bytes()
    other.write_bytes(content[:-3])
    with pytest.raises(ValueError, match=f"{other} is truncated"):
        load_checkpoint(path)
    save_checkpoint(part(3), folder, 1, number=2, parts=3)
    assert refusal(path) == f"{path} is damaged: {other} is not the part that it was saved with."
    other.unlink()
    assert refusal(path) == f"{path} is not complete: its part {other} is missing."
    with pytest.raises(OSError, match=r"part-2-of-3-step-00000001.safetensors is not there.*one that all share"):
        save_checkpoint(small(), folder, 1, parts=3)
    other.write_bytes(content)
    load_checkpoint(path)


def test_a_process_that_cannot_write_on_or_is_killed_leaves_the_older_checkpoint(folder):
    good = save_checkpoint(small(), folder, 1)
    killed = subprocess.run([sys.executable, "-c", LIMITED, folder], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGXFSZ, killed.stderr
    assert f"step 2 could not be written to {folder}: File too large." in killed.stdout
    assert f"{good} is intact: go on from it with `resume=True`" in killed.stdout
    assert killed.stdout.split()[-1] == good.name  # nothing else lay there then
    complete, unfinished = names(folder)
    assert complete == good.name
    assert re.fullmatch(r"step-00000002\.safetensors\.\w+\.partial", unfinished)
    assert newest_checkpoint(folder) == good
    assert differences(load_checkpoint(good), small()) == []
    save_checkpoint(small(3), folder, 3)  # what was left does not stand in the way, and goes
    assert names(folder) == [good.name, "step-00000003.safetensors"]


def test_a_file_in_place_of_the_folder(folder):
    folder.write_text("in the way")
    with pytest.raises(OSError, match=r"could not be written to .*checkpoints: File exists.*there is no earlier one"):
        save_checkpoint(small(), folder, 1)


def test_a_missing_or_truncated_checkpoint_is_refused_wherever_it_ends(folder):
    with pytest.raises(FileNotFoundError, match=r"There is no checkpoint at .*step-1"):
        load_checkpoint(folder / "step-1")
    path = save_checkpoint({**small(), "more": torch.ones(3, 3)}, folder, 1)
    content = path.read_bytes()
    for length in range(0, len(content), 23):
        path.write_bytes(content[:length])
        assert "is truncated or not a safetensors file" in refusal(path)
    path.write_bytes(content + b"more")
    assert "is truncated or not a safetensors file" in refusal(path)


def test_a_changed_byte_is_found_out(folder):
    path = save_checkpoint(small(), folder, 1)
    content = path.read_bytes()
    damaged = 0
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            loaded = load_checkpoint(path)
        except ValueError as error:
            damaged += "damaged: its checksum is wrong" in str(error)
        else:
            assert differences(loaded, small()) == []  # a byte of padding
    assert damaged > 40  # all bytes of the tensor at least


def test_files_of_others_are_refused(tmp_path):
    path = tmp_path / "step-00000001.safetensors"
    for content in (b"", b"just some text\n", b"\x00" * 100, b"\xff" * 100, b"PK\x03\x04" + b"\x00" * 60):
        path.write_bytes(content)
        assert "is truncated or not a safetensors file" in refusal(path)
    for metadata in (None, {"format": "pt"}, {"state": "{}"}):
        safetensors.torch.save_file({"weight": torch.ones(3)}, path, metadata)
        assert f"is not a Gatewright checkpoint: its format is {(metadata or {}).get('format')!r}" in refusal(path)
    for metadata in ({}, {"state": "{}"}, {"state": "nonsense", "checksum": "00000000"}):
        safetensors.torch.save_file({"weight": torch.ones(3)}, path, {"format": FORMAT} | metadata)
        assert "is damaged: its checksum is wrong" in refusal(path)


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("save", [torch.save, lambda trap, path: path.write_bytes(pickle.dumps(trap))])
def test_a_pickle_is_never_loaded(tmp_path, save):
    mark, path = tmp_path / "executed", tmp_path / "step-00000001.safetensors"
    save({"weight": Trap(mark)}, path)
    refusal(path)
    assert not mark.exists()
    path = path.rename(tmp_path / "unsafe.pt")
    torch.load(path, weights_only=False) if save is torch.save else pickle.loads(path.read_bytes())
    assert mark.exists()  # the trap does work
