"""The experts of transformers' models, computed by Gatewright on the parameters as they are."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from gatewright.extras import require
from gatewright.internals import in_forward_mode, in_transform, is_exporting
from gatewright.ops import expert_of_rows, grouped_mm, pad, routed_feed_forward, stable_sort

OLDEST = (5, 20)
"""The first version whose experts say all that the back-end needs to know of them."""

GATED = {"SiLU": "swiglu", "SiLUActivation": "swiglu"}
"""What the fused feed-forward calls an activation of transformers, by its class, in experts that have a gate."""

PLAIN = {"GELUActivation": "gelu", "ReLU": "relu"}
"""The same for experts without a gate."""


def register() -> None:
    """Add the experts implementation ``"gatewright"`` to transformers.

    A model takes it by ``model.set_experts_implementation("gatewright")``, or where it is loaded by
    ``experts_implementation="gatewright"``. Its parameters stay as they are, so that checkpoints, optimizers and
    adapters notice nothing.

    Raises:
        ImportError: If transformers is not installed, or too old.
    """
    version: str = require("transformers", "transformers").__version__
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ImportError(
            f"The experts of transformers take Gatewright's back-end from version {oldest} on; found {version}. "
            "Run: pip install 'gatewright[transformers]'"
        )
    require("transformers.integrations.moe", "transformers").ALL_EXPERTS_FUNCTIONS.register(
        "gatewright", experts_forward
    )


def experts_forward(
    experts: Any,
    hidden_states: Float[Tensor, "tokens dim"],
    top_k_index: Int[Tensor, "tokens top_k"],
    top_k_weights: Float[Tensor, "tokens top_k"],
) -> Float[Tensor, "tokens dim"]:
    """Return the weighted sum of what each token's experts make of it.

    Args:
        experts: A module of transformers that holds all experts of a layer, such as ``MixtralExperts``.
        hidden_states: The tokens.
        top_k_index: The experts of each token. ``experts.num_experts`` stands for one that another process has.
        top_k_weights: What their outputs are multiplied by.
    """
    num_tokens, top_k = top_k_index.shape
    x, weight_in, weight_out = _in_one_dtype(hidden_states, *_matrices(experts))
    expert_index, order = stable_sort(top_k_index.t().reshape(-1))
    token_index, weight = order % num_tokens, top_k_weights.t().reshape(-1).index_select(0, order)
    row_index = torch.empty_like(order).scatter(0, order, torch.arange(order.shape[0], device=order.device))
    counts = order.new_zeros(experts.num_experts + 1).index_add(0, expert_index, torch.ones_like(order))[:-1]
    if activation := _fused_activation(experts):
        padded = pad(weight, token_index, row_index.view(top_k, num_tokens), counts, expert_index, weight_in)
        output = routed_feed_forward(x, weight_in, weight_out, *padded, activation)
    else:
        rows = _run_rows(experts, x.index_select(0, token_index), weight_in, weight_out, counts)
        weighted = (rows * weight[:, None]).index_select(0, row_index)
        output = weighted.view(top_k, num_tokens, -1).sum(0)
    return output.to(hidden_states.dtype)


def _matrices(experts: Any) -> tuple[Tensor, Tensor]:
    """Return both stacks of matrices, each as ``(experts, inputs, outputs)``; where they are stored so, as they are."""
    weight_in, weight_out = experts.gate_up_proj if experts.has_gate else experts.up_proj, experts.down_proj
    return (weight_in, weight_out) if experts.is_transposed else (weight_in.mT, weight_out.mT)


def _in_one_dtype(x: Tensor, *matrices: Tensor) -> tuple[Tensor, ...]:
    """Convert to the type of the matrices, or to autocast's where it is on."""
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else matrices[0].dtype
    return tuple(tensor.to(dtype) for tensor in (x, *matrices))


def _fused_activation(experts: Any) -> str | None:
    """Return the activation by which the fused feed-forward computes these experts; None where it does not."""
    more = experts.has_bias or experts.has_post_expert_norm or experts._is_expert_parallel
    own_gate = experts.has_gate and type(experts)._apply_gate.__name__ != "_default_apply_gate"
    if more or own_gate or in_transform() or in_forward_mode() or is_exporting():
        return None
    return (GATED if experts.has_gate else PLAIN).get(type(experts.act_fn).__name__)


def _run_rows(experts: Any, rows: Tensor, weight_in: Tensor, weight_out: Tensor, counts: Tensor) -> Tensor:
    """Run each expert on its group of rows, with its own gate, activation, biases and norm."""
    biases: list[Tensor | None] = [None, None]
    if experts.has_bias:
        biases = [experts.gate_up_proj_bias if experts.has_gate else experts.up_proj_bias, experts.down_proj_bias]
    hidden = _linear(rows, weight_in, biases[0], counts)
    hidden = experts._apply_gate(hidden) if experts.has_gate else experts.act_fn(hidden)
    output = _linear(hidden, weight_out, biases[1], counts)
    return experts.post_expert_norm(output) if experts.has_post_expert_norm else output


def _linear(rows: Tensor, matrices: Tensor, bias: Tensor | None, counts: Tensor) -> Tensor:
    product = grouped_mm(rows, matrices, counts)
    if bias is None:
        return product
    expert = expert_of_rows(counts.cumsum(0), rows.shape[0])
    return product + F.pad(bias.to(product.dtype), (0, 0, 0, 1)).index_select(0, expert)
