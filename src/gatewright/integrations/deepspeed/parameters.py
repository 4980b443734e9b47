"""What DeepSpeed recognises, reduces and saves of a layer whose experts are spread over processes.

DeepSpeed asks ``isinstance(layer, deepspeed.moe.layer.MoE)`` and nothing else will do, so a layer gets a class that is
both: its forward stays ours, and DeepSpeed's part is the names under which its engine looks things up. Importing this
file does not import DeepSpeed.
"""

import functools
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gatewright.extras import require
from gatewright.layers import ExpertLayer, RoutedLayer
from gatewright.parallel import ExpertParallel, spread_layers

THEIRS = "deepspeed_moe.experts.deepspeed_experts."  # what DeepSpeed's checkpoints call an expert, by local number
OURS = "experts."
WORD, HIDDEN = "expert", "EXPERT"  # DeepSpeed takes every other key with this word for an expert's, and fails on it


def adapt_to_deepspeed(model: nn.Module) -> nn.Module:
    """Make `deepspeed.initialize` see which parameters belong to experts of this process. In place; returns the model.

    Call it after `parallelize` and before `deepspeed.initialize`. Modules and parameters keep their names. The
    ``state_dict`` of such a layer has DeepSpeed's names from here on, which its checkpoints need: `plain_state` gives
    ours, and ``load_state_dict`` takes both. A layer whose experts are on every process stays as it is: to DeepSpeed it
    is dense. With ZeRO stage 1 or 2, and experts of which several processes have copies, run backward inside
    ``engine.coalesce_grad_reduction()``: DeepSpeed adds gradients up in the order in which they arrive, which differs
    between processes where an expert has no items.

    Raises:
        ImportError: If DeepSpeed is not installed.
        ValueError: If DeepSpeed could train a layer but not save it: it is the model itself, inside an expert or under
            a name with the word "expert", or its experts do not come out even.
    """
    for name, layer, dispatcher in spread_layers(model):
        _check(name, layer, dispatcher.group.size())
        _adapt(layer, dispatcher.group.size())
    return model


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of an adapted model under the names that it has without DeepSpeed."""
    state = dict(model.state_dict())
    for name, layer in model.named_modules():
        if isinstance(layer, Recognised):
            layer.to_ours(state, f"{name}.")
    return state


class Recognised(RoutedLayer):
    """What is added to a layer, beside DeepSpeed's class, for DeepSpeed's engine to work with it."""

    ep_size: int
    num_experts: int
    num_local_experts: int
    expert_group_name: str

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Have DeepSpeed make its groups, and refuse if they are not those between which tokens travel."""
        groups = require("deepspeed.utils.groups", "deepspeed")
        if self.expert_group_name not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(
                self.ep_size, use_data_before_expert_parallel_=use_data_before_expert_parallel_
            )
        theirs = list(groups._get_expert_parallel_group_ranks(self.expert_group_name))
        ours = dist.get_process_group_ranks(cast(ExpertParallel, self.dispatcher).group)
        if ours != theirs:
            raise ValueError(
                f"Tokens travel between processes {ours}, and DeepSpeed takes {theirs} for those that share the "
                "experts. Leave use_data_before_expert_parallelism out of DeepSpeed's JSON."
            )

    def state_dict(self, *args: Any, prefix: str = "", **options: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the state under DeepSpeed's names: each expert under its number on this process."""
        state: dict[str, Any] = super().state_dict(*args, prefix=prefix, **options)
        for key in [key for key in state if key.startswith(prefix)]:
            value, rest = state.pop(key), key.removeprefix(prefix)
            state |= {f"{prefix}{theirs}": part for theirs, part in self._their_entries(rest, value)}
        return state

    def to_ours(self, state: dict[str, Any], prefix: str) -> None:
        """Give the entries of a state dict that have DeepSpeed's names ours, in place."""
        stacks: dict[str, list[Tensor]] = {}
        for key in [key for key in state if key.startswith(prefix)]:
            rest = key.removeprefix(prefix)
            if not rest.startswith(THEIRS):
                state[prefix + rest.replace(HIDDEN, WORD)] = state.pop(key)
                continue
            place, inner = rest.removeprefix(THEIRS).split(".", 1)
            if self.experts.stacked:
                stacks.setdefault(f"{prefix}{OURS}{inner}", []).append(state.pop(key))
            else:
                state[f"{prefix}{OURS}{self._expert_names[int(place)]}.{inner}"] = state.pop(key)
        state |= {key: torch.stack(parts) for key, parts in stacks.items()}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.to_ours(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _their_entries(self, name: str, value: Any) -> list[tuple[str, Any]]:
        """Name one entry of this layer's state as DeepSpeed does; a stack of all experts becomes an entry for each."""
        if not name.startswith(OURS):
            return [(name.replace(WORD, HIDDEN), value)]
        inner = name.removeprefix(OURS)
        if self.experts.stacked:
            return [(f"{THEIRS}{place}.{inner}", value[place]) for place in range(self.num_local_experts)]
        own = next(expert for expert in self._expert_names if inner.startswith(f"{expert}."))
        return [(f"{THEIRS}{self._expert_names.index(own)}{inner.removeprefix(own)}", value)]

    @property
    def _expert_names(self) -> list[str]:
        """Names of this process's experts below `experts`, such as ``experts.5``, in order."""
        names = (name for name, _ in self.experts.named_modules() if name.count(".") == 1)
        return list(names)


def _check(name: str, layer: ExpertLayer, ep_size: int) -> None:
    num_experts = layer.router.num_experts
    if num_experts % ep_size:
        fits = f"{num_experts - num_experts % ep_size} or {num_experts + ep_size - num_experts % ep_size}"
        raise ValueError(
            f"DeepSpeed gives every process equally many experts; {num_experts} over {ep_size} do not come out even. "
            f"Use {fits} experts, or `engine=torch`, which takes any number."
        )
    if not name or WORD in name:
        raise ValueError(
            "DeepSpeed tells experts by the word 'expert' in their names, and saves the rest of a layer only if the "
            f"layer has a name without it; got {name or 'a layer that is the model itself'}. Put the layer into a "
            "module under another name, and not inside an expert."
        )


def _adapt(layer: ExpertLayer, ep_size: int) -> None:
    layer.__class__ = _recognised(type(layer))  # type: ignore[arg-type]
    adapted = cast(Recognised, layer)
    adapted.ep_size, adapted.expert_group_name = ep_size, f"ep_size_{ep_size}"
    adapted.num_experts = layer.router.num_experts
    adapted.num_local_experts = adapted.num_experts // ep_size
    for parameter in layer.experts.parameters():
        parameter.__dict__.update(allreduce=False, group_name=adapted.expert_group_name)


@functools.cache
def _recognised(kind: type[ExpertLayer]) -> type[ExpertLayer]:
    """Make the class that is a layer's own and DeepSpeed's at once; of the latter only `isinstance` is used."""
    theirs = require("deepspeed.moe.layer", "deepspeed").MoE
    return type(kind.__name__, (Recognised, kind, theirs), {})
