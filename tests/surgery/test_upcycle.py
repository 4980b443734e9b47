import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from gatewright import MoE, aux_loss, moe_layers
from gatewright.models import CnnConfig, DigitsConfig, ResNetsConfig
from gatewright.surgery import FeedForward, expose_feed_forward, upcycle, upcycled_state

DENSE = {
    "cnn": (CnnConfig(num_experts=1), (3, 16, 16), "mixture", (84,)),
    "digits": (DigitsConfig(num_experts=1, width=4), (1, 8, 8), "mixture", (64,)),
    "resnets": (ResNetsConfig(num_experts=1, stem_depth=2), (3, 16, 16), "mixture", (64, 8, 8)),
    "filters": (CnnConfig(num_experts=1), (3, 16, 16), "conv2", (6, 6, 6)),
    "linear": (CnnConfig(num_experts=1), (3, 16, 16), nn.Linear, (16,)),
}


@pytest.mark.parametrize("case", DENSE)
def test_a_mixture_of_copies_computes_what_the_dense_network_did(case):
    config, image_shape, match, item_shape = DENSE[case]
    model = config.build(image_shape, 5)
    images = torch.randn(6, *image_shape)
    model(images)  # BatchNorm's statistics are not those of a new network
    expected = model.eval()(images)
    upcycle(model, match, 3, example=images)
    assert_close(model(images), expected, atol=1e-6, rtol=1e-6)
    layer = next(layer for _, layer in moe_layers(model))
    assert layer.item_shape == item_shape


def encoder(layer=nn.TransformerEncoderLayer):
    return layer(8, 2, 16, batch_first=True)


def test_the_feed_forward_of_a_transformer_layer_becomes_a_mixture_that_trains():
    model = nn.TransformerEncoder(encoder(), 2)
    x, padding = torch.randn(3, 5, 8), torch.arange(5).expand(3, 5) >= 4
    expected = model.eval()(x, src_key_padding_mask=padding)
    upcycle(expose_feed_forward(expose_feed_forward(model)), FeedForward, 4)
    assert_close(model(x, src_key_padding_mask=padding), expected, atol=1e-6, rtol=1e-6)
    with torch.no_grad():  # where torch would read the weights of two linear layers
        assert_close(model(x, src_key_padding_mask=padding), expected, atol=1e-6, rtol=1e-6)
    assert [name for name, _ in moe_layers(model)] == ["layers.0.linear1", "layers.1.linear1"]
    (model.train()(x).square().mean() + aux_loss(model)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_feed_forward_of_a_decoder_layer_does_too():
    model = nn.ModuleList([encoder(nn.TransformerDecoderLayer)]).eval()
    x, memory = torch.randn(2, 3, 8), torch.randn(2, 4, 8)
    expected = model[0](x, memory)
    upcycle(expose_feed_forward(model), FeedForward, 2)
    assert_close(model[0](x, memory), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "vit"])
def test_models_of_the_transformers_library_are_upcycled(kind):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "llama":
        model = transformers.LlamaModel(transformers.LlamaConfig(**sizes, vocab_size=50, num_key_value_heads=2))
        example, match = {"input_ids": torch.randint(50, (2, 7))}, "*.mlp"
    else:
        model = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=8, patch_size=4))
        example, match = {"pixel_values": torch.randn(2, 3, 8, 8)}, "*.mlp"
    expected = model.eval()(**example).last_hidden_state
    upcycle(model, match, 4, example=example)
    assert len(list(moe_layers(model))) == 2
    assert_close(model(**example).last_hidden_state, expected, atol=1e-6, rtol=1e-6)


def test_a_module_under_two_names_becomes_one_mixture():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"one": shared, "two": shared})
    upcycle(model, nn.Linear, 2)
    assert model["one"] is model["two"]
    assert isinstance(model["one"], MoE)


def test_the_outermost_of_nested_matches_is_replaced():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))))
    upcycle(model, "0*", 2)
    assert [name for name, _ in moe_layers(model)] == ["0"]


class Mixing(nn.Module):
    """Looks at all items of a batch at once."""

    def forward(self, x):
        return x - x.mean(0)


@pytest.mark.parametrize(
    ("model", "match", "options", "error"),
    [
        (nn.Linear(4, 4), nn.Linear, {}, "matches the model itself"),
        (nn.Sequential(nn.Linear(4, 4)), "*.mlp", {}, r"No module matches '\*\.mlp'\. Choose among: 0 \(Linear\)"),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), "0", {}, "Pass example, an input of the model, or item_shape"),
        (nn.Sequential(nn.Linear(4, 4)), "0", {"item_shape": 5}, r"does not take items of shape \(5,\)"),
        (nn.Sequential(Mixing()), "0", {"example": torch.randn(4, 3)}, "routed one by one, and 0 .Mixing. mixes them"),
    ],
)
def test_what_cannot_be_upcycled_is_refused_and_left_as_it_was(model, match, options, error):
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=error):
        upcycle(model, match, 4, **options)
    assert repr(model) == repr(before)


def test_the_state_of_a_dense_network_is_named_as_the_mixtures():
    """Parameters, buffers, and what an optimizer keeps, which has an ending of its own."""
    dense, mixture = DigitsConfig(num_experts=1, width=4), DigitsConfig(num_experts=3, width=4)
    torch.manual_seed(1)
    network = dense.build((1, 8, 8), 5).eval()
    model = mixture.build((1, 8, 8), 5).eval()
    state = {**network.state_dict(), "mixture.0.weight|exp_avg": 1, "features.0.bias|step": 2}
    upcycled = upcycled_state(state, model)
    assert upcycled.pop("features.0.bias|step") == 2
    assert [upcycled.pop(f"mixture.experts.experts.{expert}.0.weight|exp_avg") for expert in range(3)] == [1, 1, 1]
    assert model.state_dict().keys() - upcycled.keys() == {"mixture.router.gate.weight", "mixture.router.noise.weight"}
    model.load_state_dict(upcycled, strict=False)
    images = torch.randn(4, 1, 8, 8)
    assert_close(model(images), network(images), atol=1e-6, rtol=1e-6)
