from gatewright.models import CnnConfig


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
