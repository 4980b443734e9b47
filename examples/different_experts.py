"""Experts of different kinds in one layer. They take the same items and return the same shape; all else may differ."""

import torch
from torch import nn

import gatewright as gw


def main() -> dict[str, int]:
    """Train a mixture to add or multiply pairs of numbers, and return how many test pairs each expert got."""
    torch.manual_seed(0)
    experts = {
        "linear": nn.Linear(3, 1),
        "small": nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)),
        "wide": nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 1)),
    }
    moe = gw.MoE(gw.TopK(3, len(experts), top_k=1), gw.ModuleExperts(list(experts.values())))
    optimizer = torch.optim.Adam(moe.parameters(), lr=1e-2)

    for _ in range(300):
        x = torch.randn(256, 3)  # the sign of the last number says what to do with the other two
        y = torch.where(x[:, 2] > 0, x[:, 0] + x[:, 1], x[:, 0] * x[:, 1])
        loss = (moe(x).squeeze(1) - y).square().mean() + gw.aux_loss(moe)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    moe.eval()(torch.randn(1000, 3))
    counts = dict(zip(experts, moe.routing.sums.tokens_per_expert.tolist(), strict=True))
    print(f"loss {loss.item():.3f}; pairs per expert: {counts}")
    return counts


if __name__ == "__main__":
    main()
