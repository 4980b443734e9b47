import pytest
import torch

from gatewright import MoE, aux_loss
from gatewright.models import CnnConfig, DigitsConfig, ImageClassifier

BUILDS = [
    (CnnConfig(), (3, 32, 32), 10),
    (CnnConfig(num_experts=3, top_k=1, router="top-k"), (1, 28, 28), 4),
    (CnnConfig(num_experts=1), (3, 17, 40), 5),
    (DigitsConfig(), (1, 8, 8), 10),
    (DigitsConfig(num_experts=1, width=5), (3, 9, 12), 3),
]


@pytest.mark.parametrize(("config", "shape", "num_classes"), BUILDS)
def test_it_classifies_and_learns(config, shape, num_classes):
    model = config.build(shape, num_classes)
    logits = model(torch.randn(7, *shape))
    assert logits.shape == (7, num_classes)
    has_moe = any(isinstance(module, MoE) for module in model.modules())
    assert has_moe is (config.num_experts > 1)
    (logits.square().mean() + (aux_loss(model) if has_moe else 0)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_cnn_is_the_articles():
    twin = CnnConfig(num_experts=1).build((3, 32, 32), 10)
    sizes = {name: tuple(parameter.shape) for name, parameter in twin.named_parameters() if "weight" in name}
    assert sizes == {
        "conv1.weight": (6, 3, 5, 5),
        "conv2.weight": (16, 6, 5, 5),
        "fc1.weight": (120, 400),
        "fc2.weight": (84, 120),
        "mixture.weight": (84, 84),
        "fc4.weight": (10, 84),
    }
    mixture = CnnConfig(num_experts=8).build((3, 32, 32), 10)
    difference = sum(p.numel() for p in mixture.parameters()) - sum(p.numel() for p in twin.parameters())
    assert difference == 7 * (84 * 84 + 84) + 2 * 8 * 84  # Seven more experts, the gate and the noise.


def test_images_too_small_are_refused():
    with pytest.raises(ValueError, match="at least 16 x 16 pixels; got 15 x 32"):
        CnnConfig().build((3, 15, 32), 10)


def test_the_classifier_standardises_per_channel():
    images = torch.rand(2, 3, 4, 4)
    model = ImageClassifier(torch.nn.Flatten(), [0.1, 0.2, 0.3], [1.0, 2.0, 4.0])
    expected = torch.stack(
        [(images[:, c] - mean) / std for c, (mean, std) in enumerate([(0.1, 1), (0.2, 2), (0.3, 4)])], 1
    )
    torch.testing.assert_close(model(images), expected.flatten(1))
    assert {"mean", "std"} <= set(model.state_dict())
