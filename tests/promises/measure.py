"""The measurements behind one row of the page."""

import copy
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils.checkpoint import checkpoint

from gatewright import Soft, moe_layers
from tests.cases import padded
from tests.compare import SEED, arguments, by_the_layer, by_the_reference, compiled_step, differences, results, step
from tests.promises.places import TABLES, TOKENS, make

WITHIN = 1e-6
TOLERANCE = {"float32": 1e-5, "float64": 1e-12, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Row:
    """One combination. Figures are largest relative differences."""

    output_float32: float
    gradient_float32: float
    output_float64: float
    gradient_float64: float
    alone_in_evaluation: bool
    alone_in_training: bool
    one_graph: bool
    checkpointing: bool
    padding: bool
    output_bfloat16: float

    def answers(self):
        """By name, what is so or not."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.type is bool}

    def too_large(self):
        """By name, the figures above their tolerance."""
        figures = {field.name: getattr(self, field.name) for field in fields(self) if field.type is float}
        return {name: value for name, value in figures.items() if not value <= TOLERANCE[name.split("_")[1]]}


def measure(table, row, is_one_graph):
    """Measure a row; ``is_one_graph()`` is asked last, because another process may be at work on the answer."""
    (output32, gradient32), (output64, gradient64) = (
        worst_parity(table, row, dim, dtype) for dim, dtype in ((8, torch.float32), (7, torch.float64))
    )
    layer, x = make(table, row)
    return Row(
        output_float32=output32,
        gradient_float32=gradient32,
        output_float64=output64,
        gradient_float64=gradient64,
        alone_in_evaluation=alone_in_evaluation(layer, x),
        alone_in_training=alone_in_training(layer, x),
        checkpointing=same_when_checkpointed(layer, x),
        padding=same_when_padded(layer, x),
        output_bfloat16=bfloat16(layer, x),
        one_graph=is_one_graph(),
    )


def measure_all_of(place):
    """Measure a row in a process that takes one core."""
    torch.set_num_threads(1)
    return measure(*place, partial(in_one_graph, *place))


def worst(figures):
    """The largest of some figures; NaN is above all."""
    return float(torch.tensor([*figures], dtype=torch.float64).max())


def worst_parity(table, row, dim, dtype):
    """How far output and gradients are from the reference's, at worst over the row's layers."""
    found = [parity(*make(table, row, dim, case), dtype) for case in range(len(TABLES[table][row]))]
    return [worst(figures) for figures in zip(*found, strict=True)]


def parity(layer, x, dtype):
    """How far a training step's output and gradients are from the reference's."""
    layer, x, upstream = layer.to(dtype), x.to(dtype), torch.randn_like(x).to(dtype)
    actual, expected = (results(compute, layer, [x], upstream) for compute in (by_the_layer, by_the_reference))
    relative = differences(actual, expected)
    return relative.pop("output"), worst(relative.values())


def forward(model, layer, x, seed=SEED):
    """A forward without gradients, with the noise of a seed; ``model`` is the layer, or runs it."""
    torch.manual_seed(seed)
    with torch.no_grad():
        return model(*arguments(layer, x))


def alone_in_evaluation(layer, x):
    """Whether an item, or a group of `Soft`, has one output: alone, among others and in another order."""
    layer, size = copy.deepcopy(layer).eval(), group_size(layer)
    joint, order = forward(layer, layer, x), torch.arange(TOKENS).view(-1, size).flip(0).flatten()
    alone = torch.cat([forward(layer, layer, part) for part in x.split(size)])
    return same(alone, joint) and same(forward(layer, layer, x[order]), joint[order])


def alone_in_training(layer, x):
    """Whether the outputs of the first half of a batch stay as they are where the second half is another."""
    layer, half = copy.deepcopy(layer), TOKENS // 2
    others = [torch.cat([x[:half], second]) for second in torch.randn(16, half, x.shape[1])]
    pairs = ([forward(layer, layer, batch, seed)[:half] for batch in (x, other)] for seed, other in enumerate(others))
    return all(same(*pair) for pair in pairs)


def group_size(layer):
    """How many items are one to a layer; where a whole batch is, it should not be."""
    router = next(moe.router for _, moe in moe_layers(layer))
    return router.group_size or 1 if isinstance(router, Soft) else 1


def same(actual, expected):
    """Whether all numbers are within 1e-6."""
    return bool((actual - expected).abs().max() <= WITHIN)


def in_one_graph(table, row):
    """Whether torch.compile(fullgraph=True) takes a row's layer, in training and in evaluation.

    Raises:
        AssertionError: If it does, and computes something else than eager mode.
    """
    layer, x = make(table, row)
    try:
        relative = compiled_step(layer, x, backend="aot_eager", fullgraph=True)
    except GuardOnDataDependentSymNode:
        return False  # a branch on a size that is data
    evaluated = forward(torch.compile(layer.eval(), backend="eager", fullgraph=True), layer, x)
    assert worst(relative.values()) <= TOLERANCE["float32"], relative
    assert same(evaluated, forward(layer, layer, x))
    return True


def same_when_checkpointed(layer, x):
    """Whether a step with activation checkpointing is the step without, auxiliary losses and noise included."""
    again = partial(checkpoint, layer, use_reentrant=False)
    relative = differences(step(again, layer, x), step(layer, layer, x))
    return worst(relative.values()) <= TOLERANCE["float32"]


def same_when_padded(layer, x):
    """Whether masked items change nothing: outputs, sums, losses and gradients are those of the others alone."""
    moe, (among, mask) = next(moe for _, moe in moe_layers(layer)), padded(x)
    alone, sums = step(layer, layer, x), moe.routing.sums
    found = step(partial(with_mask, layer, mask), layer, among)
    zeros = [found[name][~mask].abs().max() == 0 for name in ("output", "x")]
    found |= {name: found[name][mask] for name in ("output", "x")}
    pairs = [(found, alone), (moe.routing.sums.by_name(), sums.by_name())]
    figures = [figure for pair in pairs for figure in differences(*pair).values()]
    evaluated = forward(partial(with_mask, layer.eval(), mask), layer, among)[mask]
    answer = all(zeros) and same(evaluated, forward(layer, layer, x)) and worst(figures) <= TOLERANCE["float32"]
    layer.train()
    return answer


def with_mask(layer, mask, x, features=None):
    """Call a layer on items of which some are masked."""
    return layer(x, features, mask)


def bfloat16(layer, x):
    """How far the output under bfloat16 autocast is from float32's; infinitely, if a route or a type is wrong.

    The output is of bfloat16, and gradients are of their parameters' type.
    """
    moe = next(moe for _, moe in moe_layers(layer))
    plain, weight = step(layer, layer, x), moe.routing.weight
    cast = step(layer, layer, x, autocast=True)
    types = {name: value.dtype for name, value in cast.items() if name not in ("output", "loss")}
    right = cast["output"].dtype == torch.bfloat16 and set(types.values()) == {torch.float32}
    if not right or not torch.equal(moe.routing.weight, weight) or moe.routing.weight.requires_grad:
        return float("inf")
    return differences(cast, plain)["output"]
