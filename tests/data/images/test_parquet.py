import json

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from gatewright.data.images.parquet import read_parquet
from gatewright.data.parquet import find_parquet_files
from tests.data.samples import FEATURES, rows, write_hub_folder, write_parquet


def replace(file, column, values):
    table = parquet.read_table(file)
    place = table.schema.get_field_index(column)
    values = pyarrow.array(values, table.schema.field(column).type)
    parquet.write_table(table.set_column(place, table.schema.field(column), values), file)


@pytest.mark.parametrize("name", ["validation", "dev"])
def test_validation_files_are_held_out(tmp_path, name):
    write_hub_folder(tmp_path)
    write_parquet(tmp_path / f"{name}-0.parquet", rows(range(200, 204)))
    source = read_parquet(find_parquet_files(tmp_path))
    assert [len(part) for part in (source.train, source.holdout, source.test)] == [20, 4, 6]
    assert source.notes == ()


def test_without_test_files_some_images_are_the_test_set_and_it_is_said(tmp_path):
    write_hub_folder(tmp_path)
    (tmp_path / "test.parquet").rename(tmp_path / "validation.parquet")
    source = read_parquet(find_parquet_files(tmp_path))
    assert [len(part) for part in (source.train, source.holdout, source.test)] == [20, 0, 6]
    assert source.notes == ("there is no test split, so the 6 images of the validation split are the test set",)
    (tmp_path / "validation.parquet").unlink()
    source = read_parquet(find_parquet_files(tmp_path))
    assert [len(part) for part in (source.train, source.holdout, source.test)] == [16, 0, 4]
    assert sorted(row.label for row in source.test) == [0, 0, 1, 1]
    assert "so 4 of the 20 images, a fifth of each class, are the test set" in source.notes[0]


def test_rows_are_read_in_order_from_all_files(tmp_path):
    first, second, test = rows(range(3)), rows(range(3, 5)), rows([9], [0])
    for name, columns in (("train-0", first), ("train-1", second), ("test-0", test)):
        write_parquet(tmp_path / f"{name}.parquet", columns)
    source = read_parquet(find_parquet_files(tmp_path))
    assert source.class_names == ("cat", "dog")
    assert [row.label for row in source.train] == [0, 1, 0, 1, 0]
    assert [row.data for row in source.train] == [image["bytes"] for image in first["img"] + second["img"]]
    assert source.train[4].place == f"{tmp_path / 'train-1.parquet'}, row 1"
    assert [row.label for row in source.test] == [0]


def test_of_several_labels_the_fine_one_is_learnt(tmp_path):
    features = {
        "img": datasets.Image(),
        "coarse_label": datasets.ClassLabel(names=["animal"]),
        "fine_label": datasets.ClassLabel(names=["cat", "dog"]),
    }
    columns = {"img": rows([0, 1])["img"], "coarse_label": [0, 0], "fine_label": [1, 0]}
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", columns, features)
    source = read_parquet(find_parquet_files(tmp_path))
    assert source.class_names == ("cat", "dog")
    assert [row.label for row in source.train] == [1, 0]


@pytest.mark.parametrize(
    ("features", "columns"),
    [
        ({"img": datasets.Image()}, r"img \(Image\)"),
        (
            {"img": datasets.Image(), "a": FEATURES["label"], "b": FEATURES["label"]},
            r"img \(Image\), a \(ClassLabel\), b \(ClassLabel\)",
        ),
    ],
)
def test_other_columns_are_listed(tmp_path, features, columns):
    write_hub_folder(tmp_path)
    write_parquet(tmp_path / "test.parquet", {name: pyarrow.array([], None) for name in features}, features)
    with pytest.raises(ValueError, match=f"test.parquet must have one Image column .* it has {columns}: write it"):
        read_parquet(find_parquet_files(tmp_path))


@pytest.mark.parametrize("column", ["img", "extra"])
def test_a_feature_type_that_datasets_does_not_know_is_named(tmp_path, column):
    file = write_hub_folder(tmp_path) / "train.parquet"
    table = parquet.read_table(file)
    description = json.loads(table.schema.metadata[b"huggingface"])
    description["info"]["features"][column] = {"_type": "Hologram"}
    parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(description)}), file)
    with pytest.raises(ValueError, match=rf"train.parquet, column {column}: datasets .*'Hologram'.*: install a newer"):
        read_parquet(find_parquet_files(tmp_path))
    parquet.write_table(table.replace_schema_metadata({"huggingface": "{no"}), file)
    with pytest.raises(ValueError, match=r"train.parquet: the description of its columns is no JSON"):
        read_parquet(find_parquet_files(tmp_path))


def test_a_split_without_rows_is_named(tmp_path):
    write_parquet(write_hub_folder(tmp_path) / "validation.parquet", rows([]))
    with pytest.raises(ValueError, match=r"1 image or more; .*validation.parquet has 0 rows: add images, or remove"):
        read_parquet(find_parquet_files(tmp_path))


def test_classes_must_agree(tmp_path):
    write_hub_folder(tmp_path)
    features = FEATURES | {"label": datasets.ClassLabel(names=["dog", "cat"])}
    write_parquet(tmp_path / "test.parquet", rows([0]), features)
    with pytest.raises(ValueError, match=r"test.parquet has \('dog', 'cat'\) and .*train.parquet has \('cat', 'dog'\)"):
        read_parquet(find_parquet_files(tmp_path))


@pytest.mark.parametrize("size", [0, -1])
def test_truncated_file(tmp_path, size):
    file = write_hub_folder(tmp_path) / "test.parquet"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"test.parquet is not a whole parquet file .*: copy or download it again"):
        read_parquet(find_parquet_files(tmp_path))


@pytest.mark.parametrize("label", [2, None])
def test_label_out_of_range(tmp_path, label):
    file = write_hub_folder(tmp_path, num_train=4) / "train.parquet"
    replace(file, "label", [0, 1, label, 0])
    with pytest.raises(ValueError, match=f"train.parquet, row 2: labels must lie between 0 and 1, .* got {label}:"):
        read_parquet(find_parquet_files(tmp_path))


@pytest.mark.parametrize("image", [None, {"bytes": None, "path": "elsewhere.png"}])
def test_image_not_in_the_file(tmp_path, image):
    write_hub_folder(tmp_path)
    columns = rows(range(2))
    write_parquet(tmp_path / "test.parquet", columns | {"img": [columns["img"][0], image]})
    with pytest.raises(ValueError, match=f"test.parquet, row 1: the image must be stored as bytes; got {image}:"):
        read_parquet(find_parquet_files(tmp_path))
