import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gatewright.data import ImageSet, ImageSplits
from gatewright.data.cache import cache_folder, cache_name, cached
from tests.data.samples import write_hub_folder


def splits(level=1):
    images = torch.full((4, 3, 2, 2), level, dtype=torch.uint8)
    train = ImageSet(images, torch.arange(4), tuple("abcd"))
    return ImageSplits(train, train.select(torch.tensor([1, 2])), train.select(torch.tensor([3])))


def unexpected():
    raise AssertionError("prepared again")


def level_of(prepared):
    parts = (prepared.train, prepared.holdout, prepared.test)
    assert [part.labels.tolist() for part in parts] == [[0, 1, 2, 3], [1, 2], [3]]
    assert {part.class_names for part in parts} == {tuple("abcd")}
    return int(prepared.train.images[0, 0, 0, 0])


def test_the_folder_is_chosen_or_set_or_the_default(monkeypatch):
    monkeypatch.setenv("GATEWRIGHT_CACHE", "~/set")
    assert cache_folder("chosen") == Path("chosen")
    assert cache_folder(None) == Path.home() / "set"
    monkeypatch.delenv("GATEWRIGHT_CACHE")
    assert cache_folder(None) == Path.home() / ".cache" / "gatewright"


def test_the_name_follows_what_is_read(tmp_path):
    file = tmp_path / "train.parquet"
    file.write_text("one")
    names = [cache_name("cifar10", None, [file]), cache_name("cifar10", 32, [file]), cache_name("a/b", None, [file])]
    os.utime(file, (0, 0))
    names.append(cache_name("cifar10", None, [file]))
    file.write_text("three")
    os.utime(file, (0, 0))
    names += [cache_name("cifar10", None, [file]), cache_name("cifar10", None, [])]
    assert len(set(names)) == len(names)
    assert names[-2] == cache_name("cifar10", None, [file])
    assert names[2].startswith("a--b-")


def test_what_was_prepared_is_read_back(tmp_path):
    file = tmp_path / "below" / "set.safetensors"
    assert level_of(cached(ImageSplits, file, splits)) == 1
    assert level_of(cached(ImageSplits, file, unexpected)) == 1
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("size", [0, 100, -1])
def test_a_corrupt_file_is_rebuilt(tmp_path, size):
    file = tmp_path / "set.safetensors"
    cached(ImageSplits, file, splits)
    file.write_bytes(file.read_bytes()[:size])
    assert level_of(cached(ImageSplits, file, lambda: splits(2))) == 2
    assert level_of(cached(ImageSplits, file, unexpected)) == 2


def test_an_error_while_preparing_leaves_nothing_and_frees_the_lock(tmp_path):
    file = tmp_path / "set.safetensors"
    with pytest.raises(AssertionError, match="prepared again"):
        cached(ImageSplits, file, unexpected)
    assert level_of(cached(ImageSplits, file, splits)) == 1


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"can be written to; .*file cannot .*: set data.cache or GATEWRIGHT_CACHE"):
        cached(ImageSplits, tmp_path / "file" / "set.safetensors", splits)


WORKER = """
import logging, sys
from gatewright.data import DataConfig, load_images
logging.basicConfig(level=logging.INFO)
print("ready", flush=True)
sys.stdin.readline()
images = load_images(DataConfig(name="cifar10", path=sys.argv[1], cache=sys.argv[2]))
print(int(images.train.images.long().sum()), len(images.holdout), len(images.test))
"""


def test_of_many_processes_one_decodes_and_all_read(tmp_path):
    write_hub_folder(tmp_path / "data", num_train=300, num_test=50)
    command = [sys.executable, "-c", WORKER, str(tmp_path / "data"), str(tmp_path / "cache")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    workers = [subprocess.Popen(command, text=True, **pipes) for _ in range(2)]
    assert [worker.stdout.readline() for worker in workers] == ["ready\n"] * 2
    for worker in workers:  # all have imported everything: they start on the data together
        worker.stdin.write("go\n")
        worker.stdin.flush()
    outputs, errors = zip(*(worker.communicate(timeout=300) for worker in workers), strict=True)
    assert [worker.returncode for worker in workers] == [0] * 2, errors
    assert "".join(errors).count("decoding cifar10") == 1
    assert len(set(outputs)) == 1
    assert outputs[0].split()[1:] == ["30", "50"]
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 1
