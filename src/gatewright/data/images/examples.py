"""A few images of a data set as files, to try a model on, and as small pictures inside a page."""

import base64
import io
import re
from pathlib import Path
from typing import Any

from jaxtyping import UInt8
from torch import Tensor

from gatewright.data.images.image_set import ImageSet
from gatewright.extras import require

NUM_EXAMPLES = 5
THUMBNAIL = 64
"""Pixels that a small picture is wide and high at most."""


def write_examples(images: ImageSet, folder: Path) -> list[Path]:
    """Write the first image of each of the first classes as a PNG file that is called after the class.

    Raises:
        ImportError: If Pillow is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    labels = images.labels.tolist()
    firsts = {name: labels.index(label) for label, name in enumerate(images.class_names) if label in labels}
    written = []
    for name, place in list(firsts.items())[:NUM_EXAMPLES]:
        file_name = re.sub(r"[^\w.-]", "_", name)[:100]
        written.append(folder / f"{file_name}.png")
        _picture(images.images[place]).save(written[-1])
    return written


def thumbnail(image: UInt8[Tensor, "channels height width"]) -> str:
    """Return a small picture of an image, as a ``data:`` address that a page may hold.

    Raises:
        ImportError: If Pillow is not installed.
    """
    picture, file = _picture(image), io.BytesIO()
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    picture.save(file, "png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _picture(image: Tensor) -> Any:
    pixels = image.movedim(0, 2).squeeze(2)  # A grey image has no channels in Pillow.
    return require("PIL.Image", "train").fromarray(pixels.numpy())
