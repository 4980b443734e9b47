"""A training loop in plain PyTorch. What a mixture adds to it are the two lines that begin with gw."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import gatewright as gw


def main() -> float:
    """Train on handwritten digits, and return the accuracy on those that were held out."""
    torch.manual_seed(0)
    digits = load_digits()
    pixels, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    train_set, test_set = random_split(TensorDataset(pixels, labels), [0.8, 0.2])

    mixture = gw.MoE(
        router=gw.NoisyTopK(dim=64, num_experts=4, top_k=2),
        experts=gw.ModuleExperts(lambda: nn.Linear(64, 64), num_experts=4),
    )
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), mixture, nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    for _ in range(5):
        for rows, answers in DataLoader(train_set, batch_size=64, shuffle=True):
            loss = F.cross_entropy(model(rows), answers)
            loss = loss + gw.aux_loss(model)  # once per forward: it keeps the router from sending all to a few
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            gw.end_step(model)  # once per optimizer step: routers that balance without a loss adapt here

    rows, answers = test_set[:]
    right = model.eval()(rows).argmax(-1) == answers
    accuracy = right.float().mean().item()
    print(f"accuracy {accuracy:.1%}; test images per expert: {mixture.routing.sums.tokens_per_expert.tolist()}")
    return accuracy


if __name__ == "__main__":
    main()
