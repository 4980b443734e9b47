"""What ``gatewright plan`` does: read sizes from a recipe or from flags, predict, and print."""

import math
from collections.abc import Callable, Iterable, Mapping
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
from gatewright.train.muon import FORMS
from gatewright.train.roles import Role, parameter_roles

STATE = {"adamw": 2, "sgd": 1, "none": 0}


@dataclass(frozen=True, kw_only=True)
class Question:
    """Settings of a prediction, besides the sizes.

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
        question: The prediction to make.
    """

    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    question: Annotated[Question, tyro.conf.arg(name="")] = field(default_factory=Question)


@dataclass(frozen=True, kw_only=True)
class ExpertSpread:
    """The spread of experts over processes.

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
        parallel: The spread of the experts over them.
        question: The prediction to make.
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
        refuse_unknown_flags(words[1:], {*flags_of(shown.question), *flags_of(config)})
        asked = parse(RecipeArguments, words[1:], prog=f"gatewright plan {name}", default=shown)
        asked = replace(asked, run=with_router(asked.run, config, words))
        run = asked.run
        _print(name, recipe_sizes(run), run.processes, run.parallel.ep_size, asked.question)
    else:
        like = SizeArguments(tokens=1, dim=1, ffn=1, num_experts=1)
        refuse_unknown_flags(words, {*flags_of(like), *flags_of(like.question)})
        given = parse(SizeArguments, words, prog="gatewright plan [RECIPE]")
        _print("these sizes", explicit_sizes(given), given.processes, given.parallel.ep_size, given.question)


def recipe_sizes(run: RunConfig) -> Sizes:
    """Measure a recipe's network, which DDP keeps equal, with separate experts, on inputs like those of its task."""
    if (run.engine, run.parallel.shard) != ("torch", "none"):
        raise ValueError(
            f"A plan is for the torch engine with every dense parameter on every process; got --engine {run.engine} "
            f"and --parallel.shard {run.parallel.shard}. Leave both out: what is sharded takes less than planned."
        )
    task = task_named(run.task)
    fingerprint, inputs = task.sketch(run.data, run.model)
    with torch.device("meta"):
        model = task.build(run.model, fingerprint)
    return measure_sizes(
        model,
        inputs,
        items=run.data.batch_size,
        state=_state_of(run.optim, parameter_roles(model)),
        context=partial(autocast, torch.device("cpu"), run.precision),
    )


def explicit_sizes(given: SizeArguments) -> Sizes:
    """Return the sizes that the flags say."""
    same = ("tokens", "dim", "ffn", "num_experts", "top_k", "layers", "matrices", "row_bytes", "number_bytes")
    return feed_forward_sizes(
        **{name: getattr(given, name) for name in same},
        state_per_parameter=STATE[given.optimizer],
        dense=Part(parameters=given.dense_parameters, flops=2 * given.dense_parameters, saved=given.dense_saved),
    )


def _state_of(optim: OptimConfig, roles: dict[nn.Parameter, Role]) -> Callable[[Iterable[nn.Parameter]], int]:
    """Say how many numbers a recipe's optimizer and weight averaging keep for some parameters."""

    def state(parameters: Iterable[nn.Parameter]) -> int:
        return sum(parameter.numel() * per_number(parameter) for parameter in parameters)

    def per_number(parameter: nn.Parameter) -> int:
        averaged = int(optim.ema_decay is not None)
        if optim.name == "sgd":
            return averaged + int(optim.momentum > 0)
        return averaged + (1 if optim.name == "muon" and roles[parameter] in FORMS else 2)

    return state


def _print(name: str, sizes: Sizes, processes: int, ep_size: int, asked: Question) -> None:
    predict = partial(plan, sizes, links=asked.links, device=asked.device, overlap=asked.overlap)
    rho, room, console = asked.imbalance, asked.memory_per_rank, Console(markup=False)
    found = predict(processes, ep_size, imbalance=rho)
    nodes = asked.links.ranks_per_node
    fewest = None if room is None else smallest(sizes, room, ranks_per_node=nodes, imbalance=rho)
    console.print(_table(name, found, asked))
    if fewest is not None:
        processes, ep_size = fewest
        fits = f"Fewest processes of {_bytes(room or 0)} each: {processes}, with ep size {ep_size}."
        console.print(f"\n{fits}", highlight=False, soft_wrap=True)
        console.print(_table(name, predict(*fewest, imbalance=None if rho is None else min(rho, ep_size)), asked))
    print(
        "A prediction from formulas, not a measurement, for the hardware assumed above, whatever this machine is.\n"
        "Its times leave out much that a real step does; docs/plan.md says how far off they have been."
    )


def _table(name: str, found: Plan, asked: Question) -> Table:
    count = "1 process" if found.processes == 1 else f"{found.processes} processes"
    table = Table(
        "of the busiest process", "", "what it is", title=f"Prediction for {name}: {count}, ep size {found.ep_size}"
    )
    memory, traffic, seconds = found.memory, found.traffic, found.seconds
    update = "" if seconds.update else "--device.memory-bandwidth not given"
    for row in (
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
        ("  optimizer", _seconds(seconds.update), update),
        ("efficiency", f"{seconds.efficiency:.1%}", "evenly spread computing alone, over the step"),
    ):
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
    return _in_units(number, {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3}) or f"{number:,.0f} B"


def _seconds(number: float) -> str:
    return _in_units(number, {"s": 1.0, "ms": 1e-3}) or f"{number / 1e-6:,.4g} us"


def _in_units(number: float, units: Mapping[str, float]) -> str | None:
    """Write a number in the first unit of which it is at least one."""
    return next((f"{number / size:,.4g} {unit}" for unit, size in units.items() if number >= size), None)
