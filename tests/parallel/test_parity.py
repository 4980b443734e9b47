"""Several processes compute what one does: outputs, gradients, their norm and the auxiliary losses."""

from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch

from gatewright.routers import ROUTERS
from tests.cases import EXPERT_CASES, NUM_EXPERTS, ROUTER_CASES, ROUTER_CLASSES, SOFT_CASES
from tests.parallel import parity

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}

pytestmark = pytest.mark.distributed


def assert_equal(results, dtype):
    for result in results:
        assert result.pop("compared") > 0
        assert max(result.values()) <= TOLERANCE[dtype], result


@pytest.mark.parametrize("router", [*ROUTER_CLASSES, *SOFT_CASES])
def test_every_router(ranks, router):
    """Two kinds of experts, each on another number of processes: with copies of every expert, and without."""
    for experts, world in (("modules-different", 4), ("grouped-relu-bias", 2)):
        sizes = () if router in SOFT_CASES else (NUM_EXPERTS, 13)
        compare = parity.soft if router in SOFT_CASES else parity.layer
        assert_equal(ranks(world, compare, router, experts, torch.float64, *sizes, 2), torch.float64)


@pytest.mark.parametrize(("world", "ep_size"), [(2, 1), (2, 2), (4, 2), (4, 4)])
def test_every_layout(ranks, world, ep_size):
    """A router that draws noise, one that looks at the whole batch and one that mixes it; float32 too."""
    for dtype, experts in product(TOLERANCE, ("modules-different", "grouped-relu-bias")):
        for router in ("noisy-top-k", "expert-choice"):
            assert_equal(ranks(world, parity.layer, router, experts, dtype, NUM_EXPERTS, 13, ep_size), dtype)
        assert_equal(ranks(world, parity.soft, "soft", experts, dtype, ep_size), dtype)


@pytest.mark.parametrize("router", [*ROUTERS, "expert-dropout", *SOFT_CASES])
def test_masked_items_change_nothing(ranks, router):
    """Of every rank's part of the batch, which is packed on the one process."""
    layer = parity.soft if router in SOFT_CASES else parity.layer
    assert_equal(ranks(2, partial(layer, ep_size=2, padding=True), router, "modules", torch.float64), torch.float64)


def test_second_derivatives(ranks):
    for router, experts in product(("noisy-top-k", "sinkhorn"), ("modules-different", "grouped-relu-bias")):
        assert_equal(ranks(2, parity.penalty, router, experts, 2), torch.float64)


@pytest.mark.parametrize("experts", EXPERT_CASES)
def test_every_kind_of_experts_on_uneven_parts_of_a_batch(ranks, experts):
    """Ranks with no tokens at all, and 7 experts over 4 ranks."""
    for num_tokens in (1, 40):
        results = ranks(4, parity.layer, "noisy-top-k", experts, torch.float64, 7, num_tokens, 4, "uneven")
        assert_equal(results, torch.float64)


def test_expert_counts_that_the_ranks_do_not_divide(ranks):
    for num_experts in (40, 3):
        results = ranks(3, parity.layer, "top-k", "modules-different", torch.float64, num_experts, 50, 3)
        assert_equal(results, torch.float64)


def test_all_tokens_to_one_expert_images_and_a_shared_expert(ranks):
    for world, ep_size in ((2, 2), (4, 2)):
        assert_equal(ranks(world, parity.all_to_one, torch.float64, ep_size), torch.float64)
        assert_equal(ranks(world, parity.with_shared, ep_size), torch.float64)
    assert_equal(ranks(4, parity.all_to_one, torch.float64, 4), torch.float64)
    assert_equal(ranks(3, parity.images, torch.float64, 3), torch.float64)


def test_capacity_is_per_rank(ranks):
    for dropped, finite in ranks(2, parity.capacity_drops_per_rank, 2):
        assert dropped >= 40
        assert finite


def test_every_router_goes_under_plain_ddp_that_looks_for_unused_parameters(ranks):
    routers = [*ROUTER_CASES, *SOFT_CASES]
    for found in ranks(2, parity.under_plain_ddp, routers):
        for router in routers:
            assert (router, found[router]) == (router, ["unused.weight", "unused.bias"])


def test_the_page_has_a_row_for_every_router():
    page = (Path(__file__).parents[2] / "docs" / "parallel.md").read_text()
    assert [name for name in ROUTERS if f"| {name} | modules-different |" not in page] == []


def test_bytes_are_counted_forward_and_backward(ranks):
    for counted, expected in ranks(2, parity.bytes_on_the_way, 2):
        assert counted == expected > 0


def test_layers_that_cannot_be_spread_are_refused(ranks):
    for few, nested, wrapped in ranks(2, parity.refusals):
        assert "Layer MoE has 1 experts for 2 processes to share" in few
        assert "An expert of layer 0 has a mixture inside it (experts.0)" in nested
        assert "The experts of layer MoE are inside a Sequential, which cannot be spread over processes" in wrapped


def test_the_gradient_norm_has_the_same_bits_wherever_parameters_lie(ranks):
    for norms in ranks(2, parity.norms_of_copies, 2):
        assert len(set(norms)) == 1
