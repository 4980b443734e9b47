"""A layer of soft routing: shapes and names. What it shares with every layer is in `tests/contracts`."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from gatewright import GroupedFeedForward, ModuleExperts, Soft, SoftMoE
from tests.cases import SOFT_CASES

pytestmark = pytest.mark.parametrize("case", SOFT_CASES)


def test_items_and_outputs_have_any_shape(case):
    router = SOFT_CASES[case](4, 2)
    moe = SoftMoE(router, ModuleExperts(lambda: nn.Flatten(), 2), item_shape=(2, 3, 3))
    assert moe(torch.randn(2, 3, 2, 3, 3), torch.randn(2, 3, 4)).shape == (2, 3, 18)
    image = torch.randn(1, 1, 2, 3, 3).expand(2, 3, -1, -1, -1)  # a mean of equal items is the item
    assert_close(moe(image, torch.randn(2, 3, 4)), image.flatten(2))


def test_checkpoints_of_every_version_have_these_names(case):
    """Those of 0.1.0, where the layer was a `MoE`, load as they are."""
    moe = SoftMoE(SOFT_CASES[case](8, 3), GroupedFeedForward(3, 8, 16), shared=nn.Linear(8, 8))
    names = ["router.scale", "router.gate.weight", "experts.weight_in", "experts.weight_out"]
    assert [*moe.state_dict()] == [*names, "shared.weight", "shared.bias"]
    assert isinstance(moe.router, Soft)
