"""The base of routers: the gate's arithmetic, and where its warning points."""

import warnings
from itertools import product

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from gatewright import Biased, ExpertChoice, GroupLimited, Hierarchical, NoisyTopK, Sinkhorn, TopK
from gatewright.routers.gate import Gate, gate_logits
from tests.cases import ROUTER_CASES, SOFT_CASES, make_router


def test_gate_logits_lose_nothing_beyond_what_they_are_given():
    """Whatever is already rounded stays so, but products and sums are exact to the wider type."""
    for features, gate, autocast in product(
        [torch.bfloat16, torch.float16, torch.float32, torch.float64],
        [torch.bfloat16, torch.float32, torch.float64],
        [False, True],
    ):
        x, linear = torch.randn(5, 64, dtype=features), Gate(64, 3, bias=False, dtype=gate)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = gate_logits(x, linear)
        exact = x.double() @ linear.weight.double().t()
        wide = torch.float64 in (features, gate)
        assert logits.dtype == (torch.float64 if wide else torch.float32)
        assert_close(logits.double(), exact, rtol=0, atol=1e-12 if wide else 1e-5)


def test_autocast_is_on_again_after_the_gate():
    with torch.autocast("cpu", torch.bfloat16):
        gate_logits(torch.randn(2, 4), Gate(4, 3, bias=False))
        assert torch.is_autocast_enabled("cpu")


def warn():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        NoisyTopK(4, 3, 1)
        TopK(4, 3, 1, normalize=True)
        Biased(4, 3, 1)
        GroupLimited(4, 3, 1)
    return [warning.filename for warning in caught]


def test_the_warning_points_at_the_callers_line(run_unhooked):
    """Without the run-time checks, which stand between a call and its function."""
    assert run_unhooked(warn) == [__file__] * 4


class LowRank(nn.Module):
    """An adapter round a linear layer, as LoRA puts it there."""

    def __init__(self, base):
        super().__init__()
        self.base, self.down, self.up = (
            base,
            nn.Linear(base.in_features, 2, bias=False),
            nn.Linear(2, base.out_features),
        )

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def gates_of(router):
    return [(name, module) for name, module in router.named_modules() if isinstance(module, Gate)]


@pytest.mark.parametrize("case", [*ROUTER_CASES, *SOFT_CASES])
def test_every_gate_is_called_as_a_module(case):
    """Hooks fire, and an adapter round it counts and learns."""
    router = make_router(case, 8, 9, 2) if case in ROUTER_CASES else SOFT_CASES[case](8, 3)
    for gate in router.children():
        nn.init.normal_(gate.weight) if isinstance(gate, Gate) else None
    fired = []
    for name, gate in gates_of(router):
        gate.register_forward_hook(lambda module, args, output, name=name: fired.append(name))
        parent, _, attribute = name.rpartition(".")
        setattr(router.get_submodule(parent), attribute, LowRank(gate))
    torch.manual_seed(0)
    features = torch.randint(9, (6, 8)) if case == "hashed" else torch.randn(6, 8)
    found = router(features)
    routing = getattr(found, "routing", found)
    assert len(fired) == len(gates_of(router))
    assert fired or case == "hashed"
    if fired:
        (routing.sums.router_z + routing.weight.square().sum() + routing.sums.load.sum()).backward()
        adapters = [module for module in router.modules() if isinstance(module, LowRank)]
        assert all(adapter.up.bias.grad.any() for adapter in adapters)


def test_another_module_may_be_the_gate_and_its_bias_counts():
    router = TopK(8, 4, 1).eval()
    router.gate = nn.Linear(8, 4)
    nn.init.zeros_(router.gate.weight)
    router.gate.bias.data = torch.tensor([0.0, 0.0, 5.0, 0.0])
    assert router(torch.randn(6, 8)).sums.tokens_per_expert.tolist() == [0, 0, 6, 0]
    with torch.autocast("cpu", torch.bfloat16):
        assert router(torch.randn(6, 8).bfloat16()).logits.dtype == torch.float32
    router.gate = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)).bfloat16()
    assert router(torch.randn(6, 8)).logits.dtype == torch.float32


def test_a_gate_bias_is_an_option_and_starts_at_zero():
    for router in [Biased, ExpertChoice, GroupLimited, Hierarchical, NoisyTopK, Sinkhorn, TopK]:
        router = router(8, 6, 2, gate_bias=True).eval()
        (bias,) = [parameter for name, parameter in router.named_parameters() if name.endswith("gate.bias")]
        assert not bias.any()
        nn.init.constant_(bias[:1], 3.0)
        for name, parameter in router.named_parameters():
            if name.endswith("weight"):
                nn.init.zeros_(parameter)
        logits = router(torch.randn(5, 8)).logits
        assert_close(logits, bias.detach().expand(5, 6) if bias.numel() == 6 else logits)
        assert (logits[:, 0] == 3).all()
