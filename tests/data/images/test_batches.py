import itertools

import pytest
import torch

from gatewright.data import (
    AugmentConfig,
    DataConfig,
    ImageSet,
    as_floats,
    evaluation_batches,
    num_batches,
    training_batches,
)

AUGMENTED = DataConfig(batch_size=8, augment=AugmentConfig(flip=True, translate=2, crop=0.7))


def numbered(count):
    """Make images whose pixels all hold the image's number, with the number as label."""
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 6, 5).contiguous()
    return ImageSet(images, torch.arange(count), tuple(str(number) for number in range(count)))


def noise(count=61):
    return ImageSet(torch.randint(0, 256, (count, 3, 6, 5), dtype=torch.uint8), numbered(count).labels, ("",) * count)


def same(left, right):
    pairs = zip(left, right, strict=True)
    return all(torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in pairs)


@pytest.mark.parametrize(
    ("images", "batch_size", "count"),
    [(0, 8, 0), (1, 8, 0), (2, 8, 1), (8, 8, 1), (9, 8, 1), (10, 8, 2), (3, 1, 3), (1, 1, 1)],
)
def test_a_short_batch_counts_from_two_images_on(images, batch_size, count):
    assert num_batches(images, batch_size) == count


@pytest.mark.parametrize("count", [63, 65, 5])
def test_every_image_comes_once_with_its_label(count):
    batches = list(training_batches(numbered(count), DataConfig(batch_size=8), seed=0, epoch=0))
    assert len(batches) == num_batches(count, 8)
    labels = torch.cat([labels for _, labels in batches])
    assert len(labels.unique()) == len(labels) == count - (count % 8 == 1)
    images = torch.cat([images for images, _ in batches])
    assert torch.equal(images, as_floats(labels.to(torch.uint8)[:, None, None, None].expand(-1, 3, 6, 5)))


@pytest.mark.parametrize("start", [1, 7, 8])
def test_a_run_taken_up_again_sees_the_same_batches(start):
    images = noise()
    whole = list(training_batches(images, AUGMENTED, seed=3, epoch=2))
    assert len(whole) == 8
    torch.rand(10)  # the global generator has no say
    assert same(whole[start:], training_batches(images, AUGMENTED, seed=3, epoch=2, start=start))


def test_seeds_and_epochs_differ_in_order_and_augmentation():
    images = noise()
    runs = [list(training_batches(images, AUGMENTED, seed=s, epoch=e)) for s, e in ((0, 1), (1, 0), (0, 0), (1, 1))]
    orders = [torch.cat([labels for _, labels in run]) for run in runs]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(orders, 2))
    # With one image only, what differs is the augmentation.
    alike = ImageSet(images.images[:1].expand(16, -1, -1, -1), torch.zeros(16, dtype=torch.long), ("",))
    first, second = (next(training_batches(alike, AUGMENTED, seed=0, epoch=epoch))[0] for epoch in (0, 1))
    assert not torch.equal(first, second)


def test_evaluation_takes_every_image_in_order():
    images = noise(count=10)
    batches = list(evaluation_batches(images, 4))
    assert [len(labels) for _, labels in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([rows for rows, _ in batches]), as_floats(images.images))
    assert torch.equal(torch.cat([labels for _, labels in batches]), images.labels)
    assert list(evaluation_batches(noise(count=0), 4)) == []


def test_wrong_requests():
    with pytest.raises(ValueError, match="2 images or a full batch of 8; got 1"):
        training_batches(noise(count=1), AUGMENTED, seed=0, epoch=0)
    for start in (-1, 9):
        with pytest.raises(ValueError, match=f"0 to 8; got {start}: resume with the same batch_size"):
            training_batches(noise(), AUGMENTED, seed=0, epoch=0, start=start)
    with pytest.raises(ValueError, match="batch_size must be 1 or more; got 0"):
        next(evaluation_batches(noise(), 0))


def test_every_other_epoch_mirrors_the_other_images():
    images = ImageSet(torch.arange(6 * 5).view(6, 1, 1, 5).to(torch.uint8), torch.arange(6), ("",) * 6)
    config = DataConfig(batch_size=6, augment=AugmentConfig(alternate_flip=True))

    def mirrored(seed, epoch):
        ((batch, labels),) = training_batches(images, config, seed=seed, epoch=epoch)
        return {int(label): bool(image[0, 0, 0] > image[0, 0, 1]) for image, label in zip(batch, labels, strict=True)}

    first = mirrored(0, 0)
    assert mirrored(0, 2) == first
    assert mirrored(0, 1) == {label: not flipped for label, flipped in first.items()}
    assert any(mirrored(seed, 0) != first for seed in range(1, 5))
