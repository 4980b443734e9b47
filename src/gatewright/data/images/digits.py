"""The embedded data set: 1,797 handwritten digits of 8x8 pixels, part of scikit-learn."""

import torch

from gatewright.data.images.image_set import ImageSet, ImageSplits
from gatewright.data.images.split import stratified_split
from gatewright.extras import folder_of, require

TEST_SHARE = 0.2
TEST_SEED = 0
MAX_INK = 16  # the digits count ink from 0 to 16


def load_digits() -> ImageSplits:
    """Load the training (1,438) and test (359) digits, without network or cache.

    The split is fixed and stratified. The images are those of the "Optical Recognition of Handwritten Digits" test set:
    https://archive.ics.uci.edu/dataset/80

    Raises:
        ImportError: If scikit-learn is not installed.
    """
    # Read as it lies there: to import scikit-learn takes as long as a short training.
    file = folder_of("sklearn", "train") / "datasets" / "data" / "digits.csv.gz"
    rows = torch.from_numpy(require("numpy", "train").loadtxt(file, delimiter=","))
    images = rows[:, :-1].mul(255 / MAX_INK).round().to(torch.uint8).view(-1, 1, 8, 8)
    digits = ImageSet(images, rows[:, -1].long(), tuple("0123456789"))
    train, test = stratified_split(digits.labels, TEST_SHARE, seed=TEST_SEED)
    return ImageSplits(digits.select(train), digits.select(train[:0]), digits.select(test))
