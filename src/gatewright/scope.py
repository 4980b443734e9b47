"""What a router may know beyond its own tokens: the rest of a global batch, and numbers to draw noise from."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gatewright.internals import backward_id, saves_by_hooks

REPLAYED_FORWARDS = 1024
"""Checkpointed forwards of which a scope remembers what belongs to them until they run again."""

Mask = Bool[Tensor, " tokens"] | None
"""Which tokens are real: None where all are. The others, such as padding, count for nothing."""

LOST_FORWARD = (
    "Activation checkpointing runs a forward of this layer again, and its noise key, or the routing that it replayed, "
    f"is not to be found: either it was more than {REPLAYED_FORWARDS} forwards ago, or torch's generator was not "
    "restored. Leave preserve_rng_state=True in torch.utils.checkpoint.checkpoint, which is its default, or do without "
    "gatewright.seed_noise and gatewright.replay_routing."
)

_WORD = 1 << 64
Bits = TypeVar("Bits", Tensor, int)
Value = TypeVar("Value")
_GAMMA = 0x9E3779B97F4A7C15
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


class BatchScope:
    """A batch that may be part of a larger one, spread over processes; this one is all there is.

    The tokens of a global batch are numbered through, those of the first process first. Whatever a router does that
    depends on more than one token goes through its scope, so that it does not depend on how the batch is split.

    Args:
        key: A 64-bit integer that noise is a function of, beside the token's number. By default one is drawn from
            torch's generator whenever noise is asked for. Each training forward of a layer has a key of its own: the
            first one this, the next one a hash of it, and so on.
    """

    def __init__(self, key: Int[Tensor, ""] | None = None) -> None:
        self.key = key
        self.choices: Callable[[Tensor], Tensor] | None = None
        self._replayed: dict[int, Any] = {}

    def token_offset(self, num_tokens: int | Int[Tensor, ""]) -> int:
        """Return how many tokens of the global batch stand before this process's, of which there are so many."""
        return 0

    def sum(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Add up each tensor over the processes, with a gradient."""
        return values

    def gather(self, values: Float[Tensor, "tokens *item"]) -> Float[Tensor, "global_tokens *item"]:
        """Concatenate over the processes in the order of the global batch, with a gradient."""
        return values

    def chosen(self, expert_index: Int[Tensor, "tokens top_k"]) -> Int[Tensor, "tokens top_k"]:
        """Return the experts that tokens go to: those that the router chose, or those of a routing that is replayed.

        A router passes its choice through here before it takes the weights of the chosen experts. Its routing can then
        be recorded by `gatewright.record_routing` and replayed by `gatewright.replay_routing`.
        """
        return expert_index if self.choices is None else self.choices(expert_index)

    def uniform(
        self, like: Float[Tensor, "tokens columns"], stream: int = 0, mask: Mask = None
    ) -> Float[Tensor, "tokens columns"]:
        """Draw from the open interval (0, 1), in 23-bit steps.

        Args:
            like: Tensor that the numbers are for, of their shape and type.
            stream: Number of the stream; another one gives other numbers.
            mask: True where a token is real. Only these are numbered, so that padding does not change their noise.
        """
        return _fraction(self._bits(like, stream, mask) >> 40, like.dtype).to(like.dtype)

    def normal(
        self, like: Float[Tensor, "tokens columns"], stream: int = 0, mask: Mask = None
    ) -> Float[Tensor, "tokens columns"]:
        """Draw from the standard normal distribution, within 5.8 deviations: the Box-Muller transform.

        The arguments are those of `uniform`.
        """
        bits = self._bits(like, stream, mask)
        radius = (-2 * _fraction(bits >> 40, like.dtype).log()).sqrt()
        return (radius * (2 * math.pi * _fraction(bits >> 16, like.dtype)).cos()).to(like.dtype)

    def draw_key(self, device: torch.device) -> Int[Tensor, ""]:
        """Draw a key from torch's generator."""
        return torch.randint(2**62, (), device=device)

    def set_key(self, key: int) -> None:
        """Draw the noise of the next forward from this key."""
        self.key = torch.tensor(key, device="cpu")

    def next_forward(self) -> None:
        """Go on to the key of the next forward, where there is a key."""
        if self.key is not None:
            self.key = splitmix64(self.key + _signed(_GAMMA))  # Not in place: a backward pass may need the last one.

    def of_this_forward(self, value: Value) -> Value:
        """Return a value of this forward; one that activation checkpointing runs again gets the value that it had.

        Checkpointing restores torch's generator before it runs a forward again, so the number drawn here is the same
        then, and finds the value.
        """
        if torch.compiler.is_compiling() or not saves_by_hooks():
            return value
        ticket = int(torch.randint(2**62, (), device="cpu"))
        if backward_id() == -1:
            self._replayed[ticket] = value
            if len(self._replayed) > REPLAYED_FORWARDS:
                del self._replayed[next(iter(self._replayed))]
        if ticket not in self._replayed:
            raise RuntimeError(LOST_FORWARD)
        found: Value = self._replayed[ticket]
        return found

    def _bits(self, like: Tensor, stream: int, mask: Tensor | None) -> Int[Tensor, "tokens columns"]:
        """Hash the key and each entry's place in the global batch: splitmix64, used as a counter-based generator."""
        tokens, columns = like.shape
        key = self.draw_key(like.device) if self.key is None else self.of_this_forward(self.key)
        first = self.token_offset(tokens if mask is None else mask.sum())
        place = torch.arange(tokens, device=like.device) if mask is None else mask.cumsum(0) - 1
        counter = (first + place)[:, None] * columns + torch.arange(columns, device=like.device)
        # Exclusive or before the product: torch's inductor would fold a product of the counter alone into its loop
        # index, where C++ leaves overflow undefined.
        return splitmix64((counter ^ (key + _signed(stream * _GAMMA))) * _signed(_GAMMA))


ONE_PROCESS = BatchScope()


def splitmix64(bits: Bits) -> Bits:
    """Mix 64-bit integers, one to one: the output function of https://doi.org/10.1145/2660193.2660195.

    Of an integer of Python's, which does not overflow, the lowest 64 bits count.
    """
    for shift, factor in _ROUNDS:
        bits = (bits ^ _shifted(bits, shift)) * _signed(factor)
    return bits ^ _shifted(bits, 31)


def noise_key(*numbers: int) -> int:
    """Hash integers, such as a seed, a step and a layer's place, to a signed 64-bit key."""
    key = 0
    for number in numbers:
        key = _signed(splitmix64(key + _GAMMA + number))
    return key


def _fraction(bits: Int[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """Read the lowest 23 bits as a number in (0, 1), in at least float32, which holds it exactly."""
    return ((bits & 0x7FFFFF).to(torch.promote_types(dtype, torch.float32)) + 0.5) * 2.0**-23


def _shifted(bits: Bits, places: int) -> Bits:
    """Shift right, filling with zeros."""
    return (bits >> places) & ((1 << (64 - places)) - 1)


def _signed(word: int) -> int:
    """Reduce to 64 bits and read them as a signed integer, as torch does."""
    word %= _WORD
    return word - _WORD if word >= _WORD // 2 else word
