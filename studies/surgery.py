"""What operations on the experts of a trained mixture do: accuracy before, right after, and an epoch later.

    python -m studies.surgery

A network with one mixture of eight experts, of which two see each image, learns the handwritten digits of scikit-learn
for 20 epochs. Each operation then changes a copy of it and of its optimizer, and both go on for one epoch. Experts are
measured on the training images; accuracy is that on 360 test images. The figures go to
studies/results/surgery/digits.json.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean, stdev
from types import MappingProxyType
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gatewright import GroupedFeedForward, MoE, TopK, aux_loss, moe_layers
from gatewright.surgery import densify, expert_scores, grow, merge, prune, select
from gatewright.train.result import hardware, versions, write_json

RESULTS = Path(__file__).parent / "results" / "surgery" / "digits.json"
EPOCHS, BATCH = 20, 32
Operation = Callable[[nn.Module, torch.optim.Optimizer, Tensor], Any]

OPERATIONS: Mapping[str, Operation] = MappingProxyType(
    {
        "nothing": lambda model, optimizer, x: None,
        "select: the first 4": lambda model, optimizer, x: select(model, range(4), optimizer=optimizer),
        "prune to 4, by load": lambda model, optimizer, x: _prune(model, optimizer, x, "load"),
        "prune to 4, by contribution": lambda model, optimizer, x: _prune(model, optimizer, x, "contribution"),
        "merge to 4": lambda model, optimizer, x: merge(model, 4, optimizer=optimizer),
        "grow to 16 of which 4": lambda model, optimizer, x: grow(model, 16, top_k=4, noise=0.01, optimizer=optimizer),
        "densify, by load": lambda model, optimizer, x: densify(model, expert_scores(model, [x], "load")),
    }
)


def _prune(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, by: Any) -> None:
    prune(model, 4, expert_scores(model, [x], by), optimizer=optimizer)


class Residual(nn.Module):
    """``x + moe(x)``.

    Args:
        moe: The mixture.
    """

    def __init__(self, moe: nn.Module) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, x: Tensor) -> Tensor:
        """Add what the mixture makes of the input."""
        output: Tensor = x + self.moe(x)
        return output


def new_model() -> nn.Module:
    """Return a network from 64 pixels to 10 classes."""
    mixture = MoE(TopK(64, 8, top_k=2, normalize=True), GroupedFeedForward(8, 64, 64, activation="relu", bias=True))
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), Residual(mixture), nn.Linear(64, 10))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, epochs: int) -> None:
    """Train for some epochs."""
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(BATCH):
            loss = cross_entropy(model(x[index]), y[index])
            if any(True for _ in moe_layers(model)):
                loss = loss + aux_loss(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the share of images that are classified right."""
    return float((model.eval()(x).argmax(1) == y).double().mean())


def run(seed: int) -> dict[str, dict[str, float]]:
    """Train one network, and try every operation on a copy of it."""
    torch.manual_seed(seed)
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images / 16, labels, test_size=360, random_state=seed, stratify=labels)
    x, test_x = (torch.as_tensor(each, dtype=torch.float32) for each in split[:2])
    y, test_y = (torch.as_tensor(each) for each in split[2:])
    trained = new_model()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=2e-3)
    train(trained, optimizer, x, y, EPOCHS)
    before, found = accuracy(trained, test_x, test_y), {}
    for name, operate in OPERATIONS.items():
        model, its_optimizer = copy.deepcopy((trained, optimizer))
        start = time.perf_counter()
        operate(model, its_optimizer, x)
        seconds = time.perf_counter() - start
        right_after = accuracy(model, test_x, test_y)
        if name.startswith("densify"):
            its_optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        torch.manual_seed(seed)
        train(model, its_optimizer, x, y, 1)
        later, parameters = accuracy(model, test_x, test_y), sum(each.numel() for each in model.parameters())
        figures = {"before": before, "right_after": right_after, "later": later}
        found[name] = figures | {"parameters": parameters, "seconds": seconds}
    return found


def main() -> None:
    """Run some seeds, and print a row for each operation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    runs = {seed: run(seed) for seed in parser.parse_args().seeds}
    for name in OPERATIONS:
        rows = [found[name] for found in runs.values()]
        shares = ([100 * row[key] for row in rows] for key in ("before", "right_after", "later"))
        cells = [f"{mean(values):.2f} % ± {stdev(values):.2f}" for values in shares]
        print(f"| {name} | {' | '.join(cells)} | {rows[0]['parameters']:,} | {mean(r['seconds'] for r in rows):.3f} |")
    write_json({"runs": runs, "versions": versions(), "hardware": hardware(torch.device("cpu"))}, RESULTS)
    print(json.dumps(versions()))


if __name__ == "__main__":
    main()
