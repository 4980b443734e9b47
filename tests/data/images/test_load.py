from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pyarrow import parquet

from gatewright.data import DataConfig, channel_statistics, load_images
from tests.data.samples import pixels, rows, write_class_folders, write_hub_folder, write_parquet

CIFAR10 = Path(__file__).parents[3] / "shared" / "data" / "cifar10"


def hub_config(tmp_path, **settings):
    return DataConfig(name="cifar10", path=str(tmp_path / "data"), cache=str(tmp_path / "cache"), **settings)


def cache_files(tmp_path):
    return sorted((tmp_path / "cache").glob("*.safetensors"))


def test_a_hub_folder_is_decoded_split_and_cached(tmp_path):
    write_hub_folder(tmp_path / "data")
    config = hub_config(tmp_path)
    first, second = load_images(config), load_images(config)
    assert [len(part) for part in (first.train, first.holdout, first.test)] == [18, 2, 6]
    assert first.holdout.labels.sort().values.tolist() == [0, 1]
    assert torch.equal(first.test.images[2], torch.from_numpy(pixels(102)).movedim(2, 0))
    for part in ("train", "holdout", "test"):
        assert torch.equal(getattr(first, part).images, getattr(second, part).images)
        assert torch.equal(getattr(first, part).labels, getattr(second, part).labels)
    assert len(cache_files(tmp_path)) == 1


def test_a_changed_file_or_size_is_decoded_anew(tmp_path):
    write_hub_folder(tmp_path / "data")
    load_images(hub_config(tmp_path))
    assert load_images(hub_config(tmp_path, image_size=4)).train.images.shape == (18, 3, 4, 4)
    write_parquet(tmp_path / "data" / "test.parquet", rows(range(9)))
    assert len(load_images(hub_config(tmp_path)).test) == 9
    assert len(cache_files(tmp_path)) == 3


def test_a_validation_split_is_held_out_in_place_of_training_images(tmp_path, capsys):
    write_class_folders(tmp_path / "data", splits=("train", "val", "test"))
    for holdout in (0.34, 0.0):
        splits = load_images(replace(hub_config(tmp_path, holdout=holdout), name="folder"))
        assert [len(part) for part in (splits.train, splits.holdout, splits.test)] == [6, 6, 6]
        assert torch.equal(splits.holdout.images[4], torch.from_numpy(pixels(111)).movedim(2, 0))
    assert capsys.readouterr().err == ""


def test_what_a_source_notes_is_said_once(tmp_path, capsys):
    write_class_folders(tmp_path / "data", splits=("train",), per_class=5)
    (tmp_path / "data" / "train" / "cat" / "._0.png").touch()
    config = replace(hub_config(tmp_path), name="folder")
    assert [len(load_images(config).test) for _ in range(2)] == [2, 2]
    assert capsys.readouterr().err == (
        f"warning: {tmp_path}/data: left out what is no image of a class: 1 hidden (such as train/cat/._0.png).\n"
        "warning: there is no test split, so 2 of the 10 images, a fifth of each class, are the test set.\n"
    )


def test_a_broken_image_in_a_good_file_is_named(tmp_path):
    write_hub_folder(tmp_path / "data")
    columns = rows(range(4))
    columns["img"][2]["bytes"] = columns["img"][2]["bytes"][:50]
    write_parquet(tmp_path / "data" / "train.parquet", columns)
    with pytest.raises(ValueError, match=r"train.parquet, row 2: cannot be decoded as an image"):
        load_images(hub_config(tmp_path))
    write_class_folders(tmp_path / "folder")
    (tmp_path / "folder" / "train" / "dog" / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"train/dog/1.png: cannot be decoded as an image"):
        load_images(DataConfig(name="folder", path=str(tmp_path / "folder"), cache=str(tmp_path / "cache")))
    assert not cache_files(tmp_path)


@pytest.mark.skipif(not CIFAR10.is_dir(), reason=f"no CIFAR-10 in {CIFAR10}")
def test_cifar10_is_decoded(tmp_path):
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):  # a few rows of the real files: all 60,000 images take ten seconds and more
        rows = parquet.read_table(CIFAR10 / f"{split}.parquet")[:2000]
        parquet.write_table(rows, tmp_path / "data" / f"{split}.parquet")
    splits = load_images(hub_config(tmp_path))
    assert splits.train.images.shape == (1_800, 3, 32, 32)
    mean, deviation = channel_statistics(splits.test)
    torch.testing.assert_close(mean, torch.tensor([0.4942, 0.4851, 0.4504]), atol=0.01, rtol=0)
    torch.testing.assert_close(deviation, torch.tensor([0.2467, 0.2429, 0.2616]), atol=0.01, rtol=0)


def test_a_turned_data_set_has_each_image_turned_by_its_own_quarter_turns_always(tmp_path):
    write_hub_folder(tmp_path / "data")
    upright, turned, again = (
        load_images(hub_config(tmp_path, image_size=4, rotate=rotate)) for rotate in (False, True, True)
    )
    assert len(cache_files(tmp_path)) == 1
    for part in ("train", "holdout", "test"):
        before, after = getattr(upright, part), getattr(turned, part)
        assert torch.equal(before.labels, after.labels)
        assert torch.equal(after.images, getattr(again, part).images)
        for one, other in zip(before.images, after.images, strict=True):
            assert any(torch.equal(one.rot90(turns, (-2, -1)), other) for turns in range(4))
    assert not torch.equal(upright.train.images, turned.train.images)
