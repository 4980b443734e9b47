import pytest

from gatewright.data.images.folder import find_images, read_folder
from tests.data.samples import pixels, png, write_class_folders


def counts(source):
    return len(source.train), len(source.holdout), len(source.test)


@pytest.mark.parametrize(
    ("train", "holdout", "test"),
    [("train", "val", "test"), ("Train", "Validation", "TEST"), ("training", "valid", "testing")],
)
def test_images_are_labelled_by_folder(tmp_path, train, holdout, test):
    write_class_folders(tmp_path, splits=(train, holdout, test), classes=("dog", "ant", "cat"), per_class=2)
    source = read_folder(tmp_path)
    assert source.class_names == ("ant", "cat", "dog")
    for split, images in ((train, source.train), (holdout, source.holdout), (test, source.test)):
        assert [(image.data, image.label) for image in images] == [
            (tmp_path / split / name / f"{number}.png", label)
            for label, name in enumerate(("ant", "cat", "dog"))
            for number in range(2)
        ]
    assert source.notes == ()


def test_without_a_test_split_the_validation_split_is_the_test_set(tmp_path):
    write_class_folders(tmp_path, splits=("train", "val"))
    source = read_folder(tmp_path)
    assert counts(source) == (6, 0, 6)
    assert {image.data.parts[-3] for image in source.test} == {"val"}
    assert source.notes == ("there is no test split, so the 6 images of the validation split are the test set",)


@pytest.mark.parametrize("split", [".", "train"])
def test_without_either_a_fifth_is_the_test_set(tmp_path, split):
    write_class_folders(tmp_path, splits=(split,), classes=("dog", "ant"), per_class=10)
    source = read_folder(tmp_path)
    assert counts(source) == (16, 0, 4)
    assert sorted(image.label for image in source.test) == [0, 0, 1, 1]
    assert not {image.data for image in source.train} & {image.data for image in source.test}
    assert read_folder(tmp_path) == source
    assert source.notes == ("there is no test split, so 4 of the 20 images, a fifth of each class, are the test set",)


def test_images_below_a_class_are_of_the_class(tmp_path):
    write_class_folders(tmp_path)
    for name in ("day1/0.JPG", "day1/morning/0.jfif", "day2/0.jpe", "0.avif"):
        (tmp_path / "train" / "dog" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / "dog" / name).touch()
    source = read_folder(tmp_path)
    assert [image.label for image in source.train] == [0] * 3 + [1] * 7
    assert source.notes == ()


def test_what_is_no_image_of_a_class_is_left_out_and_counted(tmp_path):
    write_class_folders(tmp_path)
    (tmp_path / "train" / "cat" / "._0.png").touch()
    (tmp_path / "__MACOSX" / "train" / "cat").mkdir(parents=True)
    (tmp_path / "train" / "cat" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "train" / "cat" / ".ipynb_checkpoints" / "0.png").touch()
    for split in ("train", "test"):
        (tmp_path / split / "eel").mkdir()
    for name in ("notes.txt", "cat/0.heic", "cat/1.heic", "dog/LICENSE", "title.png"):
        (tmp_path / "train" / name).touch()
    source = read_folder(tmp_path)
    assert source.class_names == ("cat", "dog")
    assert counts(source) == (6, 0, 6)
    (note,) = source.notes
    assert note.startswith(f"{tmp_path}: left out what is no image of a class: 3 hidden, ")
    kinds = "2 folder without images, 2 .heic, 1 .txt, 1 without a suffix, 1 image outside the classes"
    assert all(kind in note for kind in kinds.split(", "))
    assert note.endswith("(such as __MACOSX)")


def test_a_class_may_be_called_train(tmp_path):
    write_class_folders(tmp_path, splits=(".",), classes=("bus", "train", "plane"), per_class=5)
    assert read_folder(tmp_path).class_names == ("bus", "plane", "train")


def folders(path, *names):
    for name in names:
        (path / name).mkdir(parents=True)
        (path / name / "0.png").write_bytes(png(pixels(0)))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], r"images are sorted as train/<class>/ .* has none: sort them so"),
        (["test/cat", "val/cat"], r"images are sorted as .* has test, val: add train"),
        (
            ["train/cat", "train/dog", "test"],
            r"images are sorted as .*/test has no folder with images \(\.avif .*: add",
        ),
        (["train/cat", "Train/cat"], r"a split is one folder; .* has Train and train: keep or rename one"),
        (["train/old", "bus"], r"train holds folders, so it is the training split, yet bus lie beside it: move"),
        (["train/cat", "test/cat"], r"2 classes or more; .* has 1 images of 1 \(cat\): add the images of another"),
        (["archive/train/cat", "archive/train/dog"], r"has 2 images of 1 \(archive\): .* set data.path to the folder"),
        (["cat", "dog"], r"a fifth of each class is the test set, which takes 5 images of each; .* has 1 of cat: add"),
        (["train/cat", "train/dog", "test/cat", "test/dgo"], r"only in train: dog, only in test: dgo: rename"),
    ],
)
def test_folders_that_are_sorted_otherwise(tmp_path, names, message):
    folders(tmp_path, *names)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        read_folder(tmp_path)


def test_the_images_of_a_folder(tmp_path):
    folders(tmp_path, "b", "a/deep", ".hidden")
    (tmp_path / "notes.txt").touch()
    assert find_images(tmp_path) == [tmp_path / "a" / "deep" / "0.png", tmp_path / "b" / "0.png"]
