import sysconfig

import datasets
import pytest

from gatewright.data import TextConfig, load_text
from tests.data.samples import write_parquet

SPLITS = ("train", "holdout", "test")


def documents(text):
    ends = [*text.starts.tolist(), len(text)][1:]
    return [bytes(text.content[start:end].tolist()) for start, end in zip(text.starts.tolist(), ends, strict=True)]


def load(tmp_path, **settings):
    return load_text(TextConfig(cache=str(tmp_path / "cache"), **settings))


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Stand-in for the folder of a standard library, with what does not belong to it."""
    folder = tmp_path / "lib"
    for name in (*(f"m{number:03}.py" for number in range(250)), "site-packages/x.py", "json/__init__.py", "re.pyc"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"name = {name!r}\n")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(folder)})
    return folder


def test_of_the_standard_library_every_fiftieth_file_is_the_test_set(library, tmp_path, capsys):
    splits = load(tmp_path, holdout=0.02)
    assert [len(part.starts) for part in (splits.train, splits.holdout, splits.test)] == [240, 5, 6]
    names = [line.split(b"'")[1] for part in SPLITS for line in documents(getattr(splits, part))]
    assert len(set(names)) == 251
    assert b"json/__init__.py" in names
    assert not {b"site-packages/x.py", b"re.pyc"} & set(names)
    assert [line.split(b"'")[1] for line in documents(splits.test)][:3] == [b"json/__init__.py", b"m049.py", b"m099.py"]
    assert capsys.readouterr().err == ""


def test_the_second_time_nothing_is_read_and_a_changed_file_is_read_anew(library, tmp_path):
    first = load(tmp_path)
    (cache,) = (tmp_path / "cache").glob("*.safetensors")
    written = cache.stat().st_mtime_ns
    again = load(tmp_path)
    assert cache.stat().st_mtime_ns == written
    assert all(getattr(first, part).digest == getattr(again, part).digest for part in SPLITS)
    (library / "m001.py").write_text("changed = True\n")
    assert load(tmp_path).train.digest != first.train.digest


def test_a_python_without_its_sources_says_what_else_to_train_on(library, tmp_path):
    for file in library.rglob("*.py"):
        file.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"lib has none. Install Python with its sources, or set name to 'text'"
    ):
        load(tmp_path)


def test_a_single_file_is_cut_at_the_ends_of_lines(tmp_path, capsys):
    lines = [f"line {number}\n".encode() for number in range(2000)]
    (tmp_path / "book.txt").write_bytes(b"".join(lines))
    splits = load(tmp_path, name="text", path=str(tmp_path / "book.txt"))
    pieces = [piece for part in SPLITS for piece in documents(getattr(splits, part))]
    assert sorted(b"".join(pieces).splitlines(keepends=True)) == sorted(lines)
    assert all(piece.endswith(b"\n") for piece in pieces)
    assert min(len(splits.holdout.starts), len(splits.test.starts)) >= 1
    assert "every 50th" in capsys.readouterr().err


def test_a_folder_may_be_sorted_by_split_and_files_without_text_are_left_out(tmp_path, capsys):
    for name, content in {
        "train/a.txt": b"one",
        "train/b.bin": b"\0\1",
        "val/c.md": b"two",
        "test/d": b"three",
    }.items():
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(content)
    splits = load(tmp_path, name="text", path=str(tmp_path / "data"))
    assert [documents(getattr(splits, part)) for part in SPLITS] == [[b"one"], [b"two"], [b"three"]]
    assert "left out 1 of 4 files, which hold no text" in capsys.readouterr().err


def test_a_hub_data_set_is_read_from_its_column_of_text(tmp_path):
    features = {"text": datasets.Value("string"), "label": datasets.Value("int64")}
    for split, texts in {"train": ["é one", None, "two"], "test": ["three"]}.items():
        columns = {"text": texts, "label": [0] * len(texts)}
        write_parquet(tmp_path / "data" / f"{split}-0.parquet", columns, features)
    splits = load(tmp_path, name="owner/words", path=str(tmp_path / "data"), holdout=0.0)
    assert [documents(getattr(splits, part)) for part in SPLITS] == [["é one".encode(), b"two"], [], [b"three"]]


def test_of_several_columns_of_strings_one_is_chosen(tmp_path):
    features = {"title": datasets.Value("string"), "body": datasets.Value("string")}
    write_parquet(tmp_path / "data" / "train.parquet", {"title": ["a"], "body": ["bb"]}, features)
    write_parquet(tmp_path / "data" / "test.parquet", {"title": ["c"], "body": ["dd"]}, features)
    settings = {"name": "owner/words", "path": str(tmp_path / "data")}
    for column in (None, "text"):
        with pytest.raises(ValueError, match=r"its columns of strings are title, body\. Set column to one of them"):
            load(tmp_path, column=column, **settings)
    assert documents(load(tmp_path, column="body", **settings).test) == [b"dd"]


def test_what_holds_no_text_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "short.txt").write_text("x")
    (tmp_path / "image.png").write_bytes(b"\0")
    for path, error, message in (
        ("gone", FileNotFoundError, "there is no"),
        ("empty", FileNotFoundError, "has none: add some"),
        ("short.txt", ValueError, "got 1 bytes of it"),
        ("image.png", ValueError, "hold none"),
    ):
        with pytest.raises(error, match=message):
            load(tmp_path, name="text", path=str(tmp_path / path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "pyton"}, "got 'pyton'; did you mean 'python'"),
        ({"name": "text"}, "`data.path` names the file or folder of `data.name=text`"),
        ({"column": "text"}, "`data.column` is for a Hugging Face data set"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        TextConfig(**settings)
