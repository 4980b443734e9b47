"""Adapters of peft on a mixture: LoRA on stacked experts and on the gate."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from gatewright import GroupedFeedForward, ModuleExperts, MoE, TopK, aux_loss
from gatewright.integrations.transformers import register
from tests.integrations.transformers.models import MODELS, TOKENS

peft = pytest.importorskip("peft", "0.21", "peft is missing: pip install 'gatewright[transformers]'")

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft 0.21 reads it.


EXPERTS = {
    "grouped": lambda: GroupedFeedForward(4, 8, 16, activation="swiglu"),
    "modules": lambda: ModuleExperts(lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)), 4),
}
TARGETS = {
    "grouped": {"parameters": ["experts.weight_in", "experts.weight_out"], "modules": ["gate"]},
    "modules": {"modules": ["gate", *(f"experts.{expert}.{layer}" for expert in range(4) for layer in (0, 2))]},
}


def make(kind="grouped"):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), MoE(TopK(8, 4, 2), EXPERTS[kind]()))


def with_adapters(model, *, parameters=(), modules=()):
    config = peft.LoraConfig(r=2, target_modules=list(modules), target_parameters=list(parameters))
    return peft.get_peft_model(copy.deepcopy(model), config).train()


def trained(model, loss):
    """The model after a few steps, in which everything that is to be trained had a gradient."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    for _ in range(3):
        loss(model).backward()
        assert all(parameter.grad is not None for parameter in parameters)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("kind", EXPERTS)
def test_lora_on_experts_and_gate_is_trained_saved_loaded_and_merged(kind, tmp_path):
    """An expert without tokens has gradients, too: zeros."""
    base, x = make(kind), torch.randn(50, 8)
    base[1].router.gate.weight.data[3] = -torch.ones(8)
    base[0].bias.data.fill_(4.0)  # Nothing goes to the last expert.
    model = with_adapters(base, **TARGETS[kind])
    adapters = sum(".lora_A." in name for name, _ in model.named_parameters())
    assert adapters == (3 if kind == "grouped" else 9)
    assert_close(model(x), base(x))
    model = trained(model, lambda model: (model(x) - 1).square().mean() + aux_loss(model))
    output = model(x)
    assert (output - base(x)).abs().max() > 0.01
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert_close(loaded(x), output, rtol=0, atol=1e-6)
    merged = model.merge_and_unload().eval()
    assert_close(merged(x), output, rtol=0, atol=1e-6)
    base.load_state_dict(merged.state_dict())
    assert_close(base.eval()(x), output, rtol=0, atol=1e-6)
    assert type(merged[1].experts) is type(base[1].experts)
    assert base[1].routing.sums.tokens_per_expert[3] == 0


def test_a_forgotten_auxiliary_loss_is_an_error_with_adapters_too():
    model = with_adapters(make(), parameters=["experts.weight_in"])
    with pytest.raises(RuntimeError, match="before this MoE layer's auxiliary loss was taken"):
        model(torch.randn(5, 8)).sum().backward()


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_adapters_of_a_model_of_transformers_train_the_same_by_either_implementation(name):
    register()
    outputs = []
    for implementation in ("eager", "gatewright"):
        model = with_adapters(MODELS[name]().double(), parameters=["experts.gate_up_proj", "experts.down_proj"])
        model.base_model.model.set_experts_implementation(implementation)
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.1)
        model = trained(model, lambda model: model(TOKENS, labels=TOKENS).loss)
        outputs.append(model(TOKENS).logits)
    assert_close(*outputs, rtol=1e-5, atol=1e-5)  # Adam divides by gradients of almost zero.
