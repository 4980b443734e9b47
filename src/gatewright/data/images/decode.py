"""From image files to tensors of grey levels."""

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from gatewright.data.images.image_set import ImageSet, ImageSplits
from gatewright.data.images.sources import EncodedImage, ImageSource
from gatewright.extras import require

Shape = tuple[int, int, int]
"""Channels, height and width of an image."""
MODES = {1: "L", 3: "RGB"}  # number of channels: Pillow's name


def decode_image(path: str | Path, *, channels: int, size: tuple[int, int]) -> UInt8[Tensor, "channels height width"]:
    """Decode one image file to the shape a model was trained on, by the rules of training.

    Args:
        path: A PNG, JPEG or other image file.
        channels: 1 for grey or 3 for RGB; the image is converted.
        size: Height and width; the image is resized to fill it and its overhang cut off evenly.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If Pillow is not installed.
        ValueError: If the file is no image that can be decoded, or `channels` is neither 1 nor 3.
    """
    if channels not in MODES:
        raise ValueError(f"an image file decodes to 1 channel (grey) or 3 (RGB); got channels={channels}")
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no image file {path}: check the path")
    return _decode(str(path), Path(path), MODES[channels], size)


def decode_source(
    source: ImageSource, image_size: int | None, check: Callable[[Shape], None] = lambda shape: None
) -> ImageSplits:
    """Decode the images of all splits, with a progress bar on a terminal.

    The sets are grey if every image is, and RGB otherwise. Transparency is ignored, and photographs are turned upright.

    Args:
        source: The encoded images.
        image_size: Side of the square that images are resized to fill; None keeps their size, which must be the same.
        check: Function that is called with the shape of the first image before the others are decoded; it may raise.

    Raises:
        ImportError: If Pillow is not installed.
        ValueError: If an image cannot be decoded, or sizes differ and `image_size` is None; the message names the file.
            Or there are no training or no test images.
    """
    if not source.train or not source.test:
        sizes = f"{len(source.train)} training and {len(source.test)} test images"
        raise ValueError(f"a data set needs training and test images; got {sizes}: add images")
    encoded = [*source.train, *source.holdout, *source.test]
    decoded = list(_decode_alike(encoded, None if image_size is None else (image_size, image_size), check))
    channels = max(len(image) for image in decoded)
    images = torch.stack([image.expand(channels, -1, -1) for image in decoded])
    labels = torch.tensor([image.label for image in encoded])
    sizes_of_splits = [len(source.train), len(source.holdout), len(source.test)]
    parts = zip(images.split(sizes_of_splits), labels.split(sizes_of_splits), strict=True)
    return ImageSplits(*(ImageSet(*part, source.class_names) for part in parts))


def _decode_alike(
    encoded: Sequence[EncodedImage], size: tuple[int, int] | None, check: Callable[[Shape], None]
) -> Iterator[UInt8[Tensor, "channels height width"]]:
    """Decode one image after the other, and stop at the first whose size differs from the first one's."""
    first: Tensor | None = None
    # One thread: for small images Pillow's calls are too short for threads to gain anything.
    for source in _progress(encoded):
        image = _decode(source.place, source.data, None, size)
        if first is None:
            first = image
            check((image.shape[0], image.shape[1], image.shape[2]))
        if image.shape[1:] != first.shape[1:]:
            raise ValueError(
                f"images must have one size; {encoded[0].place} is {first.shape[2]}x{first.shape[1]} pixels and "
                f"{source.place} is {image.shape[2]}x{image.shape[1]}: set data.image_size to a side to resize to"
            )
        yield image


def _decode(
    place: str, data: bytes | Path, mode: str | None, size: tuple[int, int] | None
) -> UInt8[Tensor, "channels height width"]:
    image_module, operations = require("PIL.Image", "train"), require("PIL.ImageOps", "train")
    try:
        with image_module.open(io.BytesIO(data) if isinstance(data, bytes) else data) as file:
            sixteen_bits = file.mode.startswith("I;16") or (file.mode, file.format) == ("I", "PPM")
            image = _grey_or_rgb(operations.exif_transpose(file), sixteen_bits=sixteen_bits)
    except Exception as error:  # on damaged bytes Pillow's readers raise a dozen unrelated kinds
        raise ValueError(f"{place}: cannot be decoded as an image ({error}): replace or remove it") from error
    image = image.convert(mode or image.mode)
    if size is not None and image.size != size[::-1]:
        image = operations.fit(image, size[::-1])
    # frombuffer warns on bytes, which cannot be written to; a bytearray can.
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, -1).movedim(2, 0)


def _grey_or_rgb(image: Any, *, sixteen_bits: bool) -> Any:
    """Convert a Pillow image to mode L if it is grey and to RGB otherwise."""
    if sixteen_bits:
        # Pillow would cut levels above 255 off; the high byte is what is wanted of 16 bits.
        return image.convert("I").point(lambda level: level * (1 / 256)).convert("L")
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode}, 32-bit levels without a known range, is not supported")
    return image.convert("L" if image.mode in ("1", "L", "LA") or _has_grey_palette(image) else "RGB")


def _has_grey_palette(image: Any) -> bool:
    """Tell whether an image with a palette uses none but its greys."""
    if image.mode not in ("P", "PA"):
        return False
    colours = image.convert("RGB").getcolors()  # at most 256
    return all(red == green == blue for _, (red, green, blue) in colours)


def _progress(images: Sequence[EncodedImage]) -> Iterable[EncodedImage]:
    console = require("rich.console", "train").Console(stderr=True)
    track: Any = require("rich.progress", "train").track
    tracked: Iterable[EncodedImage] = track(
        images, description="decoding images", console=console, transient=True, disable=not console.is_terminal
    )
    return tracked
