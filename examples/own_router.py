"""A router of your own: a class whose forward returns a Routing. This one sends each token to the nearest centre."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

import gatewright as gw
from gatewright.routing import top_k_routing
from gatewright.scope import ONE_PROCESS


class Nearest(gw.Router):
    """Choose the experts whose learned centres are nearest to the token."""

    default_losses = {"load_balance": 0.01}  # noqa: RUF012 nobody changes it

    def __init__(self, dim: int, num_experts: int, top_k: int = 2) -> None:
        super().__init__(dim, num_experts, top_k)
        self.centres = nn.Parameter(torch.empty(num_experts, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the centres."""
        nn.init.normal_(self.centres)

    def forward(
        self,
        features: Float[Tensor, "tokens dim"],
        scope: gw.BatchScope = ONE_PROCESS,
        mask: Bool[Tensor, " tokens"] | None = None,
    ) -> gw.Routing:
        """Route every token by its distances, in float32 at least."""
        tokens = features.to(torch.promote_types(features.dtype, torch.float32))
        logits = -torch.cdist(tokens, self.centres.to(tokens.dtype))
        probs = logits.softmax(-1)
        chosen = scope.chosen(probs.topk(self.top_k).indices)  # or those of gatewright.replay_routing
        return top_k_routing(chosen, probs.gather(-1, chosen), logits, probs, mask=mask)


def main() -> list[int]:
    """Use the router in a layer, and return the tokens of each expert."""
    torch.manual_seed(0)
    moe = gw.MoE(Nearest(16, num_experts=4), gw.GroupedFeedForward(4, 16, 32))
    loss = moe(torch.randn(100, 16)).square().mean() + gw.aux_loss(moe)
    loss.backward()
    counts: list[int] = moe.routing.sums.tokens_per_expert.tolist()
    print(f"tokens per expert: {counts}")
    return counts


if __name__ == "__main__":
    main()
