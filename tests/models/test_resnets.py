from dataclasses import replace

import pytest
import torch
from torch import nn

from gatewright import moe_layers
from gatewright.models import RESNETS, ResNetsConfig
from gatewright.models.resnets import gate_features


def on_meta(config, num_classes=10, shape=(3, 32, 32)):
    """A network without memory: its sizes and shapes are real, its numbers are not."""
    with torch.device("meta"):
        return config.build(shape, num_classes)


def millions(module):
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


@pytest.mark.parametrize(
    ("resnet", "feature_size", "size"),
    [("small", None, 0.4747), ("article", 3072, 13.1), ("resnet18", None, 11.2), ("resnet34", None, 21.3)],
)
def test_experts_have_the_published_size(resnet, feature_size, size):
    model = on_meta(ResNetsConfig(num_experts=2, resnet=resnet, feature_size=feature_size))
    ((_, layer),) = moe_layers(model)
    assert [millions(expert) for expert in layer.experts.experts] == pytest.approx([size] * 2, rel=0.01)


def test_every_network_takes_small_images():
    configs = [ResNetsConfig(num_experts=2, resnet=resnet) for resnet in RESNETS]
    configs += [
        replace(configs[0], **change) for change in ({"emit": "logits"}, {"feature_size": 40}, {"stem_depth": 1})
    ]
    for config in configs:
        ((_, layer),) = moe_layers(on_meta(config, shape=(3, 28, 28)))
        dense = on_meta(replace(config, num_experts=1), shape=(3, 28, 28)).eval()
        assert dense(torch.empty(4, 3, 28, 28, device="meta")).shape == (4, 10)
        items = dense.stem(torch.empty(4, 3, 28, 28, device="meta"))
        assert dense.mixture(items).shape == (4, *layer.output_shape)


def test_the_stem_is_shared_and_the_rest_is_not():
    for stem_depth in [0, 1, 2, 3]:
        config = ResNetsConfig(num_experts=2, stem_depth=stem_depth)
        model, whole = on_meta(config), on_meta(replace(config, stem_depth=0, num_experts=1))
        ((_, layer),) = moe_layers(model)
        assert len(model.stem) == stem_depth
        assert millions(model.stem) + millions(layer.experts.experts[0]) == pytest.approx(millions(whole.mixture))
        assert layer.item_shape == tuple(model.stem.eval()(torch.empty(1, 3, 32, 32, device="meta")).shape[1:])
        assert model.router_features[0].in_channels == layer.item_shape[0]  # the router looks at what the experts get


def test_experts_keep_a_part_of_the_network():
    for resnet, parts in [("small", 4), ("article", 9), ("resnet18", 9), ("resnet34", 17)]:
        ResNetsConfig(resnet=resnet, stem_depth=parts - 1)
        with pytest.raises(
            ValueError, match=rf"`model.stem_depth` is between 0 and {parts - 1}, so that experts keep a part"
        ):
            ResNetsConfig(resnet=resnet, stem_depth=parts)


def test_experts_that_emit_logits_classify_themselves():
    """Also where there are as many classes as the network has features."""
    for num_classes in [10, 128]:
        model = on_meta(ResNetsConfig(num_experts=2, emit="logits"), num_classes)
        ((_, layer),) = moe_layers(model)
        assert isinstance(model.classifier, nn.Identity)
        assert all(isinstance(expert[-1], nn.Linear) for expert in layer.experts.experts)
        assert layer.output_shape == (num_classes,)


def test_the_router_sees_standardised_features_of_its_own():
    features = gate_features(3, 12)(torch.rand(64, 3, 16, 16) * 5 + 3)
    assert features.shape == (64, 12)
    assert features.mean(0).abs().max() < 1e-4
    assert (features.std(0, correction=0) - 1).abs().max() < 0.05
