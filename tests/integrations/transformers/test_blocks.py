"""Blocks of transformers as Gatewright's layers, and back; and a dense model of transformers that is upcycled."""

import copy

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch.testing import assert_close

from gatewright import GroupedFeedForward, aux_loss, moe_layers, surgery
from gatewright.integrations.transformers import from_transformers, to_transformers
from tests.integrations.transformers.models import MODELS, SIZES, TOKENS, transformers

AS_FLOAT32 = {"rtol": 1e-5, "atol": 2e-6}  # In which transformers takes the softmax, whatever the model's type.


def unnormalised():
    """Of Qwen3-MoE, with weights that do not sum to 1."""
    sizes = {"intermediate_size": 24, "moe_intermediate_size": 20, "num_experts": 6, "norm_topk_prob": False}
    return transformers.AutoModelForCausalLM.from_config(transformers.Qwen3MoeConfig(**SIZES, **sizes))


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("make", [*MODELS.values(), unnormalised], ids=[*MODELS, "unnormalised"])
def test_a_model_computes_and_learns_the_same_with_its_mixtures_as_layers_and_goes_back(make):
    original = make().double()
    original.set_experts_implementation("eager")  # Others take no float64.
    model = from_transformers(copy.deepcopy(original), losses={})
    assert [name for name, _ in moe_layers(model)] == ["model.layers.0.mlp.layer", "model.layers.1.mlp.layer"]
    for each in (original, model):
        each.train()(TOKENS).logits.square().mean().backward()
    assert_close(model(TOKENS).logits, original(TOKENS).logits, **AS_FLOAT32)
    for parameter in model.parameters():  # Gradients take the way of the weights.
        parameter.data, parameter.grad = parameter.grad, parameter.detach().clone()
    back = to_transformers(copy.deepcopy(model))
    assert_close(dict(back.named_parameters()), gradients(original), **AS_FLOAT32)
    for parameter in model.parameters():
        parameter.data = parameter.grad
    back = to_transformers(model)
    assert back is model
    assert back.model.layers[0].mlp.experts.config is back.config
    assert_close(back.state_dict(), original.state_dict(), rtol=0, atol=0)
    assert torch.equal(back(TOKENS).logits, original(TOKENS).logits)


def test_the_layers_lose_experts_and_then_stay_layers():
    model = from_transformers(MODELS["gpt_oss"]())
    surgery.select(model, [0, 2, 3])
    assert model(TOKENS).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"that its config says: 4, of which 2 for each token; the layer has 3 and 2"):
        to_transformers(model)
    with pytest.raises(ValueError, match=r"has a ClampedSwiGLU. Call merge or prune"):
        surgery.densify(model)


def test_what_cannot_become_a_layer_is_refused():
    config = transformers.MixtralConfig(**SIZES, intermediate_size=24, num_local_experts=4, hidden_act="gelu")
    with pytest.raises(ValueError, match=r"has the activation SiLU, and this block has GELUActivation. Use `register`"):
        from_transformers(transformers.AutoModelForCausalLM.from_config(config))
    with pytest.raises(ValueError, match=r"has none of the blocks that are exchanged: MixtralSparseMoeBlock, "):
        from_transformers(llama())


def llama():
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES, intermediate_size=24))


def test_a_dense_llama_is_upcycled_trained_saved_and_loaded(tmp_path):
    model = llama()
    before = model.eval()(TOKENS).logits
    surgery.upcycle(model, "*.mlp", 4)
    assert_close(model.eval()(TOKENS).logits, before)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(TOKENS, labels=TOKENS).loss
        (loss + aux_loss(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    save_model(model, tmp_path / "llama.safetensors")
    loaded = surgery.upcycle(llama(), "*.mlp", 4)
    load_model(loaded, tmp_path / "llama.safetensors")
    assert torch.equal(loaded.eval()(TOKENS).logits, model.eval()(TOKENS).logits)
    assert not any(isinstance(layer.experts, GroupedFeedForward) for _, layer in moe_layers(loaded))
