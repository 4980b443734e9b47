import torch
from torch import tensor

from gatewright.data import BEGIN, TextSet

PACKED = TextSet.pack([b"ab", b"", b"cde", b"f"])


def test_windows_predict_every_byte_from_the_one_before_it_in_its_document():
    inputs, targets = PACKED.windows(tensor([0, 3]), 3)
    assert targets.tolist() == [list(b"abc"), list(b"def")]
    assert inputs.tolist() == [[BEGIN, ord("a"), BEGIN], [*b"cd", BEGIN]]


def test_the_digest_is_of_the_bytes_and_of_where_documents_begin():
    digests = {TextSet.pack(documents).digest for documents in ([b"ab", b"c"], [b"a", b"bc"], [b"ab", b"d"])}
    assert len(digests) == 3
    assert TextSet(torch.tensor(list(b"abc"), dtype=torch.uint8), tensor([0, 2])).digest in digests
