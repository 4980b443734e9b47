"""Time mixtures of residual networks, whole images as items: ``python -m benchmarks.images``.

The experts are those of the recipe cifar10-resnets, and return as many numbers as an image has, because DeepSpeed's
layer wants that. Its BatchNorm sees the zeros that groups are padded with, so its numbers agree with GroupNorm alone.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.arms import ModuleLoop
from benchmarks.command import chosen, parser
from benchmarks.compare import compare, say
from benchmarks.peers import deepspeed_layer
from benchmarks.results import record
from gatewright import ModuleExperts, MoE, TopK
from gatewright.models.resnet import RESNETS

IMAGE, TOP_K = (3, 32, 32), 2
PIXELS = IMAGE[0] * IMAGE[1] * IMAGE[2]


@dataclass(frozen=True)
class ImageCase:
    """One layer whose experts are small residual networks, with a normalisation."""

    images: int
    experts: int
    norm: str

    def __str__(self) -> str:
        """Show what differs between the cases."""
        return f"{self.images} images, {self.experts} experts, {self.norm}Norm"


CASES = [ImageCase(256, experts, norm) for experts in (8, 40) for norm in ("Batch", "Group")]
QUICK = ImageCase(8, 2, "Group")


class Network(nn.Module):
    """A residual network from flat pixels to as many features."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        shape = RESNETS["small"]
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(shape.width, PIXELS)]
        self.layers = nn.Sequential(nn.Unflatten(1, IMAGE), *shape.parts(IMAGE[0]), *head)
        for parent in list(self.layers.modules()) if norm == "Group" else ():
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.BatchNorm2d):
                    setattr(parent, name, nn.GroupNorm(8, child.num_features))

    def forward(self, x: Tensor) -> Tensor:
        """Return one row of features per row of pixels; a group without rows has none."""
        features: Tensor = self.layers(x)
        return features


class Ensemble(nn.Module):
    """Every image through as many networks as a mixture takes for it, and no router."""

    def __init__(self, networks: list[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of what the networks return."""
        return torch.stack([network(x) for network in self.networks]).sum(0)


def gatewright(gate: Tensor, experts: list[nn.Module]) -> nn.Module:
    """Make our layer of modules."""
    router = TopK(PIXELS, len(experts), TOP_K, score_after_top_k=True)
    with torch.no_grad():
        router.gate.weight.copy_(gate.t())
    return MoE(router, ModuleExperts(experts), losses={}).to(gate)


def deepspeed(gate: Tensor, experts: list[nn.Module]) -> nn.Module:
    """Make DeepSpeed's layer, whose groups come as ``(1, 1, rows, pixels)``."""
    return deepspeed_layer(
        gate, [nn.Sequential(nn.Flatten(0, 2), each, nn.Unflatten(0, (1, 1, -1))) for each in experts], TOP_K
    )


def measure_images(case: ImageCase, device: str, seconds: float) -> dict[str, object]:
    """Check and time every arm of a case; all have copies of the same networks."""
    torch.manual_seed(0)
    networks = [Network(case.norm) for _ in range(case.experts)]
    gate = torch.randn(PIXELS, case.experts, device=device) * PIXELS**-0.5

    def arm(make: Callable[[Tensor, list[nn.Module]], nn.Module]) -> Callable[[], nn.Module]:
        return lambda: make(gate, copy.deepcopy(networks)).to(device)

    arms = {
        "dense": arm(lambda gate, networks: Ensemble(networks[:TOP_K])),
        "gatewright": arm(gatewright),
        "module loop": arm(lambda gate, networks: ModuleLoop(gate, TOP_K, networks)),
        "deepspeed": arm(deepspeed),
    }
    loop = ModuleLoop(gate, TOP_K, copy.deepcopy(networks)).to(device)  # Convolutions in float64 take minutes.
    found = compare(arms, loop, torch.randn(case.images, PIXELS, device=device), seconds)
    return {"case": str(case), "dtype": "float32", "arms": found}


def main() -> None:
    """Measure what was asked for."""
    asked = parser("benchmarks.images", __doc__, seconds=20.0).parse_args()
    for case in chosen(asked, CASES, QUICK):
        say(case)
        record("images", str(case), asked.device, measure_images(case, asked.device, asked.seconds), asked.output)


if __name__ == "__main__":
    main()
