"""Torch's private interfaces that the core reads, in one place; checked on torch 2.11 and 2.13."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch._functorch import pyfunctorch
from torch.autograd import forward_ad


def backward_id() -> int:
    """Return the number of the backward pass that runs now, or -1 where none does."""
    return torch._C._current_graph_task_id()


def backward_keeps_graph() -> bool:
    """Whether the backward pass that runs now leaves its graph for another one (``retain_graph``)."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def saves_by_hooks() -> bool:
    """Whether tensors for backward are saved by hooks, as non-reentrant activation checkpointing does."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def is_exporting() -> bool:
    """Whether `torch.export` traces the program; torch 2.11 says so of `torch.compile` too, but for this flag."""
    return torch.compiler._is_exporting_flag


def in_transform() -> bool:
    """Whether a transform of `torch.func` runs, such as ``grad``, ``jvp`` or ``vmap``."""
    return not torch.compiler.is_compiling() and _functorch.peek_interpreter_stack() is not None


def in_forward_mode() -> bool:
    """Whether derivatives are computed in forward mode, by `torch.func.jvp` or `torch.autograd.forward_ad`."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def holds_what_runs_now() -> bool:
    """Whether a program is traced, transformed or captured as a CUDA graph: what runs later would not be in it."""
    at_once = torch.compiler.is_compiling() or is_exporting() or in_transform() or in_forward_mode()
    return at_once or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks see what goes into a module or comes out of it."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return any(len(each) > 0 for each in hooks)


def is_batched(tensor: Tensor) -> bool:
    """Whether `torch.func.vmap` hides a dimension of the tensor, so that its values cannot be read."""
    while in_transform() and _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            return True
        tensor = _functorch.get_unwrapped(tensor)
    return False


def outlived_transform(tensor: Tensor) -> bool:
    """Whether the tensor belongs to a transform that has returned, and is of no use any more."""
    if torch.compiler.is_compiling() or not _functorch.is_functorch_wrapped_tensor(tensor):
        return False
    return (
        _functorch.is_dead_tensor_wrapper(tensor)  # type: ignore[attr-defined]
        or _functorch.maybe_get_level(tensor) > _level()
    )


def without_transforms(tensor: Tensor) -> Tensor:
    """Return the values behind a transform's tensor, summed over the dimensions that ``vmap`` hides."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        hidden = _functorch.maybe_get_bdim(tensor) if _functorch.is_batchedtensor(tensor) else None
        tensor = _functorch.get_unwrapped(tensor)
        tensor = tensor if hidden is None else tensor.sum(hidden)
    return tensor


@contextmanager
def outside_transforms() -> Iterator[None]:
    """Compute as if no transform ran, on tensors that belong to none."""
    with pyfunctorch.temporarily_clear_interpreter_stack():
        yield


def _level() -> int:
    level: int | None = _functorch.maybe_current_level()
    return 0 if level is None else level


def num_holders(tensor: Tensor) -> int:
    """Count the tensors that hold the memory of one, itself included."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) - 1  # Without the storage asked for here.


def mend_inductor() -> bool:
    """Have Inductor's C++ back-end remember, when it fuses loops, what was written into the tensors that they read.

    Torch 2.13, and earlier ones by their sources, forget it in ``recompute_size_and_body`` where a loop over two
    dimensions is fused with one over their product. A gate's gradient, which a scatter writes, was then read before the
    scatter, as zeros. Returns whether this process was not mended yet.
    """
    from torch._inductor.scheduler import SchedulerNode  # Takes seconds, and is loaded where one compiles.

    forgets = SchedulerNode.recompute_size_and_body
    if hasattr(forgets, "__wrapped__"):
        return False

    @functools.wraps(forgets)
    def recompute_size_and_body(node: SchedulerNode, *args: Any, **kwargs: Any) -> None:
        forgets(node, *args, **kwargs)
        node.set_read_writes(node.read_writes.rename(node.mutation_renames))

    SchedulerNode.recompute_size_and_body = recompute_size_and_body  # type: ignore[assignment, method-assign]
    return True


# Runs while a graph is traced, as `torch.compiler.assume_constant_result` says, which would import the whole compiler.
mend_inductor._dynamo_marked_constant = True  # type: ignore[attr-defined]
