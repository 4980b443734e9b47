"""Five Triton kernels that run all feed-forward experts of a layer at once.

They are launched by `gatewright.kernels.launch`, and `gatewright.kernels.plain` computes the same in plain torch.

Rows are assignments sorted by expert. A tile is a block of rows of one expert. How many tiles an expert has is known on
the device alone, so the grid has an upper bound of ``assignments // BLOCK_ROWS + experts`` tiles, and those
without rows return: expert ``e`` owns the tiles from ``first_row(e) // BLOCK_ROWS + e`` on. Every output is written by
one program, in one order, so its bits are the same in every run.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _tile(ends, tile, num_experts, BLOCK_EXPERTS: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """Return a tile's expert, its first row, and where the rows of the expert end."""
    index = tl.arange(0, BLOCK_EXPERTS)
    end = tl.load(ends + index, mask=index < num_experts - 1, other=2147483647)
    expert = tl.sum((end // BLOCK_ROWS + index + 1 <= tile).to(tl.int32), 0)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    stop = tl.load(ends + expert)
    return expert, start + (tile - start // BLOCK_ROWS - expert) * BLOCK_ROWS, stop


@triton.jit
@no_type_check
def _grouped_order(program, num_tiles, num_columns, GROUP: tl.constexpr):
    """Return the tile and the column block of a program; neighbours share weights, which then stay in the L2 cache."""
    in_group = GROUP * num_columns
    first = (program // in_group) * GROUP
    size = tl.minimum(num_tiles - first, GROUP)
    place = program % in_group
    return first + place % size, place // size


@triton.jit
@no_type_check
def _normal(x):
    """Return the normal distribution function, and ``exp(-x^2 / 2)``.

    By the rational approximation 7.1.26 of Abramowitz and Stegun, whose error of 1e-7 is below what half precision
    holds: https://personal.math.ubc.ca/~cbm/aands/page_299.htm. An exact one would take longer than the products.
    """
    bell = tl.exp(-0.5 * x * x)
    t = 1 / (1 + 0.23164189 * tl.abs(x))
    tail = 1.061405429 * t - 1.453152027
    tail = ((tail * t + 1.421413741) * t - 0.284496736) * t + 0.254829592
    tail = 0.5 * tail * t * bell
    return tl.where(x < 0, tail, 1 - tail), bell


@triton.jit
@no_type_check
def _activate(gate, up, ACTIVATION: tl.constexpr):
    if ACTIVATION == "swiglu":
        return gate * tl.sigmoid(gate) * up
    elif ACTIVATION == "gelu":
        cumulative, _ = _normal(gate)
        return gate * cumulative
    else:
        return tl.where(gate < 0, 0.0, gate)


@triton.jit
@no_type_check
def _slopes(gate, up, ACTIVATION: tl.constexpr):
    """Return the activation's derivatives with respect to gate and up."""
    if ACTIVATION == "swiglu":
        share = tl.sigmoid(gate)
        return up * share * (1 + gate * (1 - share)), gate * share
    elif ACTIVATION == "gelu":
        cumulative, bell = _normal(gate)
        return cumulative + gate * 0.3989422804014327 * bell, gate
    else:
        return tl.where(gate > 0, 1.0, 0.0), gate


@triton.jit(do_not_specialize=["num_experts", "num_tiles"])
@no_type_check
def up(
    x, weight_in, weight, token_index, ends, hidden, activated,
    num_experts, num_tiles,
    dim, ffn, ACTIVATION: tl.constexpr, SAVE: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """``hidden = x[token] W_in`` and ``activated = weight * activation(hidden)``."""
    GATED: tl.constexpr = ACTIVATION == "swiglu"
    width = 2 * ffn if GATED else ffn
    tile, block = _grouped_order(tl.program_id(0), num_tiles, tl.cdiv(ffn, BLOCK_COLUMNS), GROUP)
    expert, first, stop = _tile(ends, tile, num_experts, BLOCK_EXPERTS, BLOCK_ROWS)
    if first >= stop:
        return
    row = first + tl.arange(0, BLOCK_ROWS)
    column = block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inner = tl.arange(0, BLOCK_INNER)
    in_rows, in_columns = row < stop, column < ffn
    token = tl.load(token_index + row, mask=in_rows, other=0)
    left = x + token[:, None] * dim + inner[None, :]
    right = weight_in + expert.to(tl.int64) * dim * width + inner[:, None] * width + column[None, :]
    gate_sum = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    up_sum = gate_sum
    for start in range(0, dim, BLOCK_INNER):
        in_inner = inner < dim - start
        values = tl.load(left, mask=in_rows[:, None] & in_inner[None, :], other=0.0)
        mask = in_inner[:, None] & in_columns[None, :]
        gate_sum = tl.dot(values, tl.load(right, mask=mask, other=0.0), gate_sum, input_precision="ieee")
        if GATED:
            up_sum = tl.dot(values, tl.load(right + ffn, mask=mask, other=0.0), up_sum, input_precision="ieee")
        left += BLOCK_INNER
        right += BLOCK_INNER * width
    kind = x.dtype.element_ty
    gate, lift = gate_sum.to(kind), up_sum.to(kind)
    mask = in_rows[:, None] & in_columns[None, :]
    place = row.to(tl.int64)[:, None]
    if SAVE:
        tl.store(hidden + place * width + column[None, :], gate, mask=mask)
        if GATED:
            tl.store(hidden + place * width + ffn + column[None, :], lift, mask=mask)
    scale = tl.load(weight + row, mask=in_rows, other=0.0)[:, None]
    values = scale * _activate(gate.to(tl.float32), lift.to(tl.float32), ACTIVATION)
    tl.store(activated + place * ffn + column[None, :], values.to(kind), mask=mask)


@triton.jit(do_not_specialize=["num_experts", "num_tiles"])
@no_type_check
def grouped(
    rows, matrices, ends, product,
    num_experts, num_tiles, stride_expert, stride_inner, stride_column,
    inner_size, width,
    BLOCK_EXPERTS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Multiply the rows of each expert by its matrix."""
    tile, block = _grouped_order(tl.program_id(0), num_tiles, tl.cdiv(width, BLOCK_COLUMNS), GROUP)
    expert, first, stop = _tile(ends, tile, num_experts, BLOCK_EXPERTS, BLOCK_ROWS)
    if first >= stop:
        return
    row = first + tl.arange(0, BLOCK_ROWS)
    column = block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inner = tl.arange(0, BLOCK_INNER)
    in_rows, in_columns = row < stop, column < width
    place = row.to(tl.int64)[:, None]
    left = rows + place * inner_size + inner[None, :]
    right = matrices + expert.to(tl.int64) * stride_expert
    right += inner[:, None] * stride_inner + column[None, :] * stride_column
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for start in range(0, inner_size, BLOCK_INNER):
        in_inner = inner < inner_size - start
        values = tl.load(left, mask=in_rows[:, None] & in_inner[None, :], other=0.0)
        matrix = tl.load(right, mask=in_inner[:, None] & in_columns[None, :], other=0.0)
        total = tl.dot(values, matrix, total, input_precision="ieee")
        left += BLOCK_INNER
        right += BLOCK_INNER * stride_inner
    mask = in_rows[:, None] & in_columns[None, :]
    tl.store(product + place * width + column[None, :], total.to(rows.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
@no_type_check
def gather_sum(
    rows, row_index, output, num_tokens,
    dim, TOP_K: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add up the rows of each token in float32: ``output[t] = sum_j rows[row_index[j, t]]``."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_tokens = token < num_tokens
    mask = in_tokens[:, None] & (column < dim)[None, :]
    total = tl.zeros((BLOCK_TOKENS, BLOCK_COLUMNS), tl.float32)
    for choice in tl.static_range(TOP_K):
        row = tl.load(row_index + choice * num_tokens + token, mask=in_tokens, other=0)
        total += tl.load(rows + row[:, None] * dim + column[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(output + token[:, None] * dim + column[None, :], total.to(rows.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_experts", "num_tiles", "num_rows"])
@no_type_check
def down_backward(
    gradient, weight_out, hidden, weight, token_index, ends, hidden_gradient, activated, partial,
    num_experts, num_tiles, num_rows,
    dim, ffn, ACTIVATION: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Go back through the second product and the activation, which is computed again from the hidden values.

    With ``s = gradient[token] W_out^T``: ``hidden_gradient = weight * s * activation'(hidden)``, ``activated = weight *
    activation(hidden)``, and a column block's part of the weights' gradient, ``partial = sum(s * activation(hidden))``.
    """
    GATED: tl.constexpr = ACTIVATION == "swiglu"
    width = 2 * ffn if GATED else ffn
    tile, block = _grouped_order(tl.program_id(0), num_tiles, tl.cdiv(ffn, BLOCK_COLUMNS), GROUP)
    expert, first, stop = _tile(ends, tile, num_experts, BLOCK_EXPERTS, BLOCK_ROWS)
    if first >= stop:
        return
    row = first + tl.arange(0, BLOCK_ROWS)
    column = block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inner = tl.arange(0, BLOCK_INNER)
    in_rows, in_columns = row < stop, column < ffn
    token = tl.load(token_index + row, mask=in_rows, other=0)
    left = gradient + token[:, None] * dim + inner[None, :]
    right = weight_out + expert.to(tl.int64) * ffn * dim + inner[:, None] + column[None, :] * dim
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for start in range(0, dim, BLOCK_INNER):
        in_inner = inner < dim - start
        values = tl.load(left, mask=in_rows[:, None] & in_inner[None, :], other=0.0)
        matrix = tl.load(right, mask=in_inner[:, None] & in_columns[None, :], other=0.0)
        total = tl.dot(values, matrix, total, input_precision="ieee")
        left += BLOCK_INNER
        right += BLOCK_INNER
    kind = gradient.dtype.element_ty
    mask = in_rows[:, None] & in_columns[None, :]
    place = row.to(tl.int64)[:, None]
    saved = hidden + place * width + column[None, :]
    gate = tl.load(saved, mask=mask, other=0.0).to(tl.float32)
    lift = gate
    if GATED:
        lift = tl.load(saved + ffn, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(weight + row, mask=in_rows, other=0.0)
    plain = _activate(gate, lift, ACTIVATION)
    tl.store(partial + block.to(tl.int64) * num_rows + row, tl.sum(total * plain, 1), mask=in_rows)
    tl.store(activated + place * ffn + column[None, :], (scale[:, None] * plain).to(kind), mask=mask)
    gate_slope, up_slope = _slopes(gate, lift, ACTIVATION)
    total *= scale[:, None]
    back = hidden_gradient + place * width + column[None, :]
    tl.store(back, (total * gate_slope).to(kind), mask=mask)
    if GATED:
        tl.store(back + ffn, (total * up_slope).to(kind), mask=mask)


@triton.jit
@no_type_check
def weight_gradient(
    left, right, token_index, ends, product,
    height, width, GATHER_LEFT: tl.constexpr, GATHER_RIGHT: tl.constexpr,
    BLOCK_HEIGHT: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``left^T right`` over the rows of each expert; an expert without rows gets zeros."""
    expert = tl.program_id(1)
    high, wide = _grouped_order(tl.program_id(0), tl.cdiv(height, BLOCK_HEIGHT), tl.cdiv(width, BLOCK_WIDTH), GROUP)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    stop = tl.load(ends + expert)
    line = high * BLOCK_HEIGHT + tl.arange(0, BLOCK_HEIGHT)
    column = wide * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    in_lines, in_columns = line < height, column < width
    total = tl.zeros((BLOCK_HEIGHT, BLOCK_WIDTH), tl.float32)
    for first in range(start, stop, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        in_rows = row < stop
        place = row.to(tl.int64)
        left_place, right_place = place, place
        if GATHER_LEFT:
            left_place = tl.load(token_index + row, mask=in_rows, other=0)
        if GATHER_RIGHT:
            right_place = tl.load(token_index + row, mask=in_rows, other=0)
        values = tl.load(
            left + left_place[None, :] * height + line[:, None], mask=in_rows[None, :] & in_lines[:, None], other=0.0
        )
        others = tl.load(
            right + right_place[:, None] * width + column[None, :],
            mask=in_rows[:, None] & in_columns[None, :],
            other=0.0,
        )
        total = tl.dot(values, others, total, input_precision="ieee")
    place = product + expert.to(tl.int64) * height * width + line[:, None] * width + column[None, :]
    tl.store(place, total.to(left.dtype.element_ty), mask=in_lines[:, None] & in_columns[None, :])
