"""Experts on many processes: the same layer, the same numbers."""

from gatewright.parallel.apply import (
    average_expert_gradients,
    check_ep_size,
    expert_mesh,
    expert_parameters,
    parallelize,
    spread_layers,
    sum_in_place,
    total_gradient_norm,
)
from gatewright.parallel.batch_norm import SyncBatchNorm, synchronize_batch_norm, synchronize_experts
from gatewright.parallel.dispatcher import ExpertParallel, expert_runs
from gatewright.parallel.scope import ProcessScope
from gatewright.parallel.state import (
    Rows,
    copied,
    gather_state,
    merge_states,
    own_state,
    part_number,
    part_of_state,
    whole_state,
)

__all__ = [
    "ExpertParallel",
    "ProcessScope",
    "Rows",
    "SyncBatchNorm",
    "average_expert_gradients",
    "check_ep_size",
    "copied",
    "expert_mesh",
    "expert_parameters",
    "expert_runs",
    "gather_state",
    "merge_states",
    "own_state",
    "parallelize",
    "part_number",
    "part_of_state",
    "spread_layers",
    "sum_in_place",
    "synchronize_batch_norm",
    "synchronize_experts",
    "total_gradient_norm",
    "whole_state",
]
