"""Gatewright as transformers' experts implementation: models compute by it what they compute by their own loops."""

import copy
import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from gatewright.integrations.transformers import register
from gatewright.ops import feed_forward
from tests.integrations.transformers.models import MODELS, TOKENS

SIZES = {
    "hidden_size": 12, "intermediate_size": 10, "moe_intermediate_size": 10, "moe_hidden_size": 12,
    "num_local_experts": 5, "n_routed_experts": 5, "moe_num_experts": 5, "moe_latent_size": None,
    "hidden_act": "silu", "mlp_hidden_act": "relu", "swiglu_alpha": 1.7, "swiglu_limit": 7.0, "post_norm_eps": 1e-6,
}  # fmt: skip
EXPERTS = {
    "gate": ("mixtral.MixtralExperts", {}),
    "gate of another activation": ("mixtral.MixtralExperts", {"hidden_act": "gelu"}),
    "no gate": ("nemotron_h.NemotronHExperts", {}),
    "no gate, other activation": ("nemotron_h.NemotronHExperts", {"mlp_hidden_act": "relu2"}),
    "stored as (inputs, outputs)": ("aria.AriaExperts", {}),
    "biases and a gate of its own": ("openai_privacy_filter.OpenAIPrivacyFilterExperts", {}),
    "interleaved gate": ("gpt_oss.GptOssExperts", {}),
    "norm": ("muse_spark.MuseSparkExperts", {}),
}


@pytest.fixture(autouse=True)
def _registered():
    register()


def make_experts(name):
    path, options = EXPERTS[name]
    room, kind = path.split(".")
    config = SimpleNamespace(**{**SIZES, **options, "_experts_implementation": "eager"})
    experts = getattr(importlib.import_module(f"transformers.models.{room}.modeling_{room}"), kind)(config)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return experts


def experts_step(experts, implementation, dtype, elsewhere):
    """Output and gradients; some experts may be in another process, whose weight is then zero."""
    experts, generator = copy.deepcopy(experts).to(dtype), torch.Generator().manual_seed(0)
    experts.config._experts_implementation, experts._is_expert_parallel = implementation, elsewhere
    x = torch.randn(9, 12, generator=generator).to(dtype).requires_grad_()
    index = torch.rand(9, 5, generator=generator).topk(2).indices
    weight = torch.rand(9, 2, generator=generator)  # Of float32, as routers of bfloat16 models return it.
    if elsewhere:
        index[::3] = index[1, 0] = experts.num_experts
        weight = weight.masked_fill(index == experts.num_experts, 0)
    weight = weight.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    output = experts(x, index, weight)
    output.square().sum().backward()
    # Nothing reads a router's gradient for an expert that another process has.
    of_weight = weight.grad.masked_fill(index == experts.num_experts, 0)
    return [output.detach(), x.grad, of_weight, *(each.grad for each in experts.parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", EXPERTS)
def test_every_kind_of_experts_computes_what_its_loop_does(name, dtype):
    experts = make_experts(name)
    exact = experts_step(experts, "eager", torch.float64, False)
    ours, theirs = (experts_step(experts, each, dtype, False) for each in ("gatewright", "eager"))
    for found, own, expected in zip(ours, theirs, exact, strict=True):
        assert found.dtype == own.dtype
        size = expected.norm()
        assert (found - expected).norm() / size <= 2 * (own - expected).norm() / size + 1e-6


@pytest.mark.parametrize("name", ["gate", "stored as (inputs, outputs)"])
def test_experts_of_another_process_are_left_out(name):
    experts = make_experts(name)
    assert_close(*(experts_step(experts, each, torch.float64, True) for each in ("gatewright", "eager")))


def model_step(model, implementation):
    model = copy.deepcopy(model)
    model.set_experts_implementation(implementation)
    logits = model(TOKENS).logits
    logits.square().mean().backward()
    return {"logits": logits.detach()} | {name: each.grad for name, each in model.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
def test_models_compute_what_their_loops_do(name):
    model = MODELS[name]().double()
    assert_close(*(model_step(model, each) for each in ("gatewright", "eager")))


def test_parameters_are_not_copied(monkeypatch):
    calls, run = [], feed_forward._run_forward
    monkeypatch.setattr(feed_forward, "_run_forward", lambda *inputs: (calls.append(inputs), run(*inputs))[1])
    model = MODELS["mixtral"]()
    model.set_experts_implementation("gatewright")
    model(TOKENS).logits.sum().backward()
    for layer, call in zip(model.model.layers, calls, strict=True):
        for stored, used in zip((layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj), call[1:3], strict=True):
            assert used.data_ptr() == stored.data_ptr()
            assert stored.grad.is_contiguous()


def test_autocast_computes_in_its_type_and_returns_the_tokens():
    experts = make_experts("gate")
    exact = experts_step(experts, "eager", torch.float32, False)
    with torch.autocast("cpu", torch.bfloat16):
        found = experts_step(experts, "gatewright", torch.float32, False)
    for rounded, expected in zip(found, exact, strict=True):
        assert rounded.dtype == torch.float32
        assert 0 < (rounded - expected).norm() <= 0.02 * expected.norm()


def compiled(name):
    register()
    torch.manual_seed(0)
    model = MODELS[name](experts_implementation="gatewright").eval()
    expected = model(TOKENS).logits
    model.model = torch.compile(model.model, backend="aot_eager", fullgraph=True)
    found = model(TOKENS).logits
    assert_close(found, expected, rtol=1e-4, atol=1e-4)
    found.sum().backward()


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_a_model_is_one_graph(name, run_unhooked):
    run_unhooked(compiled, name)


def test_a_transformers_that_is_too_old_is_named(monkeypatch):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.1")
    with pytest.raises(ImportError, match=r"from version 5.20 on; found 4.57.1. Run: pip install 'gatewright"):
        register()
