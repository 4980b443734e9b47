"""A few images of a data set as files, to try a model on."""

import re
from pathlib import Path

from gatewright.data.images.image_set import ImageSet
from gatewright.extras import require

NUM_EXAMPLES = 5


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
        pixels = images.images[place].movedim(0, 2).squeeze(2)  # A grey image has no channels in Pillow.
        written.append(folder / f"{file_name}.png")
        require("PIL.Image", "train").fromarray(pixels.numpy()).save(written[-1])
    return written
