"""A mixture in place of the feed-forward network of a Transformer block, which takes (batch, length, dim) as it did."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

import gatewright as gw


class Block(nn.Module):
    """A pre-norm Transformer block."""

    def __init__(self, dim: int, num_heads: int, num_experts: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.feed_forward = gw.MoE(  # in place of nn.Sequential(nn.Linear(dim, ...), ..., nn.Linear(..., dim))
            router=gw.TopK(dim, num_experts, top_k=2),
            experts=gw.GroupedFeedForward(num_experts, dim, 2 * dim, activation="swiglu"),
        )

    def forward(
        self, x: Float[Tensor, "batch length dim"], mask: Bool[Tensor, "batch length"]
    ) -> Float[Tensor, "batch length dim"]:
        """Apply attention and the mixture; `mask` says which tokens are real."""
        seen = self.norm1(x)
        x = x + self.attention(seen, seen, seen, key_padding_mask=~mask, need_weights=False)[0]
        return x + self.feed_forward(self.norm2(x), mask=mask)


def main() -> list[int]:
    """Take one training step on sequences of unequal length, and return how many tokens each expert got."""
    torch.manual_seed(0)
    block = Block(dim=32, num_heads=4, num_experts=8)
    optimizer = torch.optim.AdamW(block.parameters())
    mask = torch.arange(10) < torch.tensor([[10], [7], [3]])  # lengths of the three sequences
    loss = block(torch.randn(3, 10, 32), mask)[mask].square().mean()
    (loss + gw.aux_loss(block)).backward()
    optimizer.step()
    gw.end_step(block)
    counts: list[int] = block.feed_forward.routing.sums.tokens_per_expert.tolist()
    print(f"{int(mask.sum())} real tokens, two experts each: {counts}")
    return counts


if __name__ == "__main__":
    main()
