"""Sinkhorn's iteration: scale a matrix's rows and columns until both sum to what they should."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def sinkhorn(
    logits: Float[Tensor, "tokens experts"], tolerance: float = 1e-3, max_iterations: int = 100
) -> Float[Tensor, " experts"]:
    """Return what to add to the logits so that their softmax gives every expert the same share of the tokens.

    ``Pi = diag(u) exp(logits) diag(v)`` with rows that sum to 1 and columns that sum to tokens / experts
    (https://doi.org/10.2140/pjm.1967.21.343) is ``softmax(logits + log v)``: rows are then exact, and columns within a
    factor of ``exp(tolerance)`` where the iteration ended by itself. It has no gradient. Without tokens it is zero.

    Args:
        logits: Of all tokens that share the experts.
        tolerance: The iteration ends where no entry of ``log v`` changes by more.
        max_iterations: The iteration ends here at the latest.
    """
    log_v: Tensor = _sinkhorn(logits.detach(), tolerance, max_iterations)
    return log_v


# An operator of its own, because torch.compile cannot trace a loop whose length depends on the data.
@torch.library.custom_op("gatewright::sinkhorn", mutates_args=())
def _sinkhorn(logits: Tensor, tolerance: float, max_iterations: int) -> Tensor:
    num_tokens, num_experts = logits.shape
    log_v = logits.new_zeros(num_experts)
    if num_tokens == 0:
        return log_v
    log_share = math.log(num_tokens / num_experts)
    for _ in range(max_iterations):
        change = log_share - (logits + log_v).log_softmax(-1).logsumexp(0)
        log_v += change
        if change.abs().max() <= tolerance:
            break
    return log_v


@_sinkhorn.register_fake
def _(logits: Tensor, tolerance: float, max_iterations: int) -> Tensor:
    return logits.new_empty(logits.shape[1])
