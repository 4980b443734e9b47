"""The base of routers: the gate's arithmetic, and where its warning points."""

import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from gatewright import NoisyTopK, TopK
from gatewright.routers.base import Router, gate_logits


@pytest.mark.parametrize("features", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("gate", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_gate_logits_lose_nothing_beyond_what_they_are_given(features, gate, autocast):
    """Whatever is already rounded stays so, but products and sums are exact to the wider type."""
    x, linear = torch.randn(5, 64, dtype=features), nn.Linear(64, 3, bias=False, dtype=gate)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = gate_logits(x, linear)
    exact = x.double() @ linear.weight.double().t()
    wide = torch.float64 in (features, gate)
    assert logits.dtype == (torch.float64 if wide else torch.float32)
    assert_close(logits.double(), exact, rtol=0, atol=1e-12 if wide else 1e-5)


def test_autocast_is_on_again_after_the_gate():
    with torch.autocast("cpu", torch.bfloat16):
        gate_logits(torch.randn(2, 4), nn.Linear(4, 3, bias=False))
        assert torch.is_autocast_enabled("cpu")


def test_a_router_says_what_it_lacks():
    with pytest.raises(TypeError, match="abstract"):
        Router(4, 3, 1)


def warn():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        NoisyTopK(4, 3, 1)
        TopK(4, 3, 1, normalize=True)
    return [warning.filename for warning in caught]


def test_the_warning_points_at_the_callers_line(run_unhooked):
    """Without the run-time checks, which stand between a call and its function."""
    assert run_unhooked(warn) == [__file__, __file__]
