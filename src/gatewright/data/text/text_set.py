"""Documents of bytes in memory, packed one after the other, and the windows that a model reads."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor

from gatewright.data.cache import Content
from gatewright.data.sources import SPLITS
from gatewright.data.text.kinds import CHARACTER_KINDS, PYTHON_KINDS, character_kinds, python_kinds

BEGIN = 256
"""The token in front of a document's first byte. It is read and never predicted."""

NUM_INPUTS, NUM_OUTPUTS = 257, 256
"""A model reads bytes and `BEGIN`, and predicts bytes."""


@dataclass(frozen=True, eq=False)
class TextSet:
    """Documents packed into one sequence of bytes.

    Args:
        content: The bytes of all documents, one after the other, without anything between them.
        starts: The position of each document's first byte, ascending; the first is 0 unless there are no documents.
        context: Bytes of a window, which is as far as a model looks back.
        python: Whether the documents are Python sources, whose bytes have the kinds of Python's tokens.
    """

    content: UInt8[Tensor, " bytes"]
    starts: Int64[Tensor, " documents"]
    context: int = 256
    python: bool = False

    @classmethod
    def pack(cls, documents: Sequence[bytes], context: int = 256, *, python: bool = False) -> Self:
        """Pack documents into a set; empty ones hold nothing to predict, and are left out."""
        documents = [document for document in documents if document]
        lengths = torch.tensor([len(document) for document in documents], dtype=torch.int64)
        content = torch.frombuffer(bytearray(b"".join(documents)) or bytearray(1), dtype=torch.uint8)
        return cls(content[: int(lengths.sum())], lengths.cumsum(0) - lengths, context, python)

    def __len__(self) -> int:
        """Return the number of bytes."""
        return len(self.content)

    @cached_property
    def is_start(self) -> Bool[Tensor, " bytes"]:
        """Whether each byte is the first of its document."""
        return torch.zeros(len(self), dtype=torch.bool, device=self.content.device).index_fill_(0, self.starts, True)

    def to(self, device: torch.device) -> Self:
        """Return the text on a device."""
        return replace(self, content=self.content.to(device), starts=self.starts.to(device))

    @property
    def nbytes(self) -> int:
        """The bytes of the content, and of where documents start."""
        return 2 * self.content.nbytes

    @cached_property
    def digest(self) -> str:
        """A hash of the content; two runs that saw the same text have the same digest."""
        found = hashlib.blake2b(self.content.numpy().data, digest_size=8)
        found.update(self.starts.numpy().data)
        return found.hexdigest()

    @property
    def kind_names(self) -> tuple[str, ...]:
        """Return the names of the kinds of bytes."""
        return PYTHON_KINDS if self.python else CHARACTER_KINDS

    @cached_property
    def kinds(self) -> UInt8[Tensor, " bytes"]:
        """The kind of each byte, a place in `kind_names`."""
        find = python_kinds if self.python else character_kinds
        lengths = torch.diff(self.starts, append=torch.tensor([len(self)])).tolist()
        found = [find(document.numpy().tobytes()) for document in self.content.split(lengths)]
        return torch.cat([torch.empty(0, dtype=torch.uint8), *found])

    def windows(
        self, places: Int64[Tensor, " batch"], length: int
    ) -> tuple[Int64[Tensor, "batch length"], Int64[Tensor, "batch length"]]:
        """Cut windows out of the packed documents, on the device that holds them.

        Args:
            places: The position of each window's first byte.
            length: Bytes of a window; all windows lie inside the text.

        Returns:
            What a model reads, and the bytes it is to predict: the input at a place is the byte before it, or `BEGIN`
            at the start of a document. So the windows of a text predict each of its bytes, and nothing else.
        """
        device = self.content.device
        positions = places.to(device)[:, None] + torch.arange(length, device=device)
        before = self.content[(positions - 1).clamp(min=0)].long()
        return before.masked_fill(self.is_start[positions], BEGIN), self.content[positions].long()

    def kinds_of_inputs(self, places: Int64[Tensor, " batch"], length: int) -> Int64[Tensor, "batch length"]:
        """Return the kinds of what a model reads in these windows; `BEGIN` is of the last kind, other."""
        positions = places[:, None] + torch.arange(length)
        before = self.kinds[(positions - 1).clamp(min=0)].long()
        return before.masked_fill(self.is_start[positions], len(self.kind_names) - 1)


@dataclass(frozen=True, eq=False)
class TextSplits:
    """The three parts of a text data set.

    Args:
        train: The text to learn from.
        holdout: Documents kept aside for choosing settings; there may be none.
        test: Documents for the final figure only.
    """

    train: TextSet
    holdout: TextSet
    test: TextSet

    def content(self) -> Content:
        """Return what a cache file keeps."""
        parts = {split: getattr(self, split) for split in SPLITS}
        contents = {f"{split}.content": part.content for split, part in parts.items()}
        return contents | {f"{split}.starts": part.starts for split, part in parts.items()}, {"holds": "text"}

    @classmethod
    def from_content(cls, tensors: Mapping[str, Tensor], strings: Mapping[str, str]) -> Self:
        """Make the splits from what a cache file kept."""
        return cls(*(TextSet(tensors[f"{split}.content"], tensors[f"{split}.starts"]) for split in SPLITS))
