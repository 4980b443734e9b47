"""Files that are no checkpoint, or no longer a whole one, are refused and named, and no code in them runs."""

import json
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch

from gatewright.train.checkpoint.format import FORMAT, load_checkpoint, save_checkpoint
from tests.train.runs import differences
from tests.train.test_checkpoint import small


def test_a_missing_checkpoint_is_named(folder):
    with pytest.raises(FileNotFoundError, match=r"There is no checkpoint at .*step-1"):
        load_checkpoint(folder / "step-1")


def refusal(path):
    with pytest.raises(ValueError, match=r"\w") as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_truncated_checkpoint_is_refused_wherever_it_ends(folder):
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


@pytest.mark.parametrize(
    "content",
    [b"", b"just some text\n", b"\x00" * 100, b"\xff" * 100, pickle.dumps({"weight": 1}), b"PK\x03\x04" + b"\x00" * 60],
    ids=["empty", "text", "zeros", "ones", "pickle", "zip"],
)
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    path = tmp_path / "step-00000001.safetensors"
    path.write_bytes(content)
    assert "is truncated or not a safetensors file" in refusal(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"state": "{}"}])
def test_safetensors_of_others_are_refused(tmp_path, metadata):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"weight": torch.ones(3)}, path, metadata)
    assert f"is not a Gatewright checkpoint: its format is {(metadata or {}).get('format')!r}" in refusal(path)


@pytest.mark.parametrize("metadata", [{}, {"state": "{}"}, {"state": "nonsense", "checksum": "00000000"}])
def test_a_checkpoint_of_ours_that_lacks_its_parts_is_refused(tmp_path, metadata):
    path = tmp_path / "step-00000001.safetensors"
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


def test_nothing_in_the_header_is_code(folder):
    path = save_checkpoint({"word": "__import__('os')", "weight": torch.ones(1)}, folder, 1)
    with safetensors.safe_open(path, "pt") as file:
        header = file.metadata()
    assert set(header) == {"format", "state", "checksum"}
    assert json.loads(header["state"])["dict"][0] == ["word", "__import__('os')"]
