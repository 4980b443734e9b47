"""Image data sets: loading, splitting, augmenting and batching."""

from gatewright.data.augment import augment, random_crop, random_flip, random_translate
from gatewright.data.batches import evaluation_batches, num_batches, training_batches
from gatewright.data.config import BUILT_IN_NAMES, AugmentConfig, DataConfig
from gatewright.data.decode import decode_image
from gatewright.data.examples import write_examples
from gatewright.data.folder import find_images
from gatewright.data.images import ImageSet, ImageSplits, as_floats, channel_statistics
from gatewright.data.load import load_images, local_files

__all__ = [
    "BUILT_IN_NAMES",
    "AugmentConfig",
    "DataConfig",
    "ImageSet",
    "ImageSplits",
    "as_floats",
    "augment",
    "channel_statistics",
    "decode_image",
    "evaluation_batches",
    "find_images",
    "load_images",
    "local_files",
    "num_batches",
    "random_crop",
    "random_flip",
    "random_translate",
    "training_batches",
    "write_examples",
]
