"""One logical state whatever the split: the state of a model's experts, put together and shared out again."""

from collections.abc import Mapping
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from gatewright.layers import ExpertLayer
from gatewright.layers.base import moe_layers
from gatewright.parallel.dispatcher import ExpertParallel, expert_runs


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


def part_of_state(tensors: dict[str, Tensor], model: nn.Module, mesh: DeviceMesh) -> dict[str, Tensor | Rows]:
    """Pick what this process is to save, so that all of them together save everything once, and none gathers it.

    The first process has all but the experts of others; the first copy of each other expert is with the process where
    it lives; stacked experts are `Rows`. `own_state` takes the merged dicts.
    """
    if mesh.get_local_rank("replica") > 0:
        return {}
    spread = _spread_layers(model)
    own = {name: tensor for name, tensor in tensors.items() if _layer_of(name, spread)}
    stacked = {
        name: Rows(tensor)
        for name, tensor in own.items()
        if spread[str(_layer_of(name, spread))].experts.stacked and tensor.dim()
    }
    return {**(tensors if mesh.get_local_rank("expert") == 0 else own), **stacked}


def whole_state(tensors: Mapping[str, Tensor | Rows]) -> dict[str, Tensor]:
    """Put together all rows."""
    return {name: torch.cat(value.runs) if isinstance(value, Rows) else value for name, value in tensors.items()}


def gather_state(tensors: dict[str, Tensor], model: nn.Module, mesh: DeviceMesh) -> dict[str, Tensor]:
    """Put the state of all experts together on the first process; every process calls it.

    Args:
        tensors: By name: parameters and buffers as `state_dict` names them, or what an optimizer keeps of a parameter,
            under the parameter's name with an ending of its own.
        model: From `parallelize`.
        mesh: The same one.

    Returns:
        On the first process the tensors that one process alone would have, elsewhere this process's own.
    """
    spread = _spread_layers(model)
    own = {name: tensor for name, tensor in tensors.items() if _layer_of(name, spread)}
    group = mesh.get_group("expert")
    if mesh.get_local_rank("replica") > 0 or not spread:
        return tensors
    parts: list[dict[str, Tensor]] = [own]
    for source in range(1, group.size()):
        if group.rank() == source:
            _send(own, group)
        elif group.rank() == 0:
            parts.append(_receive(source, group))
    return {**tensors, **_joined(parts, spread)} if group.rank() == 0 else tensors


def own_state(tensors: Mapping[str, Tensor | Rows], model: nn.Module, mesh: DeviceMesh) -> dict[str, Tensor]:
    """Pick this process's share of what was saved whole or in parts, at any number of processes."""
    spread, rank, ep_size = _spread_layers(model), mesh.get_local_rank("expert"), mesh.get_group("expert").size()
    own: dict[str, Tensor | Rows] = {}
    for name, value in tensors.items():
        prefix = _layer_of(name, spread)
        if prefix is None:
            own[name] = value
            continue
        run = expert_runs(spread[prefix].router.num_experts, ep_size)[rank]
        if not spread[prefix].experts.stacked:
            if int(name.removeprefix(prefix).split(".")[1]) in run:
                own[name] = value
        else:
            single = isinstance(value, Tensor) and not value.dim()
            own[name] = value if single else value[run.start : run.stop]
    return whole_state(own)


def _spread_layers(model: nn.Module) -> dict[str, ExpertLayer]:
    """Every layer whose experts are spread over processes, by the prefix of their names."""
    layers = ((name, layer) for name, layer in moe_layers(model) if isinstance(layer, ExpertLayer))
    spread = ((name, layer) for name, layer in layers if isinstance(layer.dispatcher, ExpertParallel))
    return {f"{name}.experts." if name else "experts.": layer for name, layer in spread}


def _layer_of(name: str, spread: dict[str, ExpertLayer]) -> str | None:
    return next((prefix for prefix in spread if name.startswith(prefix)), None)


def _joined(parts: list[dict[str, Tensor]], spread: dict[str, ExpertLayer]) -> dict[str, Tensor]:
    """Merge single experts by their names, and stacked ones along their first dimension."""
    joined: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        prefix = _layer_of(name, spread)
        assert prefix is not None
        tensors = [part[name] for part in parts if name in part]
        joined[name] = torch.cat(tensors) if spread[prefix].experts.stacked and tensors[0].dim() else tensors[0]
    return joined


def _send(tensors: dict[str, Tensor], group: dist.ProcessGroup) -> None:
    labels = [(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]
    dist.send_object_list([labels], group=group, group_dst=0)
    for tensor in tensors.values():
        dist.send(tensor.cpu().contiguous(), group=group, group_dst=0)


def _receive(source: int, group: dist.ProcessGroup) -> dict[str, Tensor]:
    received: list[list[tuple[str, torch.Size, torch.dtype]]] = [[]]
    dist.recv_object_list(received, group=group, group_src=source)
    tensors = {name: torch.empty(shape, dtype=dtype) for name, shape, dtype in received[0]}
    for tensor in tensors.values():
        dist.recv(tensor, group=group, group_src=source)
    return tensors
