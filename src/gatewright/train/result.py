"""The result of a run: what `result.json` holds, and where its numbers come from."""

import contextlib
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata as package
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gatewright import metrics
from gatewright.atomic import atomic_write
from gatewright.experts import GroupedFeedForward
from gatewright.layers.base import RoutedLayer, moe_layers
from gatewright.planner.measure import flop_counter
from gatewright.routing_sums import RoutingSums
from gatewright.tasks import Batch, Evaluation, LayerUse, Task
from gatewright.train.strategies.single import ALONE, Strategy


def describe_result(
    task: Task, model: nn.Module, evaluation: Evaluation, example: Batch, strategy: Strategy = ALONE
) -> dict[str, Any]:
    """Return the part of the result that a model and its evaluation determine; every process calls this."""
    flops = active_flops(model, example[0].to(next(model.parameters()).device), strategy)
    return {
        **evaluation.describe(),
        "num_parameters": num_parameters(model, strategy),
        "num_active_parameters": num_active_parameters(model, strategy),
        f"active_flops_per_{task.item}": int(flops / task.count(example)),
        "layers": {
            name: describe_kind(model.get_submodule(name)) | describe_layer(use)
            for name, use in evaluation.layers.items()
        },
    }


def describe_kind(layer: nn.Module) -> dict[str, Any]:
    """Return what `result.json` says of what a layer with a router is."""
    assert isinstance(layer, RoutedLayer)
    return {"layer": type(layer).__name__, "router": type(layer.router).__name__, "top_k": layer.router.top_k}


def describe_layer(use: LayerUse) -> dict[str, Any]:
    """Return what `result.json` says of one MoE layer."""
    return {
        "tokens_per_expert": use.sums.tokens_per_expert.to(use.class_by_expert.dtype).tolist(),
        "load_cv": float(metrics.load_cv(use.sums)),
        "max_over_mean_load": float(metrics.max_over_mean_load(use.sums)),
        "dropped_fraction": float(metrics.drop_rate(use.sums)),
        "dead_experts": metrics.dead_experts(use.sums).nonzero().flatten().tolist(),
        "class_by_expert": use.class_by_expert.tolist(),
        "tokens_per_class": use.tokens_per_class.tolist(),
    }


def evaluation_metrics(split: str, evaluation: Evaluation) -> dict[str, float]:
    """Return the tracked metrics of an evaluation; `split` is ``"holdout"`` or ``"test"``."""
    values = {f"{split}/{name}": value for name, value in evaluation.metrics.items()}
    for name, use in evaluation.layers.items():
        values |= layer_metrics(name, use.sums, split)
    return values


def layer_metrics(name: str, sums: RoutingSums, split: str) -> dict[str, float]:
    """Return the tracked metrics of one MoE layer, over the batches of one split that the sums are of."""
    values = {
        "load_cv": metrics.load_cv(sums),
        "max_over_mean_load": metrics.max_over_mean_load(sums),
        "drop_rate": metrics.drop_rate(sums),
        "router_entropy": metrics.router_entropy(sums),
        "dead_experts": metrics.dead_experts(sums).sum(),
    }
    values |= {f"load/{index:02d}": share for index, share in enumerate(metrics.load_share(sums))}
    return {f"{split}/layers/{name}/{metric}": float(value) for metric, value in values.items()}


def num_parameters(model: nn.Module, strategy: Strategy = ALONE) -> int:
    """Count all parameters, each expert's once wherever it lives."""
    experts = {parameter for _, layer in moe_layers(model) for parameter in _experts(layer).parameters()}
    rest = sum(numel(parameter) for parameter in model.parameters() if parameter not in experts)
    return rest + sum(_num_expert_parameters(layer, strategy) for _, layer in moe_layers(model))


def num_active_parameters(model: nn.Module, strategy: Strategy = ALONE) -> int:
    """Count the parameters that one item uses: all of them, but of each layer's experts only top_k, of mean size.

    A shared expert counts whole, and of merged experts those whose parameters are mixed.
    """
    active = float(num_parameters(model, strategy))
    for _, layer in moe_layers(model):
        idle = 1 - layer.router.top_k / layer.router.num_experts
        active -= _num_expert_parameters(layer, strategy) * idle
    return round(active)


def _experts(layer: RoutedLayer) -> nn.Module:
    return layer.get_submodule("experts")


def _num_expert_parameters(layer: RoutedLayer, strategy: Strategy) -> int:
    count = torch.tensor(sum(numel(parameter) for parameter in _experts(layer).parameters()))
    strategy.all_reduce(count)
    return int(count) // strategy.replicas


def numel(parameter: nn.Parameter) -> int:
    """Count the numbers of a parameter, also where ZeRO 3 keeps them elsewhere."""
    numel: int = getattr(parameter, "ds_numel", parameter.numel())
    return numel


@torch.no_grad()
def active_flops(model: nn.Module, inputs: Tensor, strategy: Strategy = ALONE) -> int:
    """Count the multiplications and additions of a batch's forward, which is really routed.

    Counted by torch: matrix products, grouped ones among them, and convolutions; an addition and a multiplication are
    two.
    """
    was_training = model.training
    model.eval()
    with _by_torchs_products(model), flop_counter() as counter:
        model(inputs[strategy.shard_batch(len(inputs))])
    model.train(was_training)
    total = torch.tensor(counter.get_total_flops())
    strategy.all_reduce(total)
    return int(total)


@contextlib.contextmanager
def _by_torchs_products(model: nn.Module) -> Iterator[None]:
    """Have grouped experts multiply by torch's own products, since those of kernels cannot be counted."""
    experts = [module for module in model.modules() if isinstance(module, GroupedFeedForward)]
    chosen = [each.backend for each in experts]
    for each in experts:
        each.backend = "torch"
    yield
    for each, backend in zip(experts, chosen, strict=True):
        each.backend = backend


def versions(libraries: Sequence[str] = ()) -> dict[str, str]:
    """Return the versions that a number depends on, and those of the libraries of a run's engine."""
    found = {"python": platform.python_version()}
    for name in ("gatewright", "torch", "numpy", "datasets", "mlflow", "scikit-learn", *libraries):
        with contextlib.suppress(package.PackageNotFoundError):
            found[name] = package.version(name)
    return found


def hardware(device: torch.device) -> dict[str, str | int]:
    """Return what the run ran on."""
    found: dict[str, str | int] = {"processor": _processor(), "cores": os.cpu_count() or 1}
    found |= {"threads": torch.get_num_threads(), "device": str(device)}
    if device.type == "cuda":
        found["accelerator"] = torch.cuda.get_device_name(device)
    return found


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Write a file that is either complete or absent."""
    text = json.dumps(content, indent=2) + "\n"
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
