"""What a real training step keeps, sends and reduces on each process: what the workers of the tests of plans run."""

from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from gatewright import GroupedFeedForward, MoE, NoisyTopK, TopK, moe_layers, seed_noise
from gatewright.parallel import expert_runs
from gatewright.planner import Part, feed_forward_sizes
from gatewright.planner.measure import measure
from gatewright.train import OptimConfig
from gatewright.train.optim import build_optimizers
from gatewright.train.strategies.ddp import DDPStrategy
from tests.train.spread import mesh_of

DIM, FFN, TOP_K, IN, OUT = 32, 48, 2, 12, 5
OPTIMIZERS = {"adamw": 2, "sgd": 1}


def network(num_experts, activation="gelu", router=NoisyTopK):
    """A linear layer, a mixture, and another linear layer. Shazeer's untrained router chooses at random."""
    torch.manual_seed(0)
    experts = GroupedFeedForward(num_experts, DIM, FFN, activation=activation)
    return nn.Sequential(
        nn.Linear(IN, DIM), nn.Tanh(), MoE(router(DIM, num_experts, TOP_K), experts), nn.Linear(DIM, OUT)
    )


def sizes_of(num_experts, tokens, activation="gelu", optimizer="adamw", router=NoisyTopK, row_bytes=4):
    """What a plan is told of that network: beside the mixture, two linear layers and the noise that a TopK lacks."""
    parameters = (IN + 1) * DIM + (DIM + 1) * OUT + (DIM * num_experts if router is NoisyTopK else 0)
    return feed_forward_sizes(
        tokens=tokens,
        dim=DIM,
        ffn=FFN,
        num_experts=num_experts,
        top_k=TOP_K,
        matrices=3 if activation == "swiglu" else 2,
        row_bytes=row_bytes,
        state_per_parameter=OPTIMIZERS[optimizer],
        dense=Part(parameters=parameters, flops=2 * parameters, saved=row_bytes * (IN + DIM)),  # the layers' inputs
    )


def routed_bytes(sizes, sent_rows, received_rows):
    """The bytes that a process sends through one layer in a step: rows to others' experts, and those of others here."""
    there = sizes.sent_bytes * (sent_rows + (received_rows if sizes.item_gradient else 0))
    return there + sizes.returned_bytes * (received_rows + sent_rows)


def tokens_of(tokens, world, rank):
    part = expert_runs(tokens, world)[rank]
    return torch.randn(tokens, IN, generator=torch.Generator().manual_seed(1))[part.start : part.stop].clone()


def step(ep_size, num_experts, tokens, activation, optimizer):
    """One training step of this rank; what it sent, reduced and keeps."""
    world, rank = dist.get_world_size(), dist.get_rank()
    model, items = network(num_experts, activation), tokens_of(tokens, world, rank)
    strategy = DDPStrategy(mesh_of(ep_size))
    wrapped = strategy.setup(model)
    reduced = []
    wrapped.register_comm_hook(reduced, _noting_hook)
    (optim,) = build_optimizers(model, OptimConfig(name=optimizer))
    ((_, layer),) = moe_layers(model)
    seed_noise(model, 7, 0)
    logits, auxiliary = wrapped(items)
    routing = layer.routing
    (logits.square().sum() + auxiliary).backward()
    with patch.object(dist, "all_reduce", wraps=dist.all_reduce) as called:
        strategy.reduce_gradients(model)
    optim.step()
    # The parameter by which DDP keeps the order of its sums, see `DDPStrategy.setup`.
    keeping_order = sum(parameter.nbytes for name, parameter in wrapped.named_parameters() if name == "module.unused")
    per_expert = routing.expert_index.bincount(minlength=num_experts)
    kept = [value for state in optim.state.values() for value in state.values()]
    return {
        "rows": [int(per_expert[run.start : run.stop].sum()) for run in expert_runs(num_experts, ep_size)],
        "sent": getattr(layer.dispatcher, "bytes_sent", 0),
        "dense_reduced": sum(reduced) - keeping_order,
        "expert_reduced": sum(call.args[0].nbytes for call in called.call_args_list),
        "weights": sum(p.nbytes for p in model.parameters()),
        "gradients": sum(p.grad.nbytes for p in model.parameters()),
        "optimizer": sum(value.nbytes for value in kept if value.dim() > 0),
        "counters": sum(value.nbytes for value in kept if value.dim() == 0),
    }


def kept(ep_size, num_experts, tokens, activation):
    """Bytes that this rank keeps for backward, and the rows that its experts got."""
    world, rank = dist.get_world_size(), dist.get_rank()
    model = network(num_experts, activation, TopK)
    DDPStrategy(mesh_of(ep_size)).setup(model, wrap=False)
    found = measure(model, tokens_of(tokens, world, rank), [model[2].experts])
    return found.inside.saved + found.outside.saved, len(found.trips[0][0])


def _noting_hook(noted, bucket):
    noted.append(bucket.buffer().nbytes)
    return allreduce_hook(None, bucket)
