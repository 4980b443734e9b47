"""The engine on several processes: the same numbers, the same state, the same evaluation as on one."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing import assert_close

from gatewright import ModuleExperts, MoE
from gatewright.data import ImageSet
from gatewright.tasks import Classification
from gatewright.train import evaluate
from gatewright.train.config import ParallelConfig
from gatewright.train.step import TorchEngine
from gatewright.train.strategies.ddp import DDPStrategy
from gatewright.train.strategies.fsdp import FSDPStrategy
from gatewright.train.strategies.single import ALONE
from tests.cases import make_router
from tests.train.spread import STEPS, engine_of, largest_difference, mesh_of, several, train, train_phases

pytestmark = pytest.mark.distributed


def run_of(strategy, upcycle_at=0, **options):
    if upcycle_at:
        reports, engine = train_phases(strategy, upcycle_at, **options)
    else:
        engine = engine_of(strategy, **options)
        reports = train(engine)
    return torch.tensor([[each.task_loss, each.aux_loss, each.gradient_norm] for each in reports]).tolist(), engine


def trajectory(ep_size, options, shard="none"):
    """What each step reported here; the first process adds what it reports alone, and the difference of the weights."""
    reports, spread = run_of(several(ep_size, shard), **options)
    state = spread.state_dict()["model"]
    if dist.get_rank() > 0:
        return (reports,)
    expected, alone = run_of(ALONE, **options)
    return reports, expected, largest_difference(state, alone.state_dict()["model"])


def in_float32(ep_size, shard, norm, optimizer):
    """Largest difference of the weights after 20 steps, and the largest that only the order of the rows makes."""
    options = {"router": "top-k", "norm": norm, "optimizer": optimizer, "dtype": torch.float32}
    strategies = [several(ep_size, shard), ALONE, ALONE, ALONE]
    orders = [slice(None), slice(None), torch.arange(12, -1, -1), torch.randperm(13, generator=torch.manual_seed(1))]
    states = []
    for which, order in zip(strategies, orders, strict=True):
        engine = engine_of(which, **options)
        train(engine, accumulate=False, order=order)
        states.append(engine.state_dict()["model"])
        if dist.get_rank() > 0:
            return None
    spread, first, *permuted = states
    return largest_difference(spread, first), max(largest_difference(other, first) for other in permuted)


@pytest.mark.parametrize(
    ("world", "ep_size", "shard", "norm", "optimizer"),
    [(4, 2, "none", nn.BatchNorm1d, "adamw"), (2, 2, "fsdp", nn.LayerNorm, "sgd")],
)
def test_in_float32_it_is_as_close_as_the_order_of_the_rows_allows(ranks, world, ep_size, shard, norm, optimizer):
    spread, permuted = ranks(world, in_float32, ep_size, shard, norm, optimizer)[0]
    assert spread <= 4 * permuted


@pytest.mark.parametrize(
    ("world", "ep_size", "options", "shard"),
    [
        (4, 2, {"router": "biased", "experts": "grouped-relu-bias", "optimizer": "muon"}, "none"),
        (4, 4, {"router": "expert-choice", "experts": "modules", "optimizer": "sgd"}, "none"),
        (4, 2, {"router": "noisy-top-k", "experts": "normalized", "upcycle_at": 10, "ema_decay": 0.9}, "none"),
        (4, 2, {"router": "noisy-top-k", "experts": "modules-different"}, "fsdp"),
        (2, 2, {"router": "soft", "experts": "grouped-relu-bias", "optimizer": "sgd"}, "fsdp"),
        (2, 1, {"router": "top-k", "experts": "normalized", "upcycle_at": 10}, "fsdp"),
    ],
    ids=["muon", "spread", "upcycled", "sharded", "sharded-soft", "sharded-upcycled"],
)
def test_twenty_steps_are_those_of_one_process(ranks, world, ep_size, options, shard):
    """With accumulation in every other step, uneven parts, clipping, and BatchNorm over the global batch."""
    (first, expected, difference), *others = ranks(world, trajectory, ep_size, options, shard)
    for reports in (first, *(each for (each,) in others)):
        assert_close(torch.tensor(reports), torch.tensor(expected), rtol=0, atol=1e-8)
    assert difference < 1e-8


def statistics(ep_size, shard, batch_norm):
    """Every process's BatchNorm statistics after a few steps and a word between them; and whether any has a graph."""
    strategy = (FSDPStrategy if shard == "fsdp" else DDPStrategy)(
        mesh_of(ep_size), parallel=ParallelConfig(batch_norm=batch_norm)
    )
    torch.manual_seed(0)
    experts = ModuleExperts(lambda: nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 8)), 4)
    layers = nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), MoE(make_router("top-k", 8, 4, 2), experts)
    model = _Double(nn.Sequential(*layers)).double()
    config = engine_of(ALONE).config
    engine = TorchEngine(model, config, device=torch.device("cpu"), steps_per_epoch=STEPS, strategy=strategy)
    train(engine, stop=3, accumulate=False)
    buffers = {name: buffer for name, buffer in engine.model.named_buffers() if "running" in name}
    before = {name: buffer.tolist() for name, buffer in buffers.items()}
    strategy.average_buffers(engine.model)
    after = {name: buffer.tolist() for name, buffer in buffers.items()}
    return before, after, any(buffer.requires_grad for buffer in buffers.values())


@pytest.mark.parametrize(
    ("world", "ep_size", "batch_norm", "shard"),
    [(2, 1, "sync", "none"), (4, 2, "local", "none"), (4, 2, "local", "fsdp")],
)
def test_copies_of_batch_norm_are_made_equal_and_keep_no_graph(ranks, world, ep_size, batch_norm, shard):
    found = ranks(world, statistics, ep_size, shard, batch_norm)
    assert not any(graph for _, _, graph in found)
    for rank, (before, after, _) in enumerate(found):
        copies = [place for place in range(world) if place % ep_size == rank % ep_size]
        inside = [name for name in after if ".experts." in name]
        apart = any(found[place][0][name] != before[name] for name in inside for place in copies)
        assert apart == (batch_norm == "local")
        for name in after:
            for place in copies if name in inside else range(world):
                assert found[place][1][name] == pytest.approx(after[name], abs=1e-12)


def uneven_evaluation(ep_size):
    """10 images in batches of 4 over all ranks: the last batch leaves some of them without any."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(256, (10, 1, 4, 4), dtype=torch.uint8, generator=generator)
    labels = torch.randint(3, (10,), generator=generator)
    splits = ImageSet(images, labels, ("a", "b", "c"))
    found = [
        evaluate(Classification(), engine_of(strategy).evaluated, splits, batch_size=4, strategy=strategy)
        for strategy in (ALONE, several(ep_size))
    ]
    uses = [evaluation.layers["mixture"] for evaluation in found]
    return (
        [evaluation.confusion.tolist() for evaluation in found],
        [use.class_by_expert.tolist() for use in uses],
        [use.sums.tokens_per_expert.tolist() for use in uses],
    )


def test_every_test_image_is_counted_once(ranks):
    for result in ranks(4, uneven_evaluation, 2):
        for alone, together in result:
            assert alone == together


class _Double(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network(images.double())


def test_a_local_balance_and_local_batch_norm_are_options(ranks):
    for local, whole in ranks(2, local_options):
        assert local != whole


def local_options():
    """The first step's auxiliary loss and gradient norm with each process's own statistics, and the global batch's."""
    reports = []
    for parallel in (ParallelConfig(balance="local", batch_norm="local"), ParallelConfig()):
        strategy = DDPStrategy(several(2).mesh, parallel=parallel)
        engine = engine_of(strategy)
        report = train(engine, 0, 1)[0]
        reports.append((report.aux_loss, report.gradient_norm))
    return reports
