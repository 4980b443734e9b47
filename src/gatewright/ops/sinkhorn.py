"""Sinkhorn's iteration: scale a matrix's rows and columns until both sum to what they should."""

import torch
from jaxtyping import Float
from torch import Tensor

from gatewright.internals import is_batched


def sinkhorn(
    logits: Float[Tensor, "tokens experts"], tolerance: float = 1e-3, max_iterations: int = 100
) -> Float[Tensor, " experts"]:
    """Return what to add to the logits so that their softmax gives every expert the same share of the tokens.

    ``Pi = diag(u) exp(logits) diag(v)`` with rows that sum to 1 and columns that sum to tokens / experts
    (https://doi.org/10.2140/pjm.1967.21.343) is ``softmax(logits + log v)``: rows are then exact, and columns within a
    factor of ``exp(tolerance)`` where the iteration ended by itself. It has no gradient. Without tokens it is zero.

    Args:
        logits: The logits of all tokens that share the experts. A row of minus infinities is no token's, and counts for
            nothing.
        tolerance: The iteration ends where no entry of ``log v`` changes by more.
        max_iterations: The iteration ends here at the latest.
    """
    rounds = _compiled_sinkhorn if torch.compiler.is_compiling() else _sinkhorn
    log_v: Tensor = rounds(logits.detach(), tolerance, max_iterations)
    return log_v


def _sinkhorn(logits: Tensor, tolerance: float, max_iterations: int) -> Tensor:
    num_tokens, num_experts = logits.shape
    log_v = torch.zeros_like(logits[:0].sum(0))
    if num_tokens == 0:
        return log_v
    absent = logits.isneginf().all(-1, keepdim=True)
    log_share = ((~absent).sum().to(logits) / num_experts).log()
    logits = logits.masked_fill(absent, 0.0)
    # The device knows whether it has ended, and to ask is to wait for it: rounds after the end change nothing.
    may_ask = logits.device.type == "cpu" and not is_batched(logits)
    running = torch.ones((), dtype=torch.bool, device=logits.device)
    for _ in range(max_iterations):
        change = log_share - (logits + log_v).log_softmax(-1).masked_fill(absent, -torch.inf).logsumexp(0)
        log_v = torch.where(running, log_v + change, log_v)
        running = running & (change.abs().max() > tolerance)
        if may_ask and not running:
            break
    return log_v


# An operator of its own, because torch.compile cannot trace a loop whose length depends on the data.
@torch.library.custom_op("gatewright::sinkhorn", mutates_args=())
def _compiled_sinkhorn(logits: Tensor, tolerance: float, max_iterations: int) -> Tensor:
    return _sinkhorn(logits, tolerance, max_iterations)


@_compiled_sinkhorn.register_fake
def _(logits: Tensor, tolerance: float, max_iterations: int) -> Tensor:
    return logits.new_empty(logits.shape[1])
