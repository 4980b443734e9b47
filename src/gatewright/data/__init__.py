"""Data sets of images and of text: loading, splitting, augmenting and batching."""

from gatewright.data.config import BatchConfig
from gatewright.data.images.augment import augment, random_crop, random_flip, random_translate
from gatewright.data.images.batches import evaluation_batches, num_batches, training_batches
from gatewright.data.images.config import BUILT_IN_NAMES, AugmentConfig, DataConfig
from gatewright.data.images.decode import decode_image
from gatewright.data.images.examples import thumbnail, write_examples
from gatewright.data.images.folder import find_images
from gatewright.data.images.image_set import ImageSet, ImageSplits, as_floats, channel_statistics
from gatewright.data.images.load import load_images, local_files
from gatewright.data.resident import resident
from gatewright.data.text.batches import TextBatch, evaluation_windows, num_text_batches, text_batches
from gatewright.data.text.config import TextConfig
from gatewright.data.text.load import load_text, local_text_files
from gatewright.data.text.sources import files_below
from gatewright.data.text.text_set import BEGIN, NUM_INPUTS, NUM_OUTPUTS, TextSet, TextSplits

__all__ = [
    "BEGIN",
    "BUILT_IN_NAMES",
    "NUM_INPUTS",
    "NUM_OUTPUTS",
    "AugmentConfig",
    "BatchConfig",
    "DataConfig",
    "ImageSet",
    "ImageSplits",
    "TextBatch",
    "TextConfig",
    "TextSet",
    "TextSplits",
    "as_floats",
    "augment",
    "channel_statistics",
    "decode_image",
    "evaluation_batches",
    "evaluation_windows",
    "files_below",
    "find_images",
    "load_images",
    "load_text",
    "local_files",
    "local_text_files",
    "num_batches",
    "num_text_batches",
    "random_crop",
    "random_flip",
    "random_translate",
    "resident",
    "text_batches",
    "thumbnail",
    "training_batches",
    "write_examples",
]
