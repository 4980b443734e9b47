import re

import pytest

from gatewright.data.folder import find_image_files, read_folder
from tests.data.samples import write_class_folders


@pytest.mark.parametrize("test", ["test", "validation", "val"])
def test_images_are_labelled_by_folder(tmp_path, test):
    write_class_folders(tmp_path, splits=("train", test), classes=("dog", "ant", "cat"), per_class=2)
    source = read_folder(find_image_files(tmp_path))
    assert source.class_names == ("ant", "cat", "dog")
    assert [(image.data, image.label) for image in source.test] == [
        (tmp_path / test / name / f"{number}.png", label)
        for label, name in enumerate(("ant", "cat", "dog"))
        for number in range(2)
    ]
    assert len(source.train) == 6


def test_other_files_are_left_out(tmp_path):
    write_class_folders(tmp_path)
    (tmp_path / "train" / "cat" / "notes.txt").touch()
    (tmp_path / "train" / ".thumbnails").mkdir()
    (tmp_path / "train" / "cat" / "0.png").rename(tmp_path / "train" / "cat" / "0.PNG")
    source = read_folder(find_image_files(tmp_path))
    assert len(source.train) == len(source.test) == 6


def test_missing_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"there is no folder {re.escape(str(tmp_path / 'gone'))}"):
        find_image_files(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="train/<class>/<image>; found no class folder there"):
        find_image_files(tmp_path)
    write_class_folders(tmp_path, splits=("train",))
    with pytest.raises(FileNotFoundError, match="test/<class>/<image>; found no class folder there"):
        find_image_files(tmp_path)


def test_of_classes_alone_a_fifth_is_the_test_set(tmp_path):
    write_class_folders(tmp_path, splits=(".",), classes=("dog", "ant"), per_class=10)
    files = find_image_files(tmp_path)
    source = read_folder(files)
    assert (len(source.train), len(source.test)) == (16, 4)
    assert sorted(image.label for image in source.test) == [0, 0, 1, 1]
    assert not {*files.train} & {*files.test}
    assert find_image_files(tmp_path) == files


def test_a_class_without_images(tmp_path):
    write_class_folders(tmp_path)
    (tmp_path / "test" / "eel").mkdir()
    with pytest.raises(FileNotFoundError, match=r"test/eel must hold the images of one class .* found none"):
        find_image_files(tmp_path)


def test_train_and_test_must_have_the_same_classes(tmp_path):
    write_class_folders(tmp_path)
    (tmp_path / "test" / "dog").rename(tmp_path / "test" / "dgo")
    with pytest.raises(ValueError, match="only in train: dog, only in test: dgo"):
        read_folder(find_image_files(tmp_path))
