"""The spans of text that each expert is asked for most."""

from collections import Counter
from itertools import groupby

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from gatewright.data import BEGIN, TextSet
from gatewright.layers.base import moe_layers
from gatewright.routing import Routing

NUM_SPANS = 6
NUM_CANDIDATES = 100
NUM_WINDOWS = 256
"""How many windows of a text are looked at; more would only refine the counts."""


@torch.inference_mode()
def expert_spans(model: nn.Module, text: TextSet) -> dict[str, list[list[str]]]:
    """Find, for every expert of every layer, the spans of text that are its own.

    A span is a run of bytes that all go to the expert, as long as it goes on within a window. Spans are ranked by how
    often they occur, times the square of their length, as single bytes say little, times the share of all occurrences
    of the span that go to the expert as a whole.

    Args:
        model: A language model, which is left in the mode in which it came; routers that look at every token of its
            input are told of.
        text: The text to look at; windows at even spacing are.

    Returns:
        By the name of a layer, for each expert its spans, the most typical first.
    """
    if not len(text):
        return {}
    length = min(text.context, len(text))
    places = torch.arange(len(text) // length) * length
    tokens, _ = text.windows(places[:: max(len(places) // NUM_WINDOWS, 1)], length)
    device, was_training, found = next(model.parameters()).device, model.training, {}
    model.eval()(tokens.to(device))
    model.train(was_training)
    for name, layer in moe_layers(model):
        if isinstance(layer.routing, Routing) and int(layer.routing.sums.num_tokens) == tokens.numel():
            chosen = chosen_experts(layer.routing, tokens.numel()).view(*tokens.shape, -1)
            found[name] = [typical_spans(tokens, chosen[..., expert]) for expert in range(chosen.shape[-1])]
        layer.routing = None
    return found


def chosen_experts(routing: Routing, num_tokens: int) -> Bool[Tensor, "tokens experts"]:
    """Say which experts each token goes to."""
    chosen = torch.zeros(num_tokens, routing.num_experts + 1, dtype=torch.bool)
    chosen[routing.token_index.cpu(), routing.expert_index.cpu()] = True
    return chosen[:, :-1]


def typical_spans(tokens: Int[Tensor, "windows context"], chosen: Bool[Tensor, "windows context"]) -> list[str]:
    """Rank the runs of bytes that are chosen, and return the first few as text."""
    runs = Counter(
        bytes(token for token, _ in run)
        for window, marks in zip(tokens.tolist(), chosen.tolist(), strict=True)
        for is_run, run in groupby(zip(window, marks, strict=True), lambda pair: pair[1] and pair[0] != BEGIN)
        if is_run
    )
    whole = b"".join(bytes(token for token in window if token != BEGIN) for window in tokens.tolist())
    weight = {run: count * len(run) ** 2 for run, count in runs.items()}
    candidates = sorted(weight, key=lambda run: (-weight[run], run))[:NUM_CANDIDATES]
    rank = {run: weight[run] * runs[run] / max(whole.count(run), 1) for run in candidates}
    ranked = sorted(candidates, key=lambda run: (-rank[run], run))[:NUM_SPANS]
    return [run.decode(errors="replace") for run in ranked]
