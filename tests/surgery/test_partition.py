from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from gatewright import TopK
from gatewright.surgery import FeedForward, expose_feed_forward, partition
from tests.surgery.test_split import Gated, plain

EVERYONE = partial(TopK, top_k=4, score_after_top_k=True)


@pytest.mark.parametrize("make", [plain, Gated])
def test_all_parts_with_equal_weights_are_the_dense_block(make):
    block = make()
    model = nn.Sequential(block)
    x = torch.randn(7, 16)
    expected = model(x)
    count = sum(parameter.numel() for parameter in block.parameters())
    partition(model, "0", 4, router=EVERYONE)
    with torch.no_grad():
        model[0].router.gate.weight.zero_()
    assert_close(model.eval()(x), expected, atol=1e-6, rtol=1e-5)
    parts = model[0].experts.experts
    assert sum(parameter.numel() for parameter in parts.parameters()) == count + 3 * 16  # the output's bias, in each
    units = torch.cat([next(part.children()).weight for part in parts])
    assert torch.equal(units.sort(0).values, next(block.children()).weight.sort(0).values)  # each in one part


def test_the_feed_forward_of_a_transformer_layer_is_parted():
    model = expose_feed_forward(nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)))
    partition(model, FeedForward, 4)
    assert model(torch.randn(2, 3, 8)).shape == (2, 3, 8)


def test_units_that_do_not_come_out_even_are_refused():
    with pytest.raises(ValueError, match="got 400 hidden units and 3 experts"):
        partition(nn.Sequential(plain()), "0", 3)
