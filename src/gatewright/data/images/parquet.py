"""Images in parquet files with the schema of the Hugging Face hub."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gatewright.data.images.sources import EncodedImage, ImageSource, refuse_one_class
from gatewright.data.images.split import with_test_images
from gatewright.data.parquet import readable
from gatewright.data.sources import SplitFiles
from gatewright.extras import require

# Of several class labels one of these is learnt; CIFAR-100 has fine_label and coarse_label.
LABEL_NAMES = ("label", "fine_label")


class _Columns(NamedTuple):
    image: str
    label: str
    class_names: tuple[str, ...]


def read_parquet(files: SplitFiles) -> ImageSource:
    """Read the encoded images and the labels of parquet files.

    See `with_test_images` for what happens without a test split. The files are read with pyarrow, on which `datasets`
    stands: `Dataset.from_parquet` would first write a second copy of them to a cache of its own.

    Raises:
        ImportError: If datasets is not installed.
        ValueError: If a file is damaged, has other columns or classes than it should, or has a row that is no image
            with a label; the message names the file and the column or row. Or a split has no rows, or one class alone.
    """
    columns = {file: _find_columns(file) for file in files.files}
    first = files.train[0]
    for file, found in columns.items():
        if found.class_names != columns[first].class_names:
            raise ValueError(
                f"every file must have the same classes in the same order; {file} has {_brief(found.class_names)} and "
                f"{first} has {_brief(columns[first].class_names)}: keep files of one data set in the folder"
            )
    train, holdout, test = (_read_split(split, columns) for split in (files.train, files.holdout, files.test))
    source = ImageSource(train, holdout, test, columns[first].class_names)
    refuse_one_class(source, first.parent)
    return with_test_images(source)


def _read_split(files: Sequence[Path], columns: Mapping[Path, _Columns]) -> list[EncodedImage]:
    rows = [row for file in files for row in _rows(file, columns[file])]
    if files and not rows:
        names = ", ".join(map(str, files))
        raise ValueError(f"a split has 1 image or more; {names} has 0 rows: add images, or remove the split's files")
    return rows


def _find_columns(file: Path) -> _Columns:
    """Read which columns hold images and labels from the description that `datasets` leaves in the file."""
    datasets, parquet = require("datasets", "train"), require("pyarrow.parquet", "train")
    with readable(file):
        schema = parquet.read_schema(file)
    _check_description(file, schema.metadata or {})
    features = datasets.Features.from_arrow_schema(schema)
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if len(labels) > 1:
        labels = [name for name in LABEL_NAMES if name in labels][:1]
    if len(images) != 1 or len(labels) != 1:
        columns = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())
        raise ValueError(
            f"{file} must have one Image column and one ClassLabel column (of several, one named "
            f"{' or '.join(LABEL_NAMES)}); it has {columns}: write it with the datasets library and these features"
        )
    return _Columns(images[0], labels[0], tuple(features[labels[0]].names))


def _check_description(file: Path, metadata: Mapping[bytes, bytes]) -> None:
    """Refuse a description of the columns that the installed `datasets` cannot read, by the name of the column."""
    datasets = require("datasets", "train")
    try:
        described = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features") or {}
    except ValueError as error:
        raise ValueError(
            f"{file}: the description of its columns is no JSON ({error}): write the file again"
        ) from error
    for column, feature in described.items():
        try:
            datasets.Features.from_dict({column: feature})
        except Exception as error:  # of whichever kind the feature's class raises
            reason = f"datasets {datasets.__version__} cannot read its feature type {_brief(feature)}"
            raise ValueError(
                f"{file}, column {column}: {reason}: install a newer datasets, or write the file without the column"
            ) from error


def _rows(file: Path, columns: _Columns) -> Iterator[EncodedImage]:
    with readable(file):
        table = require("pyarrow.parquet", "train").ParquetFile(file).read([columns.image, columns.label])
    rows = zip(table[columns.image].to_pylist(), table[columns.label].to_pylist(), strict=True)
    for row, (image, label) in enumerate(rows):
        yield _encoded(f"{file}, row {row}", image, label, len(columns.class_names))


def _encoded(place: str, image: Any, label: Any, num_classes: int) -> EncodedImage:
    if not isinstance(label, int) or not 0 <= label < num_classes:
        rule = f"labels must lie between 0 and {num_classes - 1}, as there are {num_classes} classes"
        raise ValueError(f"{place}: {rule}; got {label}: correct the label or remove the row")
    data = image.get("bytes") if isinstance(image, dict) else None
    if not isinstance(data, bytes):
        raise ValueError(f"{place}: the image must be stored as bytes; got {_brief(image)}: embed it or remove the row")
    return EncodedImage(place, data, label)


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
