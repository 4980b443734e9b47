"""Layers on a CUDA device: the CPU's numbers, half precision, graphs, the same bits in every run, no waiting."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from gatewright import GroupedFeedForward, MoE, aux_loss, seed_noise
from tests.cases import ROUTER_CASES, SOFT_CASES, make_moe, make_router, make_soft_moe
from tests.compare import arguments

LAYERS = {
    **{
        f"{experts}-{router}": (make_moe, router, experts)
        for experts in ("grouped-swiglu-bias", "modules")
        for router in ROUTER_CASES
    },
    **{f"grouped-{router}": (make_soft_moe, router) for router in SOFT_CASES},
}
NO_HOST = [
    "biased",
    "expert-choice",
    "group-limited",
    "hierarchical",
    "noisy-top-k",
    "product-key",
    "sinkhorn",
    "top-k",
]
"""Routers of which nothing waits for the device."""


def make(case, dtype=torch.float64):
    build, *parts = LAYERS[case]
    return build(*parts).to(dtype)


def step(layer, x):
    """Output and gradients of a training step with keyed noise."""
    layer, x = copy.deepcopy(layer), x.clone().requires_grad_()
    seed_noise(layer, 0, 0)
    output = layer(*arguments(layer, x))
    (output.square().sum() + aux_loss(layer)).backward()
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"output": output.detach(), "x": x.grad, **gradients}


@pytest.mark.parametrize("case", LAYERS)
def test_it_computes_what_the_cpu_does(case):
    """In float64, keyed noise included."""
    layer, x = make(case), torch.randn(21, 8, dtype=torch.float64)
    found = {name: value.cpu() for name, value in step(layer.cuda(), x.cuda()).items()}
    assert_close(found, step(layer.cpu(), x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", LAYERS)
def test_two_runs_have_the_same_bits(case):
    layer, x = make(case, torch.float32).cuda(), torch.randn(63, 8, device="cuda")
    torch.use_deterministic_algorithms(True)
    try:
        first, second = step(layer, x), step(layer, x)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in first.items():
        assert value.equal(second[name]), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", ["grouped-swiglu-bias-noisy-top-k", "modules-top-k", "grouped-soft"])
def test_half_precision_stays_near(case, dtype):
    layer, x = make(case, torch.float32).eval().cuda(), torch.randn(21, 8, device="cuda")
    with torch.no_grad():
        exact = layer(x)
        with torch.autocast("cuda", dtype):
            assert_close(layer(x).float(), exact, rtol=0.05, atol=0.05)


def test_a_float16_step_with_scaled_gradients():
    layer, x = make("grouped-swiglu-bias-noisy-top-k", torch.float32).cuda(), torch.randn(64, 8, device="cuda")
    optimizer, scaler = torch.optim.SGD(layer.parameters(), 0.1), torch.amp.GradScaler()
    before = layer.router.gate.weight.detach().clone()
    with torch.autocast("cuda", torch.float16):
        loss = layer(x).square().mean() + aux_loss(layer)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    assert layer.router.gate.weight.isfinite().all()
    assert not layer.router.gate.weight.equal(before)


@pytest.mark.parametrize("router", NO_HOST)
def test_routers_never_wait_for_the_device(router):
    router, features = make_router(router, 8, 9, 2).cuda(), torch.randn(64, 8, device="cuda")
    router(features)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that the mode is a prototype.
        torch.cuda.set_sync_debug_mode("error")
    try:
        router(features).weight.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("router", ["biased", "expert-choice", "group-limited", "noisy-top-k", "sinkhorn", "top-k"])
def test_a_step_is_captured_as_a_graph(router):
    """In bfloat16, of which torch has a grouped GEMM that does not ask the host."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("torch's grouped GEMM asks the host below compute capability 9.0")
    moe = MoE(make_router(router, 64, 8, 2), GroupedFeedForward(8, 64, 128), losses={}).cuda().bfloat16()
    place = torch.randn(128, 64, device="cuda", dtype=torch.bfloat16)

    def forward_and_backward():
        moe.zero_grad()
        output = moe(place)
        output.float().square().sum().backward()
        return output

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            forward_and_backward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = forward_and_backward()
    place.copy_(torch.randn_like(place))
    graph.replay()
    if router != "noisy-top-k":  # which draws other noise in every replay
        assert_close(output, moe(place), rtol=0.02, atol=0.02)
    assert output.isfinite().all()
    assert moe.experts.weight_in.grad.any()


def test_a_model_may_be_moved_there_and_back():
    layer, x = make("modules-noisy-top-k", torch.float32).eval(), torch.randn(5, 8)
    expected = layer(x)
    assert_close(layer.cuda()(x.cuda()).cpu(), expected)
    assert_close(layer.cpu()(x), expected)
    assert isinstance(layer.router.gate, nn.Linear)


@pytest.mark.parametrize("activation", ["gelu", "relu", "swiglu"])
def test_the_triton_kernels_compute_what_plain_torch_does(activation):
    experts = GroupedFeedForward(8, 64, 96, activation=activation)
    moe, x = MoE(make_router("top-k", 64, 8, 2), experts).cuda(), torch.randn(333, 64, device="cuda")
    found = []
    for experts.backend in ("triton", "torch"):
        with torch.autocast("cuda", torch.bfloat16):
            found.append(step(moe, x))
    for name, value in found[0].items():
        assert_close(value.float(), found[1][name].float(), rtol=0.03, atol=0.03 * found[1][name].abs().max().item())


def compiled_beside_plain():
    """Outputs and gradients of a layer with Triton kernels, plain and as one compiled graph."""
    torch.manual_seed(0)
    moe = MoE(make_router("top-k", 64, 8, 2), GroupedFeedForward(8, 64, 96, backend="triton")).cuda().bfloat16()
    x = torch.randn(333, 64, device="cuda", dtype=torch.bfloat16)
    found = []
    for forward in (moe, torch.compile(moe, fullgraph=True)):
        moe.zero_grad()
        output = forward(x)
        (output.float().square().sum() + aux_loss(moe)).backward()
        found.append([output.detach().cpu(), *(parameter.grad.cpu() for parameter in moe.parameters())])
    return found


def test_a_compiled_layer_with_triton_kernels_is_one_graph(run_unhooked):
    for value, wanted in zip(*run_unhooked(compiled_beside_plain), strict=True):
        assert_close(value, wanted, rtol=0.03, atol=0.03 * wanted.abs().max().item())
