"""Upcycling: a trained dense network becomes a mixture of copies of its parts, and trains on from there."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import gatewright as gw
from gatewright import surgery


def train(model: nn.Module, pixels: Tensor, labels: Tensor, *, is_mixture: bool) -> float:
    """Train on all digits at once, and return the last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = task_loss = F.cross_entropy(model.train()(pixels), labels)
        if is_mixture:
            loss = task_loss + gw.aux_loss(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return task_loss.item()


def main() -> tuple[float, float, float]:
    """Return the loss of the dense network, and by how much outputs changed, and the loss of the mixture."""
    torch.manual_seed(0)
    digits = load_digits()
    pixels, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    block = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), block, nn.ReLU(), nn.Linear(32, 10))
    dense = train(model, pixels, labels, is_mixture=False)

    before = model.eval()(pixels)
    surgery.upcycle(model, "2", num_experts=4)  # the module of that name; a pattern or a class names several
    change = (model.eval()(pixels) - before).abs().max().item()
    surgery.reinitialize(model, 0.25)  # a quarter of the hidden units of each copy, so that the copies part
    mixture = train(model, pixels, labels, is_mixture=True)
    print(f"dense {dense:.3f}; outputs changed by {change:.0e}; mixture {mixture:.3f}")
    return dense, change, mixture


if __name__ == "__main__":
    main()
