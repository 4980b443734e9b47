import itertools

import pytest
import torch

from gatewright.data import BEGIN, TextConfig, TextSet, evaluation_windows, num_text_batches, text_batches

CONFIG = TextConfig(batch_size=3)


def numbered(*lengths):
    """Make documents in which every byte is the position it will have."""
    positions = iter(range(256))
    return TextSet.pack([bytes(itertools.islice(positions, length)) for length in lengths], context=8)


def targets(batches):
    return torch.cat([batch[1].flatten() for batch in batches]).tolist()


def same(left, right):
    return all(torch.equal(a, b) for x, y in zip(left, right, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("length", [1, 7, 8, 9, 32, 77, 200])
def test_evaluation_predicts_every_byte_once_in_order_without_padding(length):
    text = numbered(length)
    assert targets(evaluation_windows(text, 4)) == list(range(length))
    assert list(evaluation_windows(TextSet.pack([]), 4)) == []


def test_evaluation_knows_the_kind_of_what_is_read():
    text = TextSet.pack([b"x = 1", b"y"], context=3, python=True)
    kinds = [text.kind_names[kind] for batch in evaluation_windows(text, 4) for kind in batch[2].flatten().tolist()]
    assert kinds == ["other", "name", "white space", "operator", "white space", "other"]


def test_a_pass_takes_no_byte_twice_and_nearly_all_of_them():
    text = numbered(100, 50, 90)
    seen = targets(text_batches(text, CONFIG, seed=0, epoch=0))
    assert len(set(seen)) == len(seen) == 8 * 3 * (29 // 3)
    assert seen != sorted(seen)


def test_inputs_are_the_bytes_before_and_documents_have_a_beginning():
    text = numbered(100, 50, 90)
    for inputs, wanted in text_batches(text, CONFIG, seed=0, epoch=0):
        expected = torch.where(torch.isin(wanted, text.starts), BEGIN, wanted - 1)
        assert torch.equal(inputs, expected)


@pytest.mark.parametrize("start", [0, 1, 4])
def test_a_run_taken_up_again_sees_the_same_batches(start):
    text = numbered(240)
    config = TextConfig(batch_size=3, epoch_batches=4)
    whole = list(text_batches(text, config, seed=3, epoch=2))
    torch.rand(10)  # the global generator has no say
    assert same(whole[start:], text_batches(text, config, seed=3, epoch=2, start=start))
    assert not same(whole, text_batches(text, config, seed=4, epoch=2))


def test_epochs_of_a_fixed_length_go_on_through_the_text():
    text = numbered(240)
    whole = list(text_batches(text, CONFIG, seed=0, epoch=0)) + list(text_batches(text, CONFIG, seed=0, epoch=1))
    short = TextConfig(batch_size=3, epoch_batches=6)
    epochs = [list(text_batches(text, short, seed=0, epoch=epoch)) for epoch in range(3)]
    assert same([batch for epoch in epochs for batch in epoch], whole)
    assert len(whole) == 18


def test_a_text_shorter_than_a_window_or_a_batch_is_trained_on_as_it_is():
    assert targets(text_batches(numbered(5), CONFIG, seed=0, epoch=0)) == list(range(5))
    (batch,) = text_batches(numbered(20), CONFIG, seed=0, epoch=0)
    assert batch[0].shape == (1, 8)


def test_wrong_requests():
    with pytest.raises(ValueError, match="got 0 bytes"):
        text_batches(TextSet.pack([]), CONFIG, seed=0, epoch=0)
    assert num_text_batches(numbered(240), CONFIG) == 9
    with pytest.raises(ValueError, match="0 to 9; got 10"):
        text_batches(numbered(240), CONFIG, seed=0, epoch=0, start=10)
