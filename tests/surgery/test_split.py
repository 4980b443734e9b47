import itertools

import pytest
import torch
from torch import nn

from gatewright.surgery import FeedForward, add_noise, reinitialize, upcycle

DIM, UNITS = 16, 400


class Gated(nn.Module):
    """The feed-forward block of Llama, its last layer registered in the middle."""

    def __init__(self):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(DIM, UNITS), nn.Linear(UNITS, DIM), nn.Linear(DIM, UNITS)

    def forward(self, x):
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


def plain():
    return FeedForward(nn.Linear(DIM, UNITS), nn.ReLU(), nn.Dropout(0.0), nn.Linear(UNITS, DIM))


def upcycled(block):
    return upcycle(nn.Sequential(block), "0", 3)


@pytest.mark.parametrize("make", [plain, Gated])
def test_a_share_of_the_hidden_units_is_drawn_anew_in_all_matrices(make):
    block = make()
    into, out = (block.linear1, block.linear2) if make is plain else (block.w1, block.w2)
    before = {id(layer): layer.weight.detach().clone() for layer in (into, out)}
    model = upcycled(block)
    assert reinitialize(model, 0.25, generator=torch.Generator().manual_seed(0)) is model
    chosen = []
    for expert in model[0].experts.experts:
        new_in, new_out = (expert.linear1, expert.linear2) if make is plain else (expert.w1, expert.w2)
        rows = (new_in.weight != before[id(into)]).all(1)
        columns = (new_out.weight != before[id(out)]).all(0)
        assert torch.equal(rows, columns)
        assert torch.equal((new_in.weight != before[id(into)]).any(1), rows)
        assert int(rows.sum()) == UNITS // 4
        drawn = new_in.weight[rows].detach()
        assert abs(float(drawn.std() / before[id(into)].std()) - 1) < 0.1  # of 1,600 values
        chosen.append(rows)
    assert not any(torch.equal(one, other) for one, other in itertools.pairwise(chosen))


def test_noise_is_a_share_of_each_parameters_own_spread():
    block = plain()
    with torch.no_grad():
        block.linear2.weight *= 100
    model = upcycled(block)
    assert add_noise(model, 0.1, generator=torch.Generator().manual_seed(0)) is model
    first, second, _ = model[0].experts.experts
    for name in ("linear1", "linear2"):
        old, new = getattr(block, name).weight.detach(), getattr(first, name).weight.detach()
        assert abs(float((new - old).std() / old.std()) - 0.1) < 0.01
    assert not torch.equal(first.linear1.weight, second.linear1.weight)


@pytest.mark.parametrize(
    ("act", "error"),
    [
        (lambda: add_noise(upcycled(plain()), -1.0), "scale is finite and not negative; got -1.0"),
        (lambda: reinitialize(upcycled(plain()), 1.5), r"share lies in \[0, 1\]; got 1.5"),
        (lambda: reinitialize(nn.Sequential(plain())), "Call upcycle first"),
        (lambda: reinitialize(upcycled(nn.Linear(4, 5))), "the linear layers of this Linear are 4 -> 5"),
    ],
)
def test_what_cannot_be_split_is_refused(act, error):
    with pytest.raises(ValueError, match=error):
        act()
