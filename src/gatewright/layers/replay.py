"""Routing replay: the experts that tokens were sent to in one forward, chosen again in another."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from gatewright.internals import backward_id, saves_by_hooks
from gatewright.layers.base import RoutedLayer, moe_layers
from gatewright.layers.merged import MergedMoE
from gatewright.layers.moe import MoE
from gatewright.names import known
from gatewright.scope import BatchScope


class Choices(ABC):
    """What becomes of a router's choices of experts; it is called once per forward, through `BatchScope.chosen`."""

    def __init__(self) -> None:
        self.is_over = False
        self._was_asked = False

    def __call__(self, expert_index: Tensor) -> Tensor:
        """Return the experts that tokens go to, given those that the router chose."""
        self._was_asked = True
        return self.choose(expert_index)

    __call__._torchdynamo_disable = True  # type: ignore[attr-defined]  # A compiled model leaves its graph for this.

    @abstractmethod
    def choose(self, expert_index: Int[Tensor, "tokens top_k"]) -> Int[Tensor, "tokens top_k"]:
        """Return the experts that tokens go to, given those that the router chose."""

    def finish(self) -> "Choices | None":
        """Take no part in forwards to come, and return what is needed of those that checkpointing runs again."""
        self.is_over = True
        return None

    def check_asked(self, layer: RoutedLayer, inputs: object, output: object) -> None:
        """Refuse a router that went on without asking; this is a hook on the layer's forward."""
        was_asked, self._was_asked = self._was_asked, False
        if not was_asked:
            raise ValueError(
                "A routing is recorded and replayed where a router passes its choice of experts, (tokens, top_k), "
                f"through scope.chosen before it takes their weights; {type(layer.router).__name__} does not. In a "
                "router of your own, add expert_index = scope.chosen(expert_index); of ours, ExpertChoice makes no "
                "such choice."
            )


class Recording(Choices):
    """Keeps every choice.

    Args:
        top_k: Experts per token.
    """

    def __init__(self, top_k: int) -> None:
        super().__init__()
        self._chosen = [torch.empty(0, top_k, dtype=torch.int64)]

    def choose(self, expert_index: Int[Tensor, "tokens top_k"]) -> Int[Tensor, "tokens top_k"]:
        """Keep the choice; one that activation checkpointing repeats is kept once."""
        if backward_id() == -1:
            self._chosen.append(expert_index.detach())
        return expert_index

    def all_tokens(self) -> Int[Tensor, "tokens top_k"]:
        """Return the choices of all forwards, one after the other."""
        return torch.cat([each.to(self._chosen[-1].device) for each in self._chosen])


class Replay(Choices):
    """Returns the recorded experts of the tokens that come next.

    Args:
        name: Name of the layer.
        recorded: Experts of all tokens, in the order in which they come.
        scope: The layer's scope, which tells a forward that activation checkpointing runs again what it replayed.
    """

    def __init__(self, name: str, recorded: Int[Tensor, "tokens top_k"], scope: BatchScope) -> None:
        super().__init__()
        self._name, self._recorded, self._scope = name, recorded, scope
        self._next, self._runs_again = 0, False

    def choose(self, expert_index: Int[Tensor, "tokens top_k"]) -> Int[Tensor, "tokens top_k"]:
        """Return the next tokens' experts; where a row is -1, and once the replay is over, the router's own."""
        self._runs_again |= saves_by_hooks()
        is_first_run = backward_id() == -1 and not self.is_over
        recorded = self._scope.of_this_forward(self._take(len(expert_index)) if is_first_run else None)
        if recorded is None:
            return expert_index
        recorded = recorded.to(expert_index)
        return torch.where(recorded < 0, expert_index, recorded)

    def _take(self, num_tokens: int) -> Int[Tensor, "tokens top_k"]:
        start, self._next = self._next, self._next + num_tokens
        if self._next > len(self._recorded):
            raise ValueError(
                f"A replay goes through the recorded tokens once, in their order; {self._name} has "
                f"{len(self._recorded)} of them, and this forward wants those up to {self._next}. Replay the batches "
                "that were recorded."
            )
        return self._recorded[start : self._next]

    def finish(self) -> Choices | None:
        """Leave further forwards to the router; those that were replayed under checkpointing find their experts."""
        super().finish()
        return self if self._runs_again else None

    def check_finished(self) -> None:
        """Refuse to leave tokens behind."""
        if self._next < len(self._recorded):
            raise ValueError(
                f"A replay goes through all recorded tokens; {self._name} has {len(self._recorded)} of them and "
                f"{self._next} were replayed. Pass those alone that come, such as recorded[name][:{self._next}]."
            )


@contextmanager
def record_routing(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Record which experts every token is sent to, in every layer of a model.

    ::

        with gatewright.record_routing(model) as recorded:
            model(tokens)
        with gatewright.replay_routing(model, recorded):
            loss = model.train()(tokens).square().mean() + gatewright.aux_loss(model)
            loss.backward()

    The record is filled when the block ends. It holds a tensor ``(tokens, top_k)`` of expert indices for each layer, by
    the layer's name, with the tokens of all forwards one after the other, masked ones among them. It is saved as any
    tensors are.

    Args:
        model: Any model. All of its layers have routers that choose experts for tokens.

    Raises:
        ValueError: If a layer or its router chooses no experts for tokens.
        RuntimeError: If the model's routing is being recorded or replayed already.
    """
    recorded: dict[str, Tensor] = {}
    layers = _choosing_layers(model)
    recordings = {name: Recording(layer.router.top_k) for name, layer in layers.items()}
    with _choices(layers, recordings):
        yield recorded
    recorded.update({name: recording.all_tokens() for name, recording in recordings.items()})


@contextmanager
def replay_routing(model: nn.Module, recorded: Mapping[str, Tensor]) -> Iterator[None]:
    """Send tokens to the experts that were recorded, with weights and gradients of this model: routing replay.

    In reinforcement learning an inference engine and the model under training choose different experts for some of the
    same tokens, which makes training unstable (https://arxiv.org/abs/2510.11370). Here a router takes the experts from
    the record, and their weights from its own logits over all experts, so that its gate learns as ever. Statistics and
    losses see what was replayed.

    Tokens come in the order of the record. Batches may be split in another way, where a layer is called once in each
    forward. A forward that activation checkpointing runs again replays the same experts, in a later backward too.

    Args:
        model: The model, as in `record_routing`.
        recorded: Expert indices ``(tokens, top_k)`` by the name of the layer, of any integer type. A row of -1 leaves
            the choice to the router, as for the last token of a sequence, which an inference engine never routes.

    Raises:
        ValueError: If a layer has no record or a name no layer; if shapes, types or indices do not fit; if a layer or
            its router chooses no experts for tokens; or if not every recorded token comes, or more than these.
        RuntimeError: If the model's routing is being recorded or replayed already.
    """
    layers = _choosing_layers(model)
    for name in recorded:
        known(name, layers, "layer with a router")
    for name, layer in layers.items():
        known(name, recorded, "recorded layer")
        _check_recorded(name, recorded[name], layer.router)
    replays = {name: Replay(name, recorded[name], layer.scope) for name, layer in layers.items()}
    with _choices(layers, replays):
        yield
    for replay in replays.values():
        replay.check_finished()


@contextmanager
def _choices(layers: Mapping[str, RoutedLayer], choices: Mapping[str, Choices]) -> Iterator[None]:
    """Have every layer's router pass its choices through, and see to it that it does."""
    for name, layer in layers.items():
        if isinstance(layer.scope.choices, Choices) and not layer.scope.choices.is_over:
            raise RuntimeError(
                f"A routing is recorded or replayed, not both at once; that of {name} is already. End that block first."
            )
    hooks = [layer.register_forward_hook(choices[name].check_asked) for name, layer in layers.items()]
    for name, layer in layers.items():
        layer.scope.choices = choices[name]
    try:
        yield
    finally:
        for name, layer in layers.items():
            layer.scope.choices = choices[name].finish()
        for hook in hooks:
            hook.remove()


def _choosing_layers(model: nn.Module) -> dict[str, RoutedLayer]:
    """Return the layers whose routers may choose experts for tokens.

    Raises:
        ValueError: If there is none, or another kind of layer.
    """
    layers = dict(moe_layers(model))
    others = [
        f"{name} ({type(layer).__name__})" for name, layer in layers.items() if not isinstance(layer, MoE | MergedMoE)
    ]
    if others or not layers:
        raise ValueError(
            "A routing is recorded and replayed of layers whose routers choose experts for tokens, gatewright.MoE and "
            f"gatewright.MergedMoE; this model has {', '.join(others) or 'no layer with a router'}. Pass the part of "
            "the model that has such layers alone."
        )
    return layers


def _check_recorded(name: str, recorded: Tensor, router: Any) -> None:
    """Refuse a record that a router cannot follow."""
    shape, top_k, last = tuple(recorded.shape), router.top_k, router.num_experts - 1
    if len(shape) != 2 or shape[1] != top_k or recorded.is_floating_point() or recorded.dtype == torch.bool:
        raise ValueError(
            f"A record holds expert indices, integers of shape (tokens, {top_k}); that of {name} is {recorded.dtype} "
            f"of shape {shape}. Record it from a model with as many experts per token."
        )
    rows = recorded.sort(1).values
    are_other = ((rows < 0) | (rows > last)).any(1) | (rows[:, 1:] == rows[:, :-1]).any(1)
    is_free = (rows == -1).all(1)
    if (wrong := (are_other & ~is_free).nonzero()).numel():
        first = int(wrong[0])
        raise ValueError(
            f"A record names {top_k} different experts from 0 to {last} for each token, or -1 throughout to leave the "
            f"choice to the router; that of {name} has {recorded[first].tolist()} for token {first}."
        )
    router.check_replayed(recorded[~is_free].long())
