"""Batches are made on the device that holds the data, of the same random draws on every device."""

from dataclasses import replace

import torch

from gatewright.data import AugmentConfig, DataConfig, TextConfig, TextSet, resident, text_batches, training_batches
from tests.train.runs import image_set

META = torch.device("meta")  # It computes shapes alone, and refuses to meet a tensor of another device.


def test_images_are_chosen_and_changed_where_they_are():
    augmented = AugmentConfig(crop=0.7, translate=2, flip=True)
    config = replace(DataConfig(), batch_size=8, augment=augmented)
    images = image_set(20)
    for (pixels, labels), (expected, _) in zip(
        training_batches(images.to(META), config, seed=0, epoch=0),
        training_batches(images, config, seed=0, epoch=0),
        strict=True,
    ):
        assert (pixels.device, labels.device) == (META, META)
        assert (pixels.shape, pixels.dtype) == (expected.shape, expected.dtype)


def test_windows_of_text_are_cut_where_it_is():
    text = TextSet.pack([b"a document", b"and another one"], 4)
    batches = text_batches(text.to(META), TextConfig(batch_size=2, context=4), seed=0, epoch=0)
    assert all(inputs.is_meta and targets.is_meta for inputs, targets in batches)


def test_on_a_cpu_nothing_is_moved():
    images = image_set(4)
    assert resident(images, torch.device("cpu")) is images
