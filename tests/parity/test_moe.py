"""The layer against the reference: outputs, and gradients of the input and of every parameter, at awkward sizes.

Every combination at a usual size is in `tests/test_promises.py`.
"""

import pytest
import torch
from torch import nn

from gatewright import Capacity, ModuleExperts, MoE, SoftMoE
from tests.cases import DISPATCHER_CASES, ROUTER_CASES, SOFT_CASES, make_moe, make_router, make_soft_moe
from tests.compare import by_the_layer, by_the_reference, differences, results

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 6e-2}

pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.filterwarnings("ignore:A capacity of 1 row")]


def check(moe, x, dtype, features=None):
    """Compare; in bfloat16 with the loops in float32."""
    moe = moe.to(dtype)
    inputs = [tensor.to(dtype) for tensor in (x, features) if tensor is not None]
    upstream = torch.randn(len(x), *moe.output_shape, dtype=dtype)
    actual = results(by_the_layer, moe, inputs, upstream)
    exact = torch.float32 if dtype == torch.bfloat16 else dtype
    given = [tensor.to(exact) for tensor in inputs]
    expected = results(by_the_reference, moe.to(exact), given, upstream.to(exact))
    for name, difference in differences(actual, expected).items():
        assert difference <= TOLERANCE[dtype], name


def situation(name, router, experts, dispatcher, dim):
    """A layer and its input. The first feature is always 1, so that its gate weight is a bias."""
    sizes = {"one-token": (1, 2), "63-tokens": (63, 2), "idle": (9, 2), "one-takes-all": (9, 1), "all-chosen": (9, 5)}
    num_tokens, top_k = sizes[name]
    moe = make_moe(router, experts, dispatcher, dim=dim, top_k=top_k)
    with torch.no_grad():
        if name == "one-takes-all":
            moe.router.gate.weight[1, 0] = 20.0
        if name == "idle":
            moe.router.gate.weight[1, 0] = -20.0
    x = torch.randn(num_tokens, dim)
    x[:, 0] = 1
    return moe, x


@pytest.mark.parametrize("name", ["one-token", "63-tokens", "idle", "one-takes-all", "all-chosen"])
@pytest.mark.parametrize("experts", ["grouped-swiglu-bias", "modules-different"])
@pytest.mark.parametrize("dispatcher", ["dropless", "capacity-tight"])
def test_awkward_sizes(name, experts, dispatcher):
    """Rows of 32 bytes, which torch's grouped GEMM takes, rows of 28, and bfloat16."""
    for router, dtype, dim in (
        ("noisy-top-k", torch.float32, 8),
        ("top-k", torch.float32, 7),
        ("top-k", torch.bfloat16, 8),
    ):
        moe, x = situation(name, router, experts, dispatcher, dim)
        check(moe, x, dtype)
        if name in ("idle", "one-takes-all") and dispatcher == "dropless":
            chosen = moe.router(x.to(moe.router.gate.weight)).sums.tokens_per_expert.tolist()
            assert chosen[1] == (0 if name == "idle" else len(x))


@pytest.mark.parametrize("router", ROUTER_CASES)
def test_evaluation(router):
    check(make_moe(router, "modules", "capacity-tight").eval(), torch.randn(9, 8), torch.float64)


@pytest.mark.parametrize("router", SOFT_CASES)
def test_soft_routing(router):
    for experts in ("grouped-swiglu-bias", "modules-different"):
        for dtype, dim, num_tokens in ((torch.float64, 7, 9), (torch.float32, 8, 63), (torch.bfloat16, 8, 9)):
            moe = make_soft_moe(router, experts, dim=dim)
            for training in (True, False):
                check(moe.train(training), torch.randn(num_tokens, dim), dtype)
    if router != "soft-groups":
        for num_experts in (1, 4):
            check(make_soft_moe(router, num_experts=num_experts), torch.randn(1, 8), torch.float64)


class Residual(nn.Module):
    def __init__(self, dim, norm):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(dim, dim), norm(dim), nn.ReLU(), nn.Linear(dim, dim, bias=False))

    def forward(self, x):
        return x + self.layers(x)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dispatcher", ["dropless", "capacity-tight"])
def test_different_architectures_with_and_without_batch_norm(dispatcher, training):
    """Each BatchNorm sees its expert's rows as one batch, in the layer as in the loops; buffers are compared too."""
    experts = [
        Residual(6, nn.BatchNorm1d),
        nn.Linear(6, 6),
        nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6)),
        nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 6)),
    ]
    moe = MoE(make_router("noisy-top-k", 6, 4, 2), ModuleExperts(experts), dispatcher=DISPATCHER_CASES[dispatcher]())
    check(moe.train(training), torch.randn(40, 6), torch.float64)


@pytest.mark.parametrize(("num_tokens", "own_features"), [(1, False), (13, True)])
def test_images_through_convolutions(num_tokens, own_features):
    def expert(width):
        layers = [nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width, 10))

    router = make_router("noisy-top-k", 4 if own_features else 75, 3, 2)
    moe = MoE(
        router, ModuleExperts([expert(2), expert(3), expert(4)]), item_shape=(3, 5, 5), dispatcher=Capacity(0.7, 1)
    )
    features = torch.randn(num_tokens, 4) if own_features else None
    check(moe, torch.randn(num_tokens, 3, 5, 5), torch.float64, features)


@pytest.mark.parametrize(("router", "own_features"), [("soft", False), ("soft-groups", True)])
def test_images_in_soft_mixtures(router, own_features):
    def expert(width):
        return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(9 * width, 10))

    experts = ModuleExperts([expert(2), expert(3)])
    moe = SoftMoE(SOFT_CASES[router](4 if own_features else 75, 2), experts, item_shape=(3, 5, 5))
    features = torch.randn(6, 4) if own_features else None
    check(moe, torch.randn(6, 3, 5, 5), torch.float64, features)
