"""Random changes to training images, each image its own, on whole batches of grey levels."""

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from gatewright.data.images.config import AugmentConfig


def augment(
    images: UInt8[Tensor, "batch channels height width"], config: AugmentConfig, generator: torch.Generator
) -> UInt8[Tensor, "batch channels height width"]:
    """Crop, translate and flip, as far as the config asks for it.

    Args:
        images: A batch on any device, which does all the work. It stays as it is.
        config: The changes to make, and their size.
        generator: Generator on the CPU, so that the draws are the same on every device. The result is a function of its
            state.

    Raises:
        ValueError: If the translation is as large as the images, or images that are to be turned are not square.
    """
    if config.crop < 1.0:
        images = random_crop(images, generator, config.crop)
    if config.translate:
        images = random_translate(images, generator, config.translate)
    if config.rotate:
        turns = torch.randint(4, (len(images),), generator=generator)
        images = turned(images, turns.to(images.device, non_blocking=True))
    if config.flip:
        images = random_flip(images, generator)
    return images


def random_flip(
    images: UInt8[Tensor, "batch channels height width"], generator: torch.Generator
) -> UInt8[Tensor, "batch channels height width"]:
    """Mirror each image left to right with probability one half."""
    flipped = (torch.rand(len(images), generator=generator) < 0.5).to(images.device, non_blocking=True)
    return torch.where(flipped[:, None, None, None], images.flip(-1), images)


def turned(
    images: UInt8[Tensor, "batch channels height width"], turns: Int[Tensor, " batch"]
) -> UInt8[Tensor, "batch channels height width"]:
    """Turn each image by a number of quarter turns, counterclockwise.

    Raises:
        ValueError: If the images are not square.
    """
    height, width = images.shape[-2:]
    if height != width:
        raise ValueError(f"Quarter turns are for square images; got {height} x {width}. Set data.image_size.")
    for number in (1, 2):  # A turn of 3 is one of 1 and one of 2.
        chosen = (turns & number > 0)[:, None, None, None]
        images = torch.where(chosen, images.rot90(number, (-2, -1)), images)
    return images


def random_translate(
    images: UInt8[Tensor, "batch channels height width"], generator: torch.Generator, pixels: int
) -> UInt8[Tensor, "batch channels height width"]:
    """Shift each image by up to `pixels` either way along each side, filling the rim by reflection.

    This is padding by reflection (the edge pixel is not repeated) followed by a random crop of the old size.

    Raises:
        ValueError: If `pixels` is not less than a side, so that a reflection would not fill the rim.
    """
    height, width = images.shape[-2:]
    if pixels >= min(height, width):
        raise ValueError(f"translate must be less than the sides of the images, {width}x{height} pixels; got {pixels}")
    shift = torch.randint(-pixels, pixels + 1, (2, len(images)), generator=generator)
    shift = shift.to(images.device, non_blocking=True)
    rows, columns = _reflected(shift[0], height), _reflected(shift[1], width)
    # One flat index per output pixel, the same for all channels.
    source = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)
    flat = images.flatten(2)
    return flat.gather(2, source[:, None].expand_as(flat)).view_as(images)


def random_crop(
    images: UInt8[Tensor, "batch channels height width"], generator: torch.Generator, smallest: float
) -> UInt8[Tensor, "batch channels height width"]:
    """Cut a random window out of each image and resize it, bilinearly, to the old size.

    Args:
        images: A batch, which stays as it is.
        generator: Generator on the CPU.
        smallest: Least share of each side that is kept, in (0, 1]; shares are uniform from it to 1, places uniform.
    """
    draws = torch.rand(3, len(images), generator=generator).to(images.device, non_blocking=True)
    share = smallest + (1 - smallest) * draws[0]
    rows = _interpolation(draws[1], share, images.shape[-2])
    columns = _interpolation(draws[2], share, images.shape[-1])
    # Interpolation along a side is linear: a small matrix per image, much faster on the CPU than grid_sample.
    resized = rows[:, None] @ images.float() @ columns[:, None].mT
    return resized.round_().to(torch.uint8)


def _reflected(shift: Int[Tensor, " batch"], side: int) -> Int[Tensor, "batch side"]:
    """List, for every pixel of a shifted side, the pixel it shows."""
    wanted = (torch.arange(side, device=shift.device) + shift[:, None]).abs()
    return (side - 1) - ((side - 1) - wanted).abs()


def _interpolation(
    place: Float[Tensor, " batch"], share: Float[Tensor, " batch"], side: int
) -> Float[Tensor, "batch side side"]:
    """Build matrices that map a side to a window of it at full size.

    Args:
        place: Place of each window, from 0 (at the start) to 1 (at the end).
        share: Share of the side that the window covers.
        side: Length of the side in pixels.
    """
    start = place * (1 - share) * side
    # Pixel i covers [i, i + 1): its centre lies half a pixel further on.
    pixels = torch.arange(side, device=place.device)
    centres = start[:, None] + (pixels + 0.5) * share[:, None] - 0.5
    distance = (centres.clamp(0, side - 1)[:, :, None] - pixels).abs()
    return (1 - distance).clamp(min=0)
