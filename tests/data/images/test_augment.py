import pytest
import torch
from torch.nn import functional as F

from gatewright.data import AugmentConfig, augment, random_crop, random_flip, random_translate


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(batch=64, channels=3, height=9, width=7):
    return torch.randint(0, 256, (batch, channels, height, width), dtype=torch.uint8)


def matches(changed, candidates):
    """Say which candidate each image equals, and check that there is one."""
    equal = torch.stack([(changed == candidate).flatten(1).all(1) for candidate in candidates])
    assert equal.any(0).all()
    return equal.int().argmax(0)


def test_flip_mirrors_about_half_of_the_images():
    original = images(batch=400)
    flipped = matches(random_flip(original, generator()), [original, original.flip(-1)])
    assert 150 < flipped.sum() < 250  # 5 standard deviations


@pytest.mark.parametrize("pixels", [1, 5])
def test_translate_is_reflection_padding_and_a_crop(pixels):
    original = images(batch=2000)
    changed = random_translate(original, generator(), pixels)
    padded = F.pad(original.float(), [pixels] * 4, mode="reflect").to(torch.uint8)
    offsets = range(2 * pixels + 1)
    windows = [padded[..., top : top + 9, left : left + 7] for top in offsets for left in offsets]
    counts = matches(changed, windows).bincount(minlength=len(windows))
    assert (counts > 0).all()  # every shift occurs


@pytest.mark.parametrize("pixels", [7, 100])
def test_translate_must_be_less_than_a_side(pixels):
    with pytest.raises(ValueError, match=f"less than the sides of the images, 7x9 pixels; got {pixels}"):
        random_translate(images(), generator(), pixels)


def naive_crop(image, top, left, share):
    channels, height, width = image.shape
    out = torch.zeros(channels, height, width)
    for row in range(height):
        for column in range(width):
            y = min(max(top + (row + 0.5) * share - 0.5, 0), height - 1)
            x = min(max(left + (column + 0.5) * share - 0.5, 0), width - 1)
            up, near = min(int(y), height - 2), min(int(x), width - 2)
            for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
                weight = (1 - abs(y - up - i)) * (1 - abs(x - near - j))
                out[:, row, column] += weight * image[:, up + i, near + j]
    return out


def test_crop_is_a_window_resized_bilinearly():
    original = images(batch=5)
    changed = random_crop(original, generator(), 0.4)
    draws = torch.rand(3, 5, generator=generator())
    for image, crop, (down, right, size) in zip(original, changed, draws[[1, 2, 0]].T.tolist(), strict=True):
        share = 0.4 + 0.6 * size
        expected = naive_crop(image, down * (1 - share) * 9, right * (1 - share) * 7, share)
        assert (crop - expected).abs().max() < 0.51


def test_augment_does_what_is_asked_and_nothing_else():
    original = images()
    assert augment(original, AugmentConfig(), generator()) is original
    assert torch.equal(augment(original, AugmentConfig(flip=True), generator()), random_flip(original, generator()))
    together = generator()
    expected = random_crop(original, together, 0.7)
    expected = random_flip(random_translate(expected, together, 2), together)
    config = AugmentConfig(flip=True, translate=2, crop=0.7)
    assert torch.equal(augment(original, config, generator()), expected)


def test_a_turn_is_a_quarter_and_chosen_for_each_image():
    original = images(batch=400, width=9)
    turns = [original.rot90(number, (-2, -1)) for number in range(4)]
    changed = augment(original, AugmentConfig(rotate=True), generator())
    counts = matches(changed, turns).bincount()
    assert ((counts > 60) & (counts < 140)).all()  # 4.6 standard deviations
    with pytest.raises(ValueError, match=r"Quarter turns are for square images; got 9 x 7. Set data.image_size"):
        augment(images(), AugmentConfig(rotate=True), generator())
