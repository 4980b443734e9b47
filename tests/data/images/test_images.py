import pytest
import torch

from gatewright.data import ImageSet, as_floats, channel_statistics


def image_set(images=7, channels=3, classes=3):
    pixels = torch.randint(0, 256, (images, channels, 5, 4), dtype=torch.uint8)
    return ImageSet(pixels, torch.arange(images) % classes, tuple("abcdef"[:classes]))


@pytest.mark.parametrize(("label", "row"), [(3, 0), (-1, 6), (10**12, 2)])
def test_labels_out_of_range(label, row):
    labels = torch.zeros(7, dtype=torch.long)
    labels[row] = label
    with pytest.raises(ValueError, match=f"between 0 and 2, as there are 3 classes; got {label} in row {row}"):
        ImageSet(image_set().images, labels, ("a", "b", "c"))


def test_channel_statistics_are_those_of_the_floats():
    images = image_set(images=50)
    floats = as_floats(images.images).double().movedim(1, 0).flatten(1)
    mean, deviation = channel_statistics(images)
    torch.testing.assert_close(mean, floats.mean(1).float())
    torch.testing.assert_close(deviation, floats.std(1, correction=0).float())


def test_a_constant_channel_can_be_divided_by():
    images = image_set()
    images.images[:, 1] = 255
    mean, deviation = channel_statistics(images)
    assert mean[1] == 1
    assert deviation[1] == pytest.approx(1 / 255)
