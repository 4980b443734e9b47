import pytest

from gatewright.data.parquet import find_parquet_files
from gatewright.data.sources import SplitFiles


@pytest.mark.parametrize(
    ("train", "test"),
    [
        (["train.parquet"], ["test.parquet"]),
        (["plain_text/train-00000-of-00001.parquet"], ["plain_text/test-00000-of-00001.parquet"]),
        (["data/train-0.parquet", "data/train-1.parquet"], ["data/test-0.parquet"]),
        (["default/train/0000.parquet", "default/train/0001.parquet"], ["default/test/0000.parquet"]),
        (["Train1.parquet"], ["Testing_1.parquet"]),
    ],
)
def test_files_are_found_as_people_and_the_hub_name_them(tmp_path, train, test):
    for name in [*train, *test, "other/trainer.parquet", "tests.parquet", "README.md"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = find_parquet_files(tmp_path)
    assert found == SplitFiles([tmp_path / name for name in train], [], [tmp_path / name for name in test])


def test_a_split_with_two_names(tmp_path):
    for name in ("train.parquet", "val.parquet", "validation.parquet"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"files of one split have one name; .* has val, validation: keep or rename"):
        find_parquet_files(tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], r"needs train\*.parquet, in itself or a folder below; it has none"),
        (["test.parquet", "all.parquet"], r"needs train\*.parquet, .* it has all.parquet, test.parquet"),
    ],
)
def test_missing_files(tmp_path, names, message):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(FileNotFoundError, match=message):
        find_parquet_files(tmp_path)


def test_several_configurations(tmp_path):
    for name in ("full/train.parquet", "small/train.parquet", "full/test.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"train files in several folders .*full, .*small.*: set data.path to one"):
        find_parquet_files(tmp_path)
