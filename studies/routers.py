"""Every router on the article's CNN, for a few epochs: accuracy, load and dead experts.

    python studies/routers.py FOLDER_OF_PARQUET_FILES runs/routers

Each router replaces the noisy top-2 gate of the recipe cifar10-cnn, with separate experts from the first step on (no
shared beginning), so that the routing alone decides who learns what. Evaluation is on the test set, without noise;
nothing is chosen by it. The hashed router takes a key of each image: the sum of its pixels, which a flip leaves alone.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from gatewright import ModuleExperts, MoE
from gatewright.models import CnnConfig
from gatewright.models.cnn import Cnn
from gatewright.recipes import RECIPES
from gatewright.routers import ROUTERS, Hashed
from gatewright.train import RunConfig, TrackingConfig, train

GROUPS = {"num_groups": 4, "top_k_groups": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {"num_experts": 1},
    **{name: {"router": name} for name in ROUTERS},
    "group-limited": {"router": "group-limited", "router_options": GROUPS},
    "hashed": {},
    "hierarchical": {"router": "hierarchical", "router_options": GROUPS, "top_k": 4},
    "biased-0.01": {"router": "biased", "router_options": {"bias_rate": 0.01}},
    "expert-dropout": {"expert_dropout": 0.1},
    "sinkhorn-load-balance": {"router": "sinkhorn", "losses": {"load_balance": 0.1}},
    "sinkhorn-balanced": {"router": "sinkhorn", "losses": {"importance": 0.1}},
    "top-k-balanced": {"router": "top-k", "losses": {"load_balance": 0.1}},
}
"""What each run changes in the recipe; three routers also with a stronger pull to balance than their default's."""


class ByImage(nn.Module):
    """A mixture of the recipe's experts whose router takes a key of the image that the features came from."""

    def __init__(self, router: Hashed) -> None:
        super().__init__()
        self.mixture = MoE(router, ModuleExperts(lambda: nn.Linear(84, 84), router.num_experts), item_shape=84)
        self.keys = torch.zeros(0, 1, dtype=torch.int64)

    def forward(self, features: Tensor) -> Tensor:
        """Route by the last images' keys."""
        output: Tensor = self.mixture(features, self.keys)
        return output

    def see(self, network: nn.Module, images: tuple[Tensor, ...]) -> None:
        """Take note of the images of a forward, as a hook before it."""
        self.keys = images[0].flatten(1).mul(255).round().sum(1, keepdim=True).long()


def build_hashed(config: CnnConfig, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Make the recipe's CNN with the hashed router, which no flag can name because it needs keys."""
    network = Cnn(replace(config, num_experts=1), image_shape, num_classes)
    network.mixture = ByImage(Hashed(1, config.num_experts, config.top_k))
    network.register_forward_pre_hook(network.mixture.see)
    return network


def runs(epochs: int, seed: int, data: str, output: Path) -> Iterator[RunConfig]:
    """Yield the run of every router, and of the dense twin."""
    recipe = RECIPES["cifar10-cnn"]()
    common: dict[str, Any] = {
        "epochs": epochs,
        "seed": seed,
        "data": replace(recipe.data, path=data),
        "tracking": TrackingConfig(enabled=False),
    }
    for name, changes in VARIANTS.items():
        model = CnnConfig(**{"num_experts": 8, "top_k": 2} | changes)
        yield replace(recipe, recipe=name, model=model, output=str(output / f"{name}-{seed}"), **common)


def row(results: list[dict[str, Any]]) -> str:
    """Return a router's line of the table."""
    accuracies = [100 * result["test_accuracy"] for result in results]
    layers = [next(iter(result["layers"].values()), None) for result in results]
    loads = [layer["max_over_mean_load"] for layer in layers if layer]
    dead = [len(layer["dead_experts"]) for layer in layers if layer]
    seconds = sorted(result["train_seconds"] for result in results)
    return (
        f"| {results[0]['recipe']} | {', '.join(f'{accuracy:.2f}' for accuracy in accuracies)} | "
        f"{', '.join(f'{load:.2f}' for load in loads) or '-'} | {', '.join(map(str, dead)) or '-'} | "
        f"{seconds[0]:.0f} to {seconds[-1]:.0f} s |"
    )


def main() -> None:
    """Train what has no result yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder of parquet files")
    parser.add_argument("output", type=Path, help="folder for the runs")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in arguments.seeds:
        for config in runs(arguments.epochs, seed, arguments.data, arguments.output):
            path = Path(str(config.output)) / "result.json"
            if not path.is_file():
                with patch.object(CnnConfig, "build", build_hashed) if config.recipe == "hashed" else nullcontext():
                    train(config)
            results.setdefault(config.recipe, []).append(json.loads(path.read_text(encoding="utf-8")))
    print("| router | test accuracy, % | max over mean load | dead experts | train time |\n|---|---|---|---|---|")
    print("\n".join(map(row, results.values())))


if __name__ == "__main__":
    main()
