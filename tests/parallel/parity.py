"""One process against several, on the same global batch: what the workers of these tests run."""

import copy
import functools

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gatewright import Capacity, ModuleExperts, MoE, aux_loss, seed_noise
from gatewright.parallel import (
    average_expert_gradients,
    expert_mesh,
    expert_parameters,
    expert_runs,
    parallelize,
    sum_in_place,
    total_gradient_norm,
)
from tests.cases import NUM_EXPERTS, ROUTER_CASES, make_moe, make_router, make_soft_moe, padded, run

DIM = 8


@functools.cache
def mesh_of(ep_size):
    return expert_mesh(ep_size)


def part_of(num_tokens, world, rank, split):
    """Which tokens a rank has of a global batch."""
    if split == "even":
        return expert_runs(num_tokens, world)[rank]
    ends = [0, *(num_tokens * place * place // world**2 for place in range(1, world)), num_tokens]  # 0 of 13 first
    return range(ends[rank], ends[rank + 1])


def gradients_of(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def single(model, x, upstream):
    seed_noise(model, 3, 1)
    output = run(model, x)
    auxiliary = aux_loss(model)
    ((output * upstream).sum() / len(x) + auxiliary).backward()
    gradients = gradients_of(model)
    norm = nn.utils.get_total_norm(gradients.values())
    return output.detach(), auxiliary.detach(), gradients, norm


def several(model, x, upstream, mesh, part, padding):
    """This rank's part of the batch, with its share of the experts; ``padding`` puts masked items among it."""
    parallelize(model, mesh)
    seed_noise(model, 3, 1)
    own = slice(part.start, part.stop)
    items, mask = padded(x[own]) if padding else (x[own], None)
    output = run(model, items, mask)
    output = output if mask is None else output[mask]
    auxiliary = aux_loss(model)
    ((output * upstream[own]).sum() / len(x) * mesh.size() + auxiliary).backward()
    average_expert_gradients(model, mesh)
    spread = dict(expert_parameters(model))
    dense = [p.grad for name, p in model.named_parameters() if name not in spread and p.grad is not None]
    sum_in_place(dense, dist.group.WORLD)
    for gradient in dense:
        gradient /= mesh.size()
    return output.detach(), auxiliary.detach(), gradients_of(model), total_gradient_norm(model, mesh)


def difference(actual, expected):
    """Largest difference, over the largest entry expected."""
    if actual.numel() == 0:
        return 0.0
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-3))


def differences(build, x, ep_size, split, padding=False):
    """Largest differences between one process and this group: of output, auxiliary loss, gradients and their norm."""
    mesh = mesh_of(ep_size)
    model = build()
    upstream = torch.randn(len(x), *model.output_shape, dtype=x.dtype)
    part = part_of(len(x), mesh.size(), dist.get_rank(), split)
    expected = single(copy.deepcopy(model), x, upstream)
    actual = several(model, x, upstream, mesh, part, padding)
    runs = expert_runs(model.router.num_experts, ep_size)[mesh.get_local_rank("expert")]
    gradient = 0.0
    for name, value in actual[2].items():
        wanted = expected[2][name]
        if value.shape != wanted.shape:  # stacked experts
            wanted = wanted[runs.start : runs.stop]
        gradient = max(gradient, difference(value, wanted))
    return {
        "output": difference(actual[0], expected[0][part.start : part.stop]),
        "auxiliary": difference(actual[1], expected[1]),
        "gradient": gradient,
        "norm": difference(actual[3], expected[3]),
        "compared": len(actual[2]),
    }


def layer(
    router, experts, dtype, num_experts=NUM_EXPERTS, num_tokens=13, ep_size=2, split="even", top_k=2, padding=False
):
    """Differences of one layer of a combination of the contract suite."""
    torch.manual_seed(0)
    x = torch.randn(num_tokens, DIM, dtype=dtype)
    build = functools.partial(make_moe, router, experts, dim=DIM, num_experts=num_experts, top_k=top_k)
    return differences(lambda: build().to(dtype), x, ep_size, split, padding)


def penalty(router, experts, ep_size):
    """Differences of a second derivative: of the squared gradient of the input, by the input and by the experts."""
    torch.manual_seed(0)
    whole, x = make_moe(router, experts, dim=DIM).double(), torch.randn(13, DIM, dtype=torch.float64)
    whole.losses.clear()
    mesh = mesh_of(ep_size)
    part = part_of(len(x), mesh.size(), dist.get_rank(), "even")

    def derivatives(layer, x):
        x = x.clone().requires_grad_()
        seed_noise(layer, 3, 1)
        (slope,) = torch.autograd.grad(run(layer, x).pow(3).sum(), x, create_graph=True)
        slope.square().sum().backward()
        return x.grad, gradients_of(layer.experts)

    spread = copy.deepcopy(whole)
    parallelize(spread, mesh)
    expected, of_experts = derivatives(whole, x)
    found, of_own = derivatives(spread, x[part.start : part.stop])
    runs = expert_runs(NUM_EXPERTS, ep_size)[mesh.get_local_rank("expert")]
    wanted = {name: of_experts[name] for name in of_own}
    wanted = {
        name: each if each.shape == of_own[name].shape else each[runs.start : runs.stop]
        for name, each in wanted.items()
    }
    return {
        "input": difference(found, expected[part.start : part.stop]),
        "experts": max(difference(of_own[name], each) for name, each in wanted.items()),
        "compared": len(wanted),
    }


def soft(router, experts, dtype, ep_size, padding=False):
    """Differences of a layer that mixes tokens: in groups of three that no process cuts, or in one over all of them."""
    torch.manual_seed(1)  # Not one of those with which the gradient of `scale`, a sum over all entries, cancels.
    x = torch.randn(12, DIM, dtype=dtype)
    build = functools.partial(make_soft_moe, router, experts, dim=DIM)
    return differences(lambda: build().to(dtype), x, ep_size, "even" if router == "soft-groups" else "uneven", padding)


def all_to_one(dtype, ep_size):
    """Every token goes to the last expert; the others, and most ranks, get nothing."""
    torch.manual_seed(0)
    x = torch.randn(13, DIM, dtype=dtype)
    x[:, 0] = 1

    def build():
        moe = make_moe("top-k", "modules", dim=DIM, num_experts=4, top_k=1).to(dtype)
        with torch.no_grad():
            moe.router.gate.weight[3, 0] = 50.0
        return moe

    return differences(build, x, ep_size, "even")


def images(dtype, ep_size):
    """Different convolutional experts on items of any shape, some of them on each rank."""
    torch.manual_seed(0)

    def expert(width):
        return nn.Sequential(nn.Conv2d(3, width, 3), nn.Tanh(), nn.Flatten(), nn.Linear(9 * width, 10))

    def build():
        torch.manual_seed(1)
        router = make_moe("noisy-top-k", dim=75, num_experts=3).router
        return MoE(router, ModuleExperts([expert(2), expert(3), expert(4)]), item_shape=(3, 5, 5)).to(dtype)

    return differences(build, torch.randn(11, 3, 5, 5, dtype=dtype), ep_size, "uneven")


def capacity_drops_per_rank(ep_size):
    """How many assignments each rank drops, and the largest load, with a capacity of its own."""
    torch.manual_seed(0)
    model = parallelize(make_moe("top-k", "modules", dim=DIM, num_experts=4), mesh_of(ep_size))
    model.dispatcher.local = Capacity(0.5, 1)
    output = model(torch.randn(40, DIM))
    return float(model.routing.sums.dropped), output.isfinite().all().item()


def with_shared(ep_size):
    """A layer whose shared expert runs while tokens travel."""
    torch.manual_seed(0)

    def build():
        torch.manual_seed(1)
        moe = make_moe("noisy-top-k", "modules", dim=DIM, num_experts=4)
        return MoE(moe.router, moe.experts, shared=nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh())).double()

    return differences(build, torch.randn(13, DIM, dtype=torch.float64), ep_size, "uneven")


def bytes_on_the_way(ep_size):
    """Bytes counted in a step, and what its routing says: four passes over every row that leaves its rank."""
    torch.manual_seed(0)
    moe = parallelize(make_moe("top-k", "modules", dim=DIM, num_experts=4).double(), mesh_of(ep_size))
    x = torch.randn(11, DIM, dtype=torch.float64, requires_grad=True)
    (moe(x).sum() + aux_loss(moe)).backward()
    run = expert_runs(4, ep_size)[dist.get_rank()]
    away = torch.tensor([int(((moe.routing.expert_index < run.start) | (moe.routing.expert_index >= run.stop)).sum())])
    total = away.clone()
    dist.all_reduce(total)
    counted = torch.tensor([moe.dispatcher.bytes_sent])
    dist.all_reduce(counted)
    return int(counted), 4 * int(total) * DIM * 8


def refusals():
    """What is said of layers that cannot be spread over two processes."""
    nested = MoE(make_router("top-k", DIM, 2, 1), ModuleExperts(lambda: make_moe("top-k", "modules", dim=DIM), 2))
    wrapped, found = make_moe("top-k", "modules", dim=DIM), []
    wrapped.experts = nn.Sequential(wrapped.experts)
    for model in (make_moe("top-k", "modules", dim=DIM, num_experts=1, top_k=1), nn.Sequential(nested), wrapped):
        try:
            parallelize(model, mesh_of(2))
        except ValueError as error:
            found.append(str(error))
    return found


class Beside(nn.Module):
    """A layer, and parameters that nothing uses."""

    def __init__(self, router):
        super().__init__()
        self.moe, self.unused = make_moe(router) if router in ROUTER_CASES else make_soft_moe(router), nn.Linear(2, 2)

    def forward(self, x):
        return run(self.moe, x)


def under_plain_ddp(routers):
    """Which parameters have no gradient after two steps with each router under torch's DDP, as a user wraps it."""
    found = {}
    for router in routers:
        model = Beside(router)
        spread = DistributedDataParallel(model, find_unused_parameters=True)
        for _ in range(2):
            (spread(torch.randn(12, DIM)).square().mean() + aux_loss(model)).backward()
        found[router] = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    return found


def norms_of_copies(ep_size):
    """The norm of the same gradients in eight models, whose parameters are at eight places in memory."""
    torch.manual_seed(0)
    gradients, found = {}, []
    for _ in range(8):
        model = parallelize(make_moe("top-k", "modules", dim=DIM), mesh_of(ep_size))
        for name, parameter in model.named_parameters():
            parameter.grad = gradients.setdefault(name, torch.randn_like(parameter)).clone()
        found.append(total_gradient_norm(model, mesh_of(ep_size)).item())
    return found
