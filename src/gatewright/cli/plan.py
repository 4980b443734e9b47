"""What ``gatewright plan`` does: read sizes from a recipe or from flags, predict, and print."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import nn

from gatewright.cli.flags import flags_of, parse, refuse_unknown_flags, with_router
from gatewright.planner import Device, Links, Part, Plan, Sizes, feed_forward_sizes, measure_sizes, plan, smallest
from gatewright.recipes import recipe_named
from gatewright.tasks import task_named
from gatewright.train import OptimConfig, RunConfig
from gatewright.train.device import autocast
from gatewright.train.launch.roles import Role, parameter_roles
from gatewright.train.optim import by_muon

STATE = {"adamw": 2, "sgd": 1, "none": 0}


@dataclass(frozen=True, kw_only=True)
class Question:
    """What to predict besides what the sizes say.

    Args:
        links: The links between the processes.
        device: The device that each process computes on.
        imbalance: Rows of the busiest process over their mean; None takes what random routing leaves.
        overlap: Count as if tokens travelled while others are computed.
        memory_per_rank: Bytes that a process has: also print the fewest processes on which the step fits.
    """

    links: Links = field(default_factory=Links)
    device: Device = field(default_factory=Device)
    imbalance: float | None = None
    overlap: bool = False
    memory_per_rank: float | None = None


@dataclass(frozen=True, kw_only=True)
class RecipeArguments:
    """Predict memory, bytes and time of a recipe's training step.

    Args:
        run: The run's settings, as in train.
        question: What to predict.
        image_shape: Channels, height and width; None takes those of a built-in data set.
        num_classes: The number of classes; None takes that of a built-in data set.
    """

    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    question: Annotated[Question, tyro.conf.arg(name="")] = field(default_factory=Question)
    image_shape: tuple[int, int, int] | None = None
    num_classes: int | None = None


@dataclass(frozen=True, kw_only=True)
class ExpertSpread:
    """How experts are spread over processes.

    Args:
        ep_size: Processes that share the experts of a layer out among them; it divides the number of processes.
    """

    ep_size: int = 1


@dataclass(frozen=True, kw_only=True)
class SizeArguments:
    """Predict memory, bytes and time of a training step of feed-forward experts.

    Args:
        tokens: Tokens of one step, on all processes together.
        dim: Size of an item, in and out.
        ffn: Hidden size of an expert.
        num_experts: Number of experts of each layer.
        top_k: Experts per token.
        layers: Number of mixture layers.
        matrices: Matrices of an expert: 2, or 3 for SwiGLU.
        row_bytes: Bytes of a number in the rows that are computed and sent.
        number_bytes: Bytes of a weight, of a gradient and of a number in the optimizer's state.
        optimizer: The optimizer, whose state every parameter has; sgd is with momentum.
        dense_parameters: Parameters beside the mixture layers, which every process holds.
        dense_saved: Bytes per token that the dense parameters' layers keep for backward.
        processes: Number of processes.
        parallel: How experts are spread over them.
        question: What to predict.
    """

    tokens: int
    dim: int
    ffn: int
    num_experts: int
    top_k: int = 2
    layers: int = 1
    matrices: Literal[2, 3] = 2
    row_bytes: int = 2
    number_bytes: int = 4
    optimizer: Literal["adamw", "sgd", "none"] = "adamw"
    dense_parameters: int = 0
    dense_saved: float = 0.0
    processes: int = 1
    parallel: ExpertSpread = field(default_factory=ExpertSpread)
    question: Annotated[Question, tyro.conf.arg(name="")] = field(default_factory=Question)


def plan_command(words: list[str]) -> None:
    """Print a prediction for a recipe, or for sizes given as flags."""
    if words and not words[0].startswith("-"):
        name, config = words[0], recipe_named(words[0])
        shown = RecipeArguments(run=config)
        others = {*flags_of(shown.question), "--image-shape", "--num-classes"}
        refuse_unknown_flags(words[1:], others.union(flags_of(config)))
        asked = parse(RecipeArguments, words[1:], prog=f"gatewright plan {name}", default=shown)
        asked = replace(asked, run=with_router(asked.run, config, words))
        sizes, processes, ep_size = recipe_sizes(asked), asked.run.processes, asked.run.parallel.ep_size
        _print(name, sizes, processes, ep_size, asked.question)
    else:
        like = SizeArguments(tokens=1, dim=1, ffn=1, num_experts=1)
        refuse_unknown_flags(words, {*flags_of(like), *flags_of(like.question)})
        given = parse(SizeArguments, words, prog="gatewright plan [RECIPE]")
        _print("these sizes", explicit_sizes(given), given.processes, given.parallel.ep_size, given.question)


def recipe_sizes(asked: RecipeArguments) -> Sizes:
    """Measure a recipe's network, with separate experts from the start.

    Raises:
        ValueError: If the shape of its images is not known, or something else than DDP keeps its dense part equal.
    """
    run = asked.run
    if (run.engine, run.parallel.shard) != ("torch", "none"):
        raise ValueError(
            f"A plan is for the torch engine with every dense parameter on every process; got --engine {run.engine} "
            f"and --parallel.shard {run.parallel.shard}. Leave both out: what is sharded takes less than planned."
        )
    task = task_named(run.task)
    given = {"image_shape": asked.image_shape, "num_classes": asked.num_classes}
    fingerprint, inputs = task.sketch(run.data, run.model, {key: it for key, it in given.items() if it is not None})
    with torch.device("meta"):
        model = task.build(run.model, fingerprint)
    return measure_sizes(
        model,
        inputs,
        tokens=run.data.batch_size,
        state=_state_of(run.optim, parameter_roles(model)),
        context=lambda: autocast(torch.device("cpu"), run.precision),
    )


def explicit_sizes(given: SizeArguments) -> Sizes:
    """Return the sizes that the flags say."""
    dense = Part(parameters=given.dense_parameters, flops=2 * given.dense_parameters, saved=given.dense_saved)
    return feed_forward_sizes(
        tokens=given.tokens,
        dim=given.dim,
        ffn=given.ffn,
        num_experts=given.num_experts,
        top_k=given.top_k,
        layers=given.layers,
        matrices=given.matrices,
        row_bytes=given.row_bytes,
        number_bytes=given.number_bytes,
        state_per_parameter=STATE[given.optimizer],
        dense=dense,
    )


def _state_of(optim: OptimConfig, roles: dict[nn.Parameter, Role]) -> Callable[[Iterable[nn.Parameter]], int]:
    """Say how many numbers a recipe's optimizer and weight averaging keep for some parameters."""

    def state(parameters: Iterable[nn.Parameter]) -> int:
        return sum(parameter.numel() * per_number(parameter) for parameter in parameters)

    def per_number(parameter: nn.Parameter) -> int:
        averaged = int(optim.ema_decay is not None)
        if optim.name == "sgd":
            return averaged + int(optim.momentum > 0)
        return averaged + (1 if optim.name == "muon" and by_muon(roles[parameter]) else 2)

    return state


def _print(name: str, sizes: Sizes, processes: int, ep_size: int, asked: Question) -> None:
    predict = partial(plan, sizes, links=asked.links, device=asked.device, overlap=asked.overlap)
    rho, nodes = asked.imbalance, asked.links.ranks_per_node
    found = [predict(processes, ep_size, imbalance=rho)]
    if asked.memory_per_rank is not None:
        world, ep = smallest(sizes, asked.memory_per_rank, ranks_per_node=nodes, imbalance=rho)
        found.append(predict(world, ep, imbalance=None if rho is None else min(rho, ep)))
    console = Console(markup=False)
    console.print(_table(name, found[0], asked))
    for fewest in found[1:]:
        fits = f"Fewest processes of {_bytes(asked.memory_per_rank or 0)} each: {fewest.processes}"
        console.print(f"\n{fits}, with ep size {fewest.ep_size}.", highlight=False, soft_wrap=True)
        console.print(_table(name, fewest, asked))
    print(
        "A prediction from formulas, not a measurement, for the hardware assumed above, whatever this machine is.\n"
        "Its times leave out much that a real step does; docs/plan.md says how far off they have been."
    )


def _table(name: str, found: Plan, asked: Question) -> Table:
    count = "1 process" if found.processes == 1 else f"{found.processes} processes"
    title = f"Prediction for {name}: {count}, ep size {found.ep_size}"
    table = Table("of the busiest process", "", "what it is", title=title)
    memory, traffic, seconds = found.memory, found.traffic, found.seconds
    rows: list[tuple[str, str, str]] = [
        ("memory", _bytes(memory.total), "weights, gradients, optimizer and activations"),
        ("  weights", _bytes(memory.weights), ""),
        ("  gradients", _bytes(memory.gradients), ""),
        ("  optimizer", _bytes(memory.optimizer), ""),
        ("  activations", _bytes(memory.activations), "kept for backward"),
        ("sent per step", _bytes(traffic.total), "mean over the processes"),
        ("  all-to-all", _bytes(traffic.all_to_all), "rows and their gradients, if routing is uniform"),
        ("  dense gradients", _bytes(traffic.dense_reduction), f"to reduce {_bytes(traffic.dense_reduced)}"),
        ("  expert gradients", _bytes(traffic.expert_reduction), f"to reduce {_bytes(traffic.expert_reduced)}"),
        ("step time", _seconds(seconds.step), "at least, on the hardware assumed below"),
        ("  computing", _seconds(seconds.compute), _bound(found)),
        ("  all-to-all", _seconds(seconds.all_to_all), ""),
        ("  reductions", _seconds(seconds.reduction), ""),
        ("  optimizer", _seconds(seconds.update), "" if seconds.update else "--device.memory-bandwidth not given"),
        ("efficiency", f"{seconds.efficiency:.1%}", "evenly spread computing alone, over the step"),
    ]
    for row in rows:
        table.add_row(*row)
    table.add_section()
    for row in _assumed(found, asked):
        table.add_row(*row)
    return table


def _bound(found: Plan) -> str:
    """Say what the time of computing is made of."""
    if found.seconds.compute > found.seconds.launch:
        return f"arithmetic; imbalance between processes {found.imbalance:.3g}"
    return "starting operations: their arithmetic takes less"


def _assumed(found: Plan, asked: Question) -> Iterable[tuple[str, str, str]]:
    """Yield what the prediction takes for granted about the hardware, and the flags that say otherwise."""
    device, links = asked.device, asked.links
    origin = "an H100's peak, unless given: " if device.flops == Device().flops else ""
    yield "assumed device", f"{device.flops / 1e12:,.4g} TFLOP/s", f"{origin}--device.flops"
    yield "  share of it reached", f"{device.efficiency:.0%}", "--device.efficiency"
    bandwidth = "not counted" if math.isinf(device.memory_bandwidth) else f"{_bytes(device.memory_bandwidth)}/s"
    yield "  memory bandwidth", bandwidth, "--device.memory-bandwidth"
    yield "  to start an operation", _seconds(device.launch), "measured on a CPU, unless given: --device.launch"
    if found.processes > 1:
        yield "assumed links", f"{_bytes(links.inside)}/s", f"inside a node of {links.ranks_per_node}: --links.inside"
        yield "  between nodes", f"{_bytes(links.between)}/s", "--links.between"


def _bytes(number: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:,.4g} {unit}"
    return f"{number:,.0f} B"


def _seconds(number: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if number >= size:
            return f"{number / size:,.4g} {unit}"
    return f"{number / 1e-6:,.4g} us"
