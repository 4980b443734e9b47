"""The kind of every byte of a text: by Python's own tokenizer, or by the character it is part of."""

import keyword
import token
import tokenize
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import UInt8
from torch import Tensor

PYTHON_KINDS = ("keyword", "name", "number", "string", "comment", "operator", "white space", "other")
"""Kinds of the bytes of Python sources; other is what follows an error of syntax, and what begins a file."""

CHARACTER_KINDS = ("letter", "digit", "punctuation", "white space", "other")
"""Kinds of the bytes of any text; other is what is not ASCII, and what begins a document."""

STRINGS = {number for number, name in token.tok_name.items() if name.startswith(("STRING", "FSTRING", "TSTRING"))}
NAMED = {tokenize.NUMBER: "number", tokenize.COMMENT: "comment", tokenize.OP: "operator"} | dict.fromkeys(
    STRINGS, "string"
)
ASCII_ONLY = bytes(byte if byte < 128 else ord("a") for byte in range(256))
"""Reads letters of all scripts as one, so that columns count bytes; the tokenizer takes the same tokens from it."""


def python_kinds(source: bytes) -> UInt8[Tensor, " bytes"]:
    """Return the place in `PYTHON_KINDS` of the kind of each byte of a Python source.

    What the tokenizer cannot read from some place on, because the source is broken, is white space or other.
    """
    kinds = torch.full((len(source),), PYTHON_KINDS.index("other"), dtype=torch.uint8)
    kinds[_is_space(source)] = PYTHON_KINDS.index("white space")
    lines = source.translate(ASCII_ONLY).splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    for kind, (first_row, first), (last_row, last) in _tokens(lines):
        if last_row <= len(lines):
            kinds[starts[first_row - 1] + first : starts[last_row - 1] + last] = PYTHON_KINDS.index(kind)
    return kinds


def character_kinds(text: bytes) -> UInt8[Tensor, " bytes"]:
    """Return the place in `CHARACTER_KINDS` of the kind of each byte of any text."""
    table = torch.tensor([CHARACTER_KINDS.index(_character_kind(byte)) for byte in range(256)], dtype=torch.uint8)
    return table[_values(text).long()]


def _tokens(lines: Sequence[bytes]) -> Iterator[tuple[str, tuple[int, int], tuple[int, int]]]:
    """Yield kind, first and last place of every token that has a kind, up to the first error of syntax."""
    text = iter([line.decode("ascii") for line in lines])
    try:
        for found in tokenize.generate_tokens(lambda: next(text, "")):
            if found.type == tokenize.NAME:
                yield "keyword" if keyword.iskeyword(found.string) else "name", found.start, found.end
            elif found.type in NAMED:
                yield NAMED[found.type], found.start, found.end
    except (tokenize.TokenError, SyntaxError):  # An IndentationError is one.
        return


def _character_kind(byte: int) -> str:
    character = chr(byte)
    if byte > 127:
        return "other"
    if character.isspace():
        return "white space"
    return "letter" if character.isalpha() else "digit" if character.isdigit() else "punctuation"


def _is_space(source: bytes) -> Tensor:
    return torch.tensor([chr(byte).isspace() and byte < 128 for byte in range(256)])[_values(source).long()]


def _values(text: bytes) -> UInt8[Tensor, " bytes"]:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)
