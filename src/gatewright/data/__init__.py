"""Image data sets: loading, splitting, augmenting and batching."""

from gatewright.data.config import BatchConfig
from gatewright.data.images.augment import augment, random_crop, random_flip, random_translate
from gatewright.data.images.batches import evaluation_batches, num_batches, training_batches
from gatewright.data.images.config import BUILT_IN_NAMES, AugmentConfig, DataConfig
from gatewright.data.images.decode import decode_image
from gatewright.data.images.examples import write_examples
from gatewright.data.images.folder import find_images
from gatewright.data.images.image_set import ImageSet, ImageSplits, as_floats, channel_statistics
from gatewright.data.images.load import load_images, local_files

__all__ = [
    "BUILT_IN_NAMES",
    "AugmentConfig",
    "BatchConfig",
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
