"""A small language model: a causal transformer whose feed-forward layers are mixtures of experts."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gatewright.models.blocks import Block, BlocksConfig
from gatewright.models.mixture import CHOOSABLE_ROUTERS
from gatewright.names import known
from gatewright.routers import Hashed
from gatewright.settings import settings

CAUSAL_ROUTERS: Mapping[str, type[nn.Module]] = MappingProxyType(
    {name: make for name, make in CHOOSABLE_ROUTERS.items() if not make.compares_tokens}
    | {"hashed": Hashed, "gated-hash": Hashed}
)
"""The routers that a language model can have, by name: in training, too, they look at one token at a time."""


@settings("model")
class TransformerConfig(BlocksConfig):
    """A language model of transformer blocks; its routers compare no tokens with later ones in training.

    Args:
        key_length: Number of tokens, the last of them the token itself, that make the key of a token.
    """

    key_length: Literal[1, 2] = 1

    def _check_router(self) -> None:
        if self.router in CHOOSABLE_ROUTERS and self.router not in CAUSAL_ROUTERS:
            raise ValueError(
                f"In training the router {self.router} compares or mixes each token with those after it, of which a "
                f"causal language model must not know. Set `model.router` to one of {', '.join(CAUSAL_ROUTERS)}."
            )
        known(self.router, CAUSAL_ROUTERS, "router of a language model")

    def build(self, num_inputs: int, num_outputs: int, begin: int) -> nn.Module:
        """Make the network.

        Args:
            num_inputs: Number of different tokens that it reads.
            num_outputs: Number of different tokens that it predicts.
            begin: The token that a document begins with.
        """
        return Transformer(self, num_inputs, num_outputs, begin)


class Transformer(nn.Module):
    """Predict the next token from those before it in the same document.

    Windows may hold several documents, one after the other, each behind a `begin` token: a token attends to the tokens
    of its own document alone, and positions are relative (rotary embeddings, https://arxiv.org/abs/2104.09864), so a
    document's logits do not depend on what it is packed with.

    Args:
        config: Sizes and mixture; one expert makes the dense twin.
        num_inputs: Number of different tokens that it reads.
        num_outputs: Number of different tokens that it predicts.
        begin: The token that a document begins with.
    """

    def __init__(self, config: TransformerConfig, num_inputs: int, num_outputs: int, begin: int) -> None:
        super().__init__()
        self.begin, self.num_inputs, self.key_length = begin, num_inputs, config.key_length
        num_keys = num_inputs**config.key_length
        self.embedding = nn.Embedding(num_inputs, config.dim)
        self.blocks = nn.ModuleList(Block(config.of_block(place), num_keys) for place in range(config.num_layers))
        self.norm = nn.RMSNorm(config.dim)
        self.head = nn.Linear(config.dim, num_outputs, bias=False)

    def forward(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time outputs"]:
        """Return the logits of each next token."""
        mask = attention_mask(tokens, self.begin)
        keys = self.keys(tokens)
        x: Tensor = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, keys, mask)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def keys(self, tokens: Int[Tensor, "batch time"]) -> Int[Tensor, "batch time"]:
        """Number every token, with a key of two tokens together with the one before it in its own document."""
        if self.key_length == 1:
            return tokens
        before = torch.cat([torch.full_like(tokens[:, :1], self.begin), tokens[:, :-1]], dim=1)
        return tokens + self.num_inputs * torch.where(tokens == self.begin, self.begin, before)


def attention_mask(tokens: Int[Tensor, "batch time"], begin: int) -> Bool[Tensor, "batch 1 time time"]:
    """Let each token see itself and those before it in its own document."""
    document = (tokens == begin).cumsum(1)
    return (document[:, :, None] == document[:, None, :]).tril()[:, None]
