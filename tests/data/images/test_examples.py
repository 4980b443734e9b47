import torch

from gatewright.data import ImageSet, decode_image, write_examples
from tests.data.samples import pixels


def image_set(channels, class_names, labels):
    images = torch.stack([torch.from_numpy(pixels(seed, channels=channels)).view(6, 5, channels) for seed in range(9)])
    return ImageSet(images.movedim(3, 1), torch.tensor(labels), class_names)


def test_examples_are_images_of_the_first_classes_pixel_for_pixel(tmp_path):
    for channels in (1, 3):
        images = image_set(channels, tuple("abcdefg"), [6, 5, 4, 2, 1, 0, 0, 1, 2])  # none of class d
        written = write_examples(images, tmp_path / "new")
        assert [file.name for file in written] == [f"{name}.png" for name in "abcef"]
        for file, place in zip(written, (5, 4, 3, 2, 1), strict=True):
            assert torch.equal(decode_image(file, channels=channels, size=(6, 5)), images.images[place])


def test_a_class_name_that_is_no_file_name(tmp_path):
    (file,) = write_examples(image_set(3, ("cat/ünder: *?",), [0] * 9), tmp_path)
    assert file == tmp_path / "cat_ünder____.png"
