"""Experts on many processes: the same layer, the same numbers."""

from gatewright.parallel.apply import (
    average_expert_gradients,
    check_ep_size,
    expert_mesh,
    expert_parameters,
    parallelize,
    sum_in_place,
    total_gradient_norm,
)
from gatewright.parallel.dispatcher import ExpertParallel, expert_runs
from gatewright.parallel.scope import ProcessScope

__all__ = [
    "ExpertParallel",
    "ProcessScope",
    "average_expert_gradients",
    "check_ep_size",
    "expert_mesh",
    "expert_parameters",
    "expert_runs",
    "parallelize",
    "sum_in_place",
    "total_gradient_norm",
]
