"""Held-out and test documents where a data set has none: the same ones in every run."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from gatewright.data.text.sources import TextSource

TEST_EVERY = 50
"""Where a data set has no test split, every 50th document is the test set."""

FEW_DOCUMENTS = 200
"""A data set of fewer documents is cut into about as many pieces first, so that something is left to hold out."""


def with_test_documents(source: TextSource) -> TextSource:
    """Return a source that has a test split, and a note that says where it comes from if it had none.

    The validation split is the test set then, or else every 50th document; a few long documents are cut into pieces
    at the ends of lines before that.

    Raises:
        ValueError: If the text is too short to be split.
    """
    if source.test:
        return source
    if source.holdout:
        note = "there is no test split, so the validation split is the test set"
        return replace(source, holdout=(), test=source.holdout, notes=(*source.notes, note))
    documents = in_pieces([document for document in source.train if document])
    if len(documents) < 2:
        raise ValueError(f"a text is split into two parts at least; got {len(documents[0])} bytes of it. Add text.")
    test = documents[::TEST_EVERY]
    note = f"there is no test split, so {len(test):,} of the {len(documents):,} documents, every {TEST_EVERY}th, are it"
    kept = [document for place, document in enumerate(documents) if place % TEST_EVERY]
    return replace(source, train=kept, test=test, notes=(*source.notes, note))


def with_held_out_documents(source: TextSource, share: float) -> TextSource:
    """Return a source that has a share of its training documents as held-out ones, unless it has held-out ones.

    They are taken at even spacing. A share above 0 takes at least one, as long as one is left to train on.
    """
    if source.holdout or not share or len(source.train) < 2:
        return source
    every = max(min(round(1 / share), len(source.train)), 2)
    held = range(every // 2, len(source.train), every)
    kept = [document for place, document in enumerate(source.train) if place not in held]
    return replace(source, train=kept, holdout=[source.train[place] for place in held])


def in_pieces(documents: Sequence[bytes]) -> list[bytes]:
    """Cut a few long documents into about two hundred pieces that end where lines do; leave many as they are."""
    if len(documents) >= FEW_DOCUMENTS:
        return list(documents)
    size = max(1, sum(map(len, documents)) // FEW_DOCUMENTS)
    return [piece for document in documents for piece in _pieces(document, size)]


def _pieces(document: bytes, size: int) -> Iterator[bytes]:
    """Cut at the first end of a line after `size` bytes, or after twice as many where there is none before."""
    start = 0
    while start < len(document):
        end = document.find(b"\n", start + size - 1, start + 2 * size) + 1 or start + 2 * size
        yield document[start:end]
        start = end
