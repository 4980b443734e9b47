"""A layer against the loops of the reference, and one way to run a training step against another."""

import copy

import torch

from gatewright import MergedMoE, ResidualMixture, SoftMoE, aux_loss, moe_layers, reference
from tests.cases import KEYED, keys_of
from tests.references import one_by_one, reference_gates, reference_kept, reference_soft

SEED = 1


def arguments(layer, x):
    """What a layer is called with: items, and keys that are a function of each where its router takes keys."""
    return (x, keys_of(x)) if type(router_of(layer)) in KEYED else (x,)


def router_of(layer):
    """The router of a layer, or of the mixture inside it."""
    return next(moe.router for _, moe in moe_layers(layer))


def by_the_layer(layer, x, features=None):
    return layer(*arguments(layer, x)) if features is None else layer(x, features)


def by_the_reference(layer, x, features=None):
    if isinstance(layer, ResidualMixture):
        mixed = by_the_reference(layer.moe, x, features)
        return reference.residual(x, mixed, layer.branch(x), layer.coefficient)
    features = arguments(layer, x)[-1].flatten(1) if features is None else features
    if isinstance(layer, SoftMoE):
        return reference_soft(layer, x, features)
    gates = reference_gates(layer.router, features)
    torch.manual_seed(SEED)
    routing = layer.router(features)
    if layer.training:
        layer.router.record(routing.sums.detach())
    if isinstance(layer, MergedMoE):
        return reference.merged(x, gates, list(layer.experts))
    kept = reference_kept(gates, routing, layer.dispatcher, layer.training)
    return reference.mixture(x, kept, one_by_one(layer.experts), layer.shared)


def results(compute, layer, inputs, upstream):
    """Output, gradients and buffers, by name; a gradient of None, of what the loops never touched, counts as 0."""
    layer = copy.deepcopy(layer)
    for _, moe in moe_layers(layer):
        moe.losses.clear()  # they have tests of their own
    inputs = [value.clone().requires_grad_(value.is_floating_point()) for value in inputs]
    torch.manual_seed(SEED)
    output = compute(layer, *inputs)
    output.backward(upstream)
    leaves = {f"input {index}": value for index, value in enumerate(inputs)} | dict(layer.named_parameters())
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    gradients = {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
    return {"output": output.detach(), **gradients, **dict(layer.named_buffers())}


def differences(actual, expected):
    """By name: the largest difference over the largest entry, or over 0.1 where all entries are less."""
    assert actual.keys() == expected.keys()
    relative = {}
    for name, value in actual.items():
        assert value.shape == expected[name].shape, name
        wanted = expected[name].double()
        relative[name] = float((value.double() - wanted).abs().max() / wanted.abs().max().clamp(min=0.1))
    return relative


def step(forward, layer, x, autocast=False):
    """One training step's output, loss and gradients, where ``forward`` is a way to run the layer."""
    torch.manual_seed(SEED)
    layer.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = forward(*arguments(layer, x))
        loss = output.float().square().sum() + aux_loss(layer)
    loss.backward()
    gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"output": output.detach(), "loss": loss.detach(), "x": x.grad, **gradients}


def compiled_step(layer, x, autocast=False, **options):
    """The differences between a step under torch.compile and one without it."""
    torch._dynamo.reset()
    other = copy.deepcopy(layer)
    expected = step(other, other, x, autocast)
    return differences(step(torch.compile(layer, **options), layer, x, autocast), expected)
