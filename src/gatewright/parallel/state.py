"""One logical state whatever the split: the state of a model's experts, put together and shared out again."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from gatewright.layers import ExpertLayer
from gatewright.parallel.apply import spread_layers
from gatewright.parallel.dispatcher import expert_runs


class Rows:
    """Rows of one tensor that lie in several pieces; they are put together only as far as they are asked for.

    Args:
        runs: The pieces in order, of shapes ``(rows of the piece, ...)``.
    """

    def __init__(self, *runs: Tensor) -> None:
        self.runs = runs

    def __getitem__(self, rows: slice) -> Tensor:
        """Return the rows from ``rows.start`` to ``rows.stop``, both given."""
        starts = accumulate(map(len, self.runs), initial=0)
        return torch.cat(
            [
                run[max(rows.start - start, 0) : max(rows.stop - start, 0)]
                for run, start in zip(self.runs, starts, strict=False)
            ]
        )


def part_of_state(tensors: Mapping[str, Tensor], model: nn.Module, mesh: DeviceMesh) -> dict[str, Tensor | Rows]:
    """Pick what this process is to save, so that all of them together save everything once, and none gathers it.

    The first process has all but the experts of others; the first copy of each other expert is with the process where
    it lives; stacked experts are `Rows`. `merge_states` makes them one state again.

    Args:
        tensors: Tensors by name: parameters and buffers as `state_dict` names them, or what an optimizer keeps of a
            parameter, under the parameter's name with an ending of its own.
        model: A model that `parallelize` has spread.
        mesh: The mesh that it was spread over.
    """
    if mesh.get_local_rank("replica") > 0:
        return {}
    spread, first = _spread(model), mesh.get_local_rank("expert") == 0
    part: dict[str, Tensor | Rows] = {}
    for name, tensor in tensors.items():
        prefix = _prefix_of(name, spread)
        if prefix is not None:
            part[name] = Rows(tensor) if spread[prefix].experts.stacked and tensor.dim() else tensor
        elif first:
            part[name] = tensor
    return part


def part_number(model: nn.Module, mesh: DeviceMesh | None) -> tuple[int | None, int]:
    """Return the number of the part that this process saves, None if it saves none, and how many parts there are."""
    if mesh is None:
        return 0, 1
    if any(True for _ in spread_layers(model)):
        return None if mesh.get_local_rank("replica") else mesh.get_local_rank("expert"), mesh["expert"].size()
    return None if dist.get_rank() else 0, 1


def merge_states(states: Sequence[Any]) -> Any:
    """Join what parts hold: dicts by their keys, lists by place, `Rows` in order; of anything else the first."""
    first = states[0]
    if isinstance(first, dict):
        keys = dict.fromkeys(key for state in states for key in state)
        return {key: merge_states([state[key] for state in states if key in state]) for key in keys}
    if isinstance(first, list) and len(states) > 1:
        return [merge_states([state[place] for state in states if place < len(state)]) for place in range(len(first))]
    return Rows(*(run for state in states for run in state.runs)) if isinstance(first, Rows) else first


def copied(state: Any) -> Any:
    """Copy the tensors of a state to the CPU, so that training may go on changing them."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, Rows):
        return Rows(*map(copied, state.runs))
    if isinstance(state, dict):
        return {key: copied(value) for key, value in state.items()}
    return [copied(value) for value in state] if isinstance(state, list | tuple) else state


def whole_state(tensors: Mapping[str, Tensor | Rows]) -> dict[str, Tensor]:
    """Put together all rows."""
    return {name: torch.cat(value.runs) if isinstance(value, Rows) else value for name, value in tensors.items()}


def gather_state(tensors: dict[str, Tensor], model: nn.Module, mesh: DeviceMesh) -> dict[str, Tensor]:
    """Put the state of all experts together on the first process; names are as in `part_of_state`.

    Returns:
        On the first process the tensors that one process alone would have, elsewhere this process's own.
    """
    group = mesh.get_group("expert")
    if mesh.get_local_rank("replica") > 0 or not _spread(model):
        return tensors
    parts: list[Any] | None = [None] * group.size() if group.rank() == 0 else None
    dist.gather_object(copied(part_of_state(tensors, model, mesh)), parts, group=group, group_dst=0)
    return whole_state(merge_states(parts)) if parts else tensors


def own_state(tensors: Mapping[str, Tensor | Rows], model: nn.Module, mesh: DeviceMesh) -> dict[str, Tensor]:
    """Pick this process's share of what was saved whole or in parts, at any number of processes."""
    spread, rank, ep_size = _spread(model), mesh.get_local_rank("expert"), mesh.get_group("expert").size()
    own: dict[str, Tensor | Rows] = {}
    for name, value in tensors.items():
        prefix = _prefix_of(name, spread)
        if prefix is None:
            own[name] = value
            continue
        run = expert_runs(spread[prefix].router.num_experts, ep_size)[rank]
        if spread[prefix].experts.stacked:
            single = isinstance(value, Tensor) and not value.dim()
            own[name] = value if single else value[run.start : run.stop]
        elif int(name.removeprefix(prefix).split(".")[1]) in run:
            own[name] = value
    return whole_state(own)


def _spread(model: nn.Module) -> dict[str, ExpertLayer]:
    """Every layer whose experts are spread over processes, by the prefix of their names."""
    return {f"{name}.experts.".lstrip("."): layer for name, layer, _ in spread_layers(model)}


def _prefix_of(name: str, spread: dict[str, ExpertLayer]) -> str | None:
    return next((prefix for prefix in spread if name.startswith(prefix)), None)
