"""Merged experts: what cannot be merged, and inputs that do not fit, are refused."""

import pytest
import torch
from torch import nn

from gatewright import MergedMoE, Soft, TopK
from tests.cases import make_merged


class Counted(nn.Linear):
    def __init__(self):
        super().__init__(8, 8)
        self.register_buffer("count", torch.zeros(()))


def norm(kind):
    return nn.Sequential(nn.Linear(8, 8), kind(8))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MergedMoE(TopK(8, 4), lambda: nn.Linear(8, 8), 3), "chooses among 4 experts and there are 3"),
        (
            lambda: MergedMoE(TopK(8, 2), lambda: norm(nn.BatchNorm1d), 2),
            r"expert 0 \(Sequential\) has 1.running_mean, 1.running_var, 1.num_batches_tracked. Use GroupNorm",
        ),
        (lambda: MergedMoE(TopK(8, 2), Counted, 2), r"no buffers, .* expert 0 \(Counted\) has count"),
        (lambda: MergedMoE(TopK(8, 2), nn.Identity, 2), r"their parameters; expert 0 \(Identity\) has none"),
        (
            lambda: MergedMoE(TopK(8, 2), [nn.Linear(8, 8), nn.Linear(8, 7)]),
            r"one architecture, .* expert 0 has \(8, 8\) and expert 1 \(Linear\) has \(7, 8\) at 'weight'",
        ),
        (
            lambda: MergedMoE(
                TopK(8, 2), [nn.Sequential(nn.Linear(8, 8), nn.LeakyReLU(slope)) for slope in (0.1, 0.2)]
            ),
            r"expert 0 has LeakyReLU\(negative_slope=0.1\) and expert 1 .* has LeakyReLU\(negative_slope=0.2\) at '1'",
        ),
        (
            lambda: MergedMoE(TopK(8, 2), [nn.Linear(8, 8), nn.Linear(8, 8, bias=False)]),
            r"expert 0 has \(8,\) and expert 1 \(Linear\) has None at 'bias'",
        ),
        (
            lambda: MergedMoE(TopK(8, 2), [nn.Sequential(nn.Linear(8, 8), kind()) for kind in (nn.ReLU, nn.GELU)]),
            r"expert 0 has ReLU\(\) and expert 1 .* has GELU\(.*\) at '1'",
        ),
    ],
)
def test_what_cannot_be_merged_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.usefixtures("unchecked")
def test_a_router_that_mixes_items_is_refused():
    with pytest.raises(ValueError, match=r"MergedMoE takes a gatewright.Router for its router; got Soft"):
        MergedMoE(Soft(8, 2), lambda: nn.Linear(8, 8), 2)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("x", "features", "message"),
    [
        (torch.zeros(4, 7), None, r"MergedMoE takes items of shape \(8,\) .* got \(4, 7\)"),
        (torch.zeros(4, 8), torch.zeros(4, 3), r"looks at 8 numbers per item, for 4 items; got features of .*\(4, 3\)"),
    ],
)
def test_an_input_that_does_not_fit_is_refused(x, features, message):
    with pytest.raises(ValueError, match=message):
        make_merged()(x, features)
