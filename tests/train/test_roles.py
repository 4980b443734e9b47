"""Every parameter has the role of the module that holds it."""

import pytest
import torch
from torch import nn

from gatewright import GroupedFeedForward, MergedMoE, ModuleExperts, MoE, ResidualMixture, Soft, SoftMoE, TopK
from gatewright.experts import Experts
from gatewright.routers import ROUTERS
from gatewright.train.roles import parameter_roles


class StackedFilters(Experts):
    """Experts of one's own, whose convolutions are stacked."""

    stacked = True

    def __init__(self):
        super().__init__()
        self.num_experts = 2
        self.filters = nn.Parameter(torch.zeros(2, 4, 3, 5, 5))

    def output_shape(self, item_shape):
        return item_shape

    def forward(self, rows, tokens_per_expert):
        return rows

    def keep(self, start, stop):
        """All of them."""


class Tied(nn.Module):
    """A language model's two ends, which share a matrix; the output layer comes first."""

    def __init__(self):
        super().__init__()
        self.head, self.embedding = nn.Linear(8, 5, bias=False), nn.Embedding(5, 8)
        self.head.weight = self.embedding.weight
        self.positions = nn.Parameter(torch.zeros(1, 7, 8))


GROUPED = {"weight_in": "stacked matrix", "weight_out": "stacked matrix", "bias_in": "bias", "bias_out": "bias"}
LINEAR = {"weight": "matrix", "bias": "bias"}
CASES = {
    "attention": (
        lambda: nn.MultiheadAttention(4, 2),
        {"in_proj_weight": "matrix", "in_proj_bias": "bias", "out_proj.weight": "matrix", "out_proj.bias": "bias"},
    ),
    "convolution": (lambda: nn.Conv1d(3, 2, 1), {"weight": "filter", "bias": "bias"}),
    "norm over images": (lambda: nn.LayerNorm((3, 8, 8)), {"weight": "norm", "bias": "norm"}),
    "tied ends": (Tied, {"head.weight": "embedding", "positions": "other"}),
    "grouped experts": (lambda: GroupedFeedForward(4, 8, 16, bias=True), GROUPED),
    "stacked filters": (StackedFilters, {"filters": "stacked filter"}),
    "experts that are modules": (
        lambda: ModuleExperts([nn.Linear(3, 2)]),
        {f"experts.0.{name}": role for name, role in LINEAR.items()},
    ),
    "mixture": (
        lambda: SoftMoE(Soft(8, 4), GroupedFeedForward(4, 8, 16), shared=nn.Linear(8, 8, bias=False)),
        {
            "router.gate.weight": "gate",
            "router.scale": "bias",
            "experts.weight_in": "stacked matrix",
            "experts.weight_out": "stacked matrix",
            "shared.weight": "matrix",
        },
    ),
    "merged experts": (
        lambda: MergedMoE(TopK(3, 1, 1), [nn.Linear(3, 3)]),
        {"router.gate.weight": "gate", "experts.0.weight": "matrix", "experts.0.bias": "bias"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_parameter_has_the_role_of_the_module_that_holds_it(case):
    make, expected = CASES[case]
    model = make()
    assert list(parameter_roles(model)) == list(model.parameters())
    roles = parameter_roles(model)
    assert {name: roles[parameter] for name, parameter in model.named_parameters()} == expected


@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_has_gates_and_biases_alone(name):
    assert set(parameter_roles(ROUTERS[name](8, 4)).values()) <= {"gate", "bias"}


def test_the_coefficient_of_a_residual_mixture_is_a_gate():
    moe = MoE(TopK(8, 2), GroupedFeedForward(2, 8, 16))
    layer = ResidualMixture(moe, nn.Linear(8, 8))
    roles = parameter_roles(layer)
    assert roles[layer.coefficient.weight] == "gate"
    assert roles[layer.branch.weight] == "matrix"
