"""Gradients of the whole layer, auxiliary losses included, against finite differences in float64."""

import pytest
import torch
from torch.func import functional_call

from gatewright import aux_loss
from gatewright.losses import LOSSES
from tests.cases import make_moe


@pytest.mark.parametrize(
    ("router", "experts", "dispatcher", "top_k"),
    [
        ("noisy-top-k", "grouped-swiglu-bias", "dropless", 2),
        ("noisy-top-k", "modules", "capacity-tight", 1),
        ("top-k", "grouped-feed-forward", "capacity-tight", 2),
        ("top-k-sigmoid-normalized", "grouped-feed-forward", "dropless", 2),
    ],
)
@pytest.mark.usefixtures("unchecked")  # hundreds of forwards
@pytest.mark.filterwarnings("ignore:A capacity of 1 row")
def test_gradcheck(router, experts, dispatcher, top_k):
    moe = make_moe(router, experts, dispatcher, dim=2, num_experts=3, top_k=top_k).double()
    names, parameters = zip(*moe.named_parameters(), strict=True)
    moe.losses = dict.fromkeys(sorted(LOSSES), 0.5)

    def layer(x, *values):
        torch.manual_seed(1)  # the same noise each time
        output = functional_call(moe, dict(zip(names, values, strict=True)), x)
        return output, aux_loss(moe)

    values = [parameter.detach().clone().requires_grad_() for parameter in parameters]
    if router.startswith("top-k"):  # its balance loss holds the share of each expert constant
        moe.losses.pop("load")
    assert torch.autograd.gradcheck(layer, (torch.randn(3, 2, dtype=torch.float64, requires_grad=True), *values))
