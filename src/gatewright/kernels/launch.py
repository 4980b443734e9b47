"""Launch the kernels of `gatewright.kernels.feed_forward`, with tile sizes from a fixed table.

The functions are those of `gatewright.kernels.plain`, which says what each takes and returns.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from gatewright.kernels import feed_forward as kernels

SMALL, MEDIUM, LARGE = 16, 64, 128
MANY = 512
"""Rows per expert from which wider tiles pay."""


class Tiles(NamedTuple):
    """How a product is cut: a program computes ``rows`` by ``columns`` of it, ``inner`` terms of each sum at a time."""

    rows: int
    columns: int
    inner: int = 64
    num_warps: int = 8
    num_stages: int = 3


# What was fastest on an NVIDIA H200; `benchmarks.tiles` prints the others.
WIDE = Tiles(128, 256, 64, 8, 3)
SQUARE = Tiles(64, 64, 64, 4, 4)


def up(
    x: Tensor,
    weight_in: Tensor,
    weight: Tensor,
    token_index: Tensor,
    ends: Tensor,
    activation: str,
    hidden: Tensor | None,
    tiles: Tiles | None = None,
) -> Tensor:
    """Gather rows, multiply them by the first matrices and activate."""
    (num_experts, dim, width), num_rows = weight_in.shape, token_index.shape[0]
    ffn = width // 2 if activation == "swiglu" else width
    activated = x.new_empty(num_rows, ffn)
    tiles = tiles or _tiles(num_rows, num_experts, ffn, stages=4)
    num_tiles = num_rows // tiles.rows + num_experts
    kernels.up[(num_tiles * triton.cdiv(ffn, tiles.columns),)](
        x, weight_in, weight, token_index, ends, activated if hidden is None else hidden, activated,
        num_experts, num_tiles,
        dim=dim, ffn=ffn, ACTIVATION=activation, SAVE=hidden is not None, **_options(tiles, num_experts),
    )  # fmt: skip
    return activated


def grouped(
    rows: Tensor, matrices: Tensor, ends: Tensor, out: Tensor | None = None, tiles: Tiles | None = None
) -> Tensor:
    """Multiply the rows of each expert by its matrix, which may be a transposed view."""
    (num_experts, inner, width), num_rows = matrices.shape, rows.shape[0]
    product = rows.new_empty(num_rows, width) if out is None else out
    many = num_rows >= MANY * num_experts and width >= WIDE.columns
    tiles = tiles or (WIDE if many else _tiles(num_rows, num_experts, width))
    num_tiles = num_rows // tiles.rows + num_experts
    kernels.grouped[(num_tiles * triton.cdiv(width, tiles.columns),)](
        rows, matrices, ends, product, num_experts, num_tiles, *matrices.stride(),
        inner_size=inner, width=width, **_options(tiles, num_experts),
    )  # fmt: skip
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
    tiles: Tiles = SQUARE,
) -> tuple[Tensor, Tensor, Tensor]:
    """Go back through the second product and the activation."""
    (num_experts, ffn, dim), num_rows = weight_out.shape, hidden.shape[0]
    num_tiles, num_columns = num_rows // tiles.rows + num_experts, triton.cdiv(ffn, tiles.columns)
    hidden_gradient, activated = torch.empty_like(hidden), hidden.new_empty(num_rows, ffn)
    partial = weight.new_empty(num_columns, num_rows)
    kernels.down_backward[(num_tiles * num_columns,)](
        gradient, weight_out, hidden, weight, token_index, ends, hidden_gradient, activated, partial,
        num_experts, num_tiles, num_rows, dim=dim, ffn=ffn, ACTIVATION=activation,
        **_options(tiles, num_experts),
    )  # fmt: skip
    return hidden_gradient, activated, partial.sum(0)


def weight_gradient(
    left: Tensor,
    right: Tensor,
    token_index: Tensor,
    ends: Tensor,
    gathered: str,
    out: Tensor | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """Sum the outer products of each expert's rows; one side, named by `gathered`, is in the order of tokens."""
    height, width, num_experts = left.shape[1], right.shape[1], ends.shape[0]
    product = left.new_empty(num_experts, height, width) if out is None else out
    tiles = tiles or _square_tiles(height, width, token_index.shape[0], num_experts)
    blocks = triton.cdiv(height, tiles.rows) * triton.cdiv(width, tiles.columns)
    kernels.weight_gradient[blocks, num_experts](
        left, right, token_index, ends, product, height=height, width=width,
        GATHER_LEFT=gathered == "left", GATHER_RIGHT=gathered == "right",
        BLOCK_HEIGHT=tiles.rows, BLOCK_WIDTH=tiles.columns, BLOCK_ROWS=tiles.inner,
        GROUP=8, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return product


def _tiles(num_rows: int, num_experts: int, columns: int, stages: int = 3) -> Tiles:
    """Choose tile sizes by the rows an expert has on average: few rows, narrow tiles, so that weights are read once."""
    average = triton.next_power_of_2(max(1, 3 * num_rows // (2 * num_experts)))
    rows, width = min(max(average, SMALL), LARGE), _block(columns)
    if rows * width > MEDIUM * LARGE:
        return Tiles(rows, width, MEDIUM, 8, stages)
    return Tiles(rows, width, MEDIUM, 4, 3)


def _square_tiles(height: int, width: int, num_rows: int, num_experts: int) -> Tiles:
    rows, columns = _block(height), _block(width)
    if num_rows <= MEDIUM * num_experts:
        return Tiles(rows, columns, 32, 4, 4)
    return Tiles(rows, columns, MEDIUM, 8 if rows * columns > MEDIUM * LARGE else 4, 4)


def _options(tiles: Tiles, num_experts: int) -> dict[str, int]:
    return {
        "BLOCK_EXPERTS": max(LARGE, triton.next_power_of_2(num_experts)),
        "BLOCK_ROWS": tiles.rows,
        "BLOCK_COLUMNS": tiles.columns,
        "BLOCK_INNER": tiles.inner,
        "GROUP": 8,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


def _block(size: int) -> int:
    block: int = triton.next_power_of_2(size)
    return min(max(block, SMALL), LARGE)
