"""Launch the kernels of `gatewright.kernels.feed_forward`, with tile sizes from a fixed table.

The functions are those of `gatewright.kernels.plain`, which says what each takes and returns.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from gatewright.kernels import feed_forward as kernels

SMALL, MEDIUM, LARGE = 16, 64, 128


def up(
    x: Tensor, weight_in: Tensor, weight: Tensor, token_index: Tensor, ends: Tensor, activation: str, save: bool
) -> tuple[Tensor, Tensor]:
    """Gather rows, multiply them by the first matrices and activate."""
    (num_experts, dim, width), num_rows = weight_in.shape, token_index.shape[0]
    ffn = width // 2 if activation == "swiglu" else width
    hidden, activated = x.new_empty(num_rows if save else 0, width), x.new_empty(num_rows, ffn)
    tiles = _tiles(num_rows, num_experts, columns=ffn)
    num_tiles = num_rows // tiles["BLOCK_ROWS"] + num_experts
    kernels.up[(num_tiles * triton.cdiv(ffn, tiles["BLOCK_COLUMNS"]),)](
        x, weight_in, weight, token_index, ends, hidden, activated, num_experts, num_tiles,
        dim=dim, ffn=ffn, ACTIVATION=activation, SAVE=save, **tiles,
    )  # fmt: skip
    return hidden, activated


def grouped(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Multiply the rows of each expert by its matrix, which may be a transposed view."""
    (num_experts, inner, width), num_rows = matrices.shape, rows.shape[0]
    product = rows.new_empty(num_rows, width)
    tiles = _tiles(num_rows, num_experts, columns=width)
    num_tiles = num_rows // tiles["BLOCK_ROWS"] + num_experts
    kernels.grouped[(num_tiles * triton.cdiv(width, tiles["BLOCK_COLUMNS"]),)](
        rows,
        matrices,
        ends,
        product,
        num_experts,
        num_tiles,
        *matrices.stride(),
        inner_size=inner,
        width=width,
        **tiles,
    )
    return product


def gather_sum(rows: Tensor, row_index: Tensor) -> Tensor:
    """Add up each token's rows in float32."""
    (top_k, num_tokens), dim = row_index.shape, rows.shape[1]
    output = rows.new_empty(num_tokens, dim)
    columns = min(triton.next_power_of_2(dim), 1024)
    tokens = max(1, 2048 // columns)
    kernels.gather_sum[triton.cdiv(num_tokens, tokens), triton.cdiv(dim, columns)](
        rows, row_index, output, num_tokens, dim=dim, TOP_K=top_k, BLOCK_TOKENS=tokens, BLOCK_COLUMNS=columns
    )
    return output


def down_backward(
    gradient: Tensor,
    weight_out: Tensor,
    hidden: Tensor,
    weight: Tensor,
    token_index: Tensor,
    ends: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Go back through the second product and the activation."""
    (num_experts, ffn, dim), num_rows = weight_out.shape, hidden.shape[0]
    tiles = _tiles(num_rows, num_experts, columns=ffn)
    num_tiles, num_columns = num_rows // tiles["BLOCK_ROWS"] + num_experts, triton.cdiv(ffn, tiles["BLOCK_COLUMNS"])
    hidden_gradient, activated = torch.empty_like(hidden), hidden.new_empty(num_rows, ffn)
    partial = weight.new_empty(num_columns, num_rows)
    kernels.down_backward[(num_tiles * num_columns,)](
        gradient, weight_out, hidden, weight, token_index, ends, hidden_gradient, activated, partial,
        num_experts, num_tiles, num_rows, dim=dim, ffn=ffn, ACTIVATION=activation, **tiles,
    )  # fmt: skip
    return hidden_gradient, activated, partial.sum(0)


def weight_gradient(left: Tensor, right: Tensor, token_index: Tensor, ends: Tensor, gathered: str) -> Tensor:
    """Sum the outer products of each expert's rows; one side, named by `gathered`, is in the order of tokens."""
    height, width, num_experts = left.shape[1], right.shape[1], ends.shape[0]
    product = left.new_empty(num_experts, height, width)
    block_height, block_width = _block(height), _block(width)
    block_rows = 64 if token_index.shape[0] > 64 * num_experts else 32
    blocks = triton.cdiv(height, block_height) * triton.cdiv(width, block_width)
    kernels.weight_gradient[blocks, num_experts](
        left, right, token_index, ends, product, height=height, width=width,
        GATHER_LEFT=gathered == "left", GATHER_RIGHT=gathered == "right",
        BLOCK_HEIGHT=block_height, BLOCK_WIDTH=block_width, BLOCK_ROWS=block_rows,
        GROUP=8, num_warps=_warps(block_height, block_width), num_stages=4,
    )  # fmt: skip
    return product


def _tiles(num_rows: int, num_experts: int, columns: int) -> dict[str, Any]:
    """Choose tile sizes by the rows an expert has on average: few rows, narrow tiles, so that weights are read once."""
    rows = triton.next_power_of_2(max(1, 3 * num_rows // (2 * num_experts)))
    block_rows, block_columns = min(max(rows, SMALL), LARGE), _block(columns)
    return {
        "BLOCK_EXPERTS": triton.next_power_of_2(num_experts),
        "BLOCK_ROWS": block_rows,
        "BLOCK_COLUMNS": block_columns,
        "BLOCK_INNER": MEDIUM,
        "GROUP": 8,
        "num_warps": _warps(block_rows, block_columns),
        "num_stages": 3,
    }


def _block(size: int) -> int:
    block: int = triton.next_power_of_2(size)
    return min(max(block, SMALL), LARGE)


def _warps(height: int, width: int) -> int:
    return 8 if height * width > 64 * 128 else 4
