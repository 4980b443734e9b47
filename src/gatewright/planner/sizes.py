"""What a model is to a plan: sizes, for feed-forward experts from five numbers."""

from dataclasses import dataclass

INDEX_BYTES = 40
"""Kept per assignment beside its rows: its weight, and the places it came from, as 64-bit integers."""
ROUTER_ROWS = 3
"""Numbers per token and expert that the router and its losses keep, in float32: logits and two softmaxes."""
LAYER_OPERATIONS = 100
"""Operations that PyTorch starts for the forward of one layer of grouped experts behind a `TopK` router, at least."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """The costs of one copy of a part of a model.

    Args:
        parameters: Number of trained parameters.
        state: Numbers that the optimizer keeps for them: twice as many for AdamW, as many for SGD with momentum.
        flops: Arithmetic of its forward, per row; a multiplication and an addition are two.
        saved: Bytes kept for backward, per row.
        fixed: Bytes kept for backward however many rows there are: weights in half precision, under autocast.
        operations: Operations that PyTorch starts for its forward, however many rows there are.
    """

    parameters: int = 0
    state: int = 0
    flops: float = 0.0
    saved: float = 0.0
    fixed: float = 0.0
    operations: int = 0


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A model with mixture layers of one kind, and the tokens of a step.

    Args:
        tokens: Tokens of one step, on all processes; a token is what a router routes.
        dense: Everything that is not an expert, over all layers; every process has it. A row is a token.
        expert: One expert of one layer. A row is an assignment.
        num_experts: Number of experts of each layer.
        top_k: Experts per token.
        layers: Number of mixture layers; 0 for a dense model.
        sent_bytes: Bytes of one row on its way to its expert.
        returned_bytes: Bytes of one row on its way back.
        kept_bytes: Bytes kept for backward by the weighted sum, per assignment.
        tokens_per_item: Tokens of one item of the batch, which stays on one process: the bytes of a window of text.
        item_gradient: Whether gradients travel back to the items too, as they do unless the items are raw data.
        number_bytes: Bytes of a weight, of a gradient and of a number in the optimizer's state.
    """

    tokens: int
    dense: Part
    expert: Part
    num_experts: int
    top_k: int
    layers: int
    sent_bytes: int
    returned_bytes: int
    kept_bytes: int
    tokens_per_item: int = 1
    item_gradient: bool = True
    number_bytes: int = 4

    @property
    def items(self) -> int:
        """Items of a step, which are what processes share out among them."""
        return self.tokens // self.tokens_per_item

    def __post_init__(self) -> None:
        least = min(self.tokens, self.num_experts, self.top_k, self.number_bytes)
        if least < 1 or self.layers < 0 or self.top_k > self.num_experts:
            raise ValueError(
                f"There are at least 1 token, expert and expert per token, and no more experts per token than experts; "
                f"got tokens {self.tokens}, num_experts {self.num_experts}, top_k {self.top_k}, layers {self.layers} "
                f"and {self.number_bytes} bytes per number. Mend the one that does not fit."
            )


def feed_forward_sizes(
    *,
    tokens: int,
    dim: int,
    ffn: int,
    num_experts: int,
    top_k: int,
    layers: int = 1,
    matrices: int = 2,
    row_bytes: int = 4,
    number_bytes: int = 4,
    state_per_parameter: int = 2,
    dense: Part | None = None,
) -> Sizes:
    """Return the sizes of `GroupedFeedForward` experts behind a `TopK` router, without biases.

    Args:
        tokens: Tokens of one step, on all processes.
        dim: Size of an item, in and out.
        ffn: Hidden size of an expert.
        num_experts: Number of experts of each layer.
        top_k: Experts per token.
        layers: Number of mixture layers.
        matrices: Matrices of an expert: 2, or 3 for SwiGLU.
        row_bytes: Bytes of a number in the rows that are computed and sent.
        number_bytes: Bytes of a weight, of a gradient and of a number in the optimizer's state.
        state_per_parameter: Numbers that the optimizer keeps per parameter: 2 for AdamW, 1 for SGD with momentum.
        dense: Everything beside the mixture layers; its `state` follows from its parameters.

    Raises:
        ValueError: If a size does not fit.
    """
    if min(dim, ffn, row_bytes) < 1 or matrices not in (2, 3) or state_per_parameter < 0:
        raise ValueError(
            f"dim, ffn and row_bytes are at least 1, matrices 2 (or 3 for SwiGLU) and state_per_parameter not "
            f"negative; got {dim}, {ffn}, {row_bytes}, {matrices} and {state_per_parameter}."
        )
    rest, router, weights = dense or Part(), layers * dim * num_experts, matrices * dim * ffn
    wide = max(row_bytes, 4)  # Routers and the weighted sum compute in float32 at least.
    hidden = 2 if matrices == 2 else 4  # before and after the activation; gate, up, silu(gate) and their product
    return Sizes(
        tokens=tokens,
        dense=Part(
            parameters=rest.parameters + router,
            state=state_per_parameter * (rest.parameters + router),
            flops=rest.flops + 2 * router,
            saved=rest.saved + layers * (wide * dim + ROUTER_ROWS * 4 * num_experts),
            fixed=rest.fixed,
            operations=rest.operations + layers * LAYER_OPERATIONS,
        ),
        expert=Part(
            parameters=weights,
            state=state_per_parameter * weights,
            flops=2 * weights,
            saved=row_bytes * (dim + hidden * ffn),
            fixed=row_bytes * weights if row_bytes < number_bytes else 0,
        ),
        num_experts=num_experts,
        top_k=top_k,
        layers=layers,
        sent_bytes=row_bytes * dim,
        returned_bytes=row_bytes * dim,
        kept_bytes=(row_bytes + wide) * dim + INDEX_BYTES,
        number_bytes=number_bytes,
    )
