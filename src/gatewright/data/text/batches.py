"""Batches of windows for training, in an order that can be taken up again, and for evaluation."""

from collections.abc import Iterator

import torch
from jaxtyping import Int64
from torch import Tensor

from gatewright.data.seeding import generator_for
from gatewright.data.text.config import TextConfig
from gatewright.data.text.text_set import TextSet

TextBatch = tuple[Int64[Tensor, "batch context"], Int64[Tensor, "batch context"]]
"""What a model reads, and the bytes it is to predict; see `TextSet.windows`."""


def num_text_batches(text: TextSet, config: TextConfig) -> int:
    """Count the training batches of one epoch."""
    return config.epoch_batches or _batches_per_pass(text, config)


def text_batches(text: TextSet, config: TextConfig, *, seed: int, epoch: int, start: int = 0) -> Iterator[TextBatch]:
    """Iterate over the training batches of one epoch: windows of packed documents, in random order.

    The order is a function of the seed and of how often the whole text was passed through before: a run taken up again
    at `start` sees exactly the batches that the first run would have seen. Every pass cuts the text at other places,
    and leaves out what is too short for a window at either end, or for a batch. All windows are full, so nothing is
    padded, and every byte of a batch counts the same.

    Args:
        text: The text to train on; batches are made on the device that holds it.
        config: The sizes of windows, batches and epochs.
        seed: The seed of the run.
        epoch: The epoch, from 0.
        start: The number of batches of this epoch to skip.

    Raises:
        ValueError: If there is no text, or `start` is beyond the epoch.
    """
    count = num_text_batches(text, config)
    if not len(text):
        raise ValueError("training needs text; got 0 bytes. Add documents.")
    if not 0 <= start <= count:
        raise ValueError(f"start counts batches of an epoch, 0 to {count}; got {start}. Resume with the same sizes.")
    return _text_batches(text, config, seed, range(epoch * count + start, (epoch + 1) * count))


def evaluation_windows(text: TextSet, batch_size: int) -> Iterator[tuple[Int64[Tensor, "batch context"], ...]]:
    """Iterate over the text from its first byte to its last, each predicted exactly once.

    Windows lie side by side, so that a byte is predicted from those before it in its own window. What is left at the
    end is a batch of one shorter window; nothing is padded. Behind inputs and targets come the kinds of the inputs.
    """
    whole = len(text) // text.context
    for places in (torch.arange(whole) * text.context).split(batch_size) if whole else ():
        yield *text.windows(places, text.context), text.kinds_of_inputs(places, text.context)
    if rest := len(text) - whole * text.context:
        last = torch.tensor([len(text) - rest])
        yield *text.windows(last, rest), text.kinds_of_inputs(last, rest)


def _text_batches(text: TextSet, config: TextConfig, seed: int, batches: range) -> Iterator[TextBatch]:
    per_pass, ordered, order = _batches_per_pass(text, config), -1, torch.empty(0, dtype=torch.int64)
    for batch in batches:
        number, place = divmod(batch, per_pass)
        if number != ordered:
            ordered, order = number, _window_order(text, config, seed, number).to(text.content.device)
        yield text.windows(order[place * config.batch_size :][: config.batch_size], _length(text))


def _window_order(text: TextSet, config: TextConfig, seed: int, number: int) -> Int64[Tensor, " windows"]:
    """Shuffle the places of the windows of one pass through the text, which begins somewhere in the first window."""
    generator, length = generator_for("text", seed, number), _length(text)
    windows = _num_windows(text)
    first = torch.randint(len(text) - windows * length + 1, (), generator=generator)
    return first + length * torch.randperm(windows, generator=generator)


def _length(text: TextSet) -> int:
    """Bytes of a window: the context, or all of a text that is shorter."""
    return min(text.context, len(text))


def _num_windows(text: TextSet) -> int:
    """Count the windows that fit wherever the first of them begins; a text that has room for none is one window."""
    length = _length(text)
    return max((len(text) - length + 1) // max(length, 1), min(len(text), 1))


def _batches_per_pass(text: TextSet, config: TextConfig) -> int:
    """Count the full batches of a pass; a text that has none is one short batch."""
    return max(_num_windows(text) // config.batch_size, min(len(text), 1))
