"""Product keys are top-k routing by the sums of two logits, at the cost of the two."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from gatewright import ProductKey, TopK


class Largest(TorchDispatchMode):
    """Keeps how many numbers the largest tensor has that an operation returns."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **kwargs or {})
        for each in found if isinstance(found, tuple | list) else [found]:
            self.size = max(self.size, each.numel() if isinstance(each, torch.Tensor) else 0)
        return found


def twin(router):
    """The `TopK` whose gate has the sum of two rows of weights for every expert."""
    other = TopK(router.dim, router.num_experts, router.top_k, score_after_top_k=router.score_after_top_k).double()
    columns, rows = router.gate.weight.split([router.num_columns, router.num_rows * router.has_rows])
    other.gate.weight = None
    rows = rows if router.has_rows else torch.zeros_like(columns[:1])
    other.gate.weight = torch.nn.Parameter((rows[:, None] + columns).flatten(0, 1).detach())
    return other


@pytest.mark.parametrize("score_after_top_k", [True, False])
@pytest.mark.parametrize(
    ("num_experts", "top_k", "num_rows"), [(12, 3, None), (12, 5, 6), (12, 4, 1), (6, 6, 2), (7, 2, None), (4, 2, 4)]
)
@pytest.mark.parametrize("masked", [False, True])
def test_routes_sums_and_gradients_are_those_of_top_k(num_experts, top_k, num_rows, score_after_top_k, masked):
    router = ProductKey(5, num_experts, top_k, num_rows=num_rows, score_after_top_k=score_after_top_k).double()
    torch.nn.init.normal_(router.gate.weight)
    other, upstream = twin(router), torch.randn(17, num_experts, dtype=torch.float64)
    features = torch.randn(17, 5, dtype=torch.float64)
    mask = torch.rand(17) > 0.3 if masked else None
    found = []
    for each in (router, other):
        x = features.clone().requires_grad_()
        routing = each(x, mask=mask)
        weights, sums = x.new_zeros(17, num_experts + 1), routing.sums.by_name()
        weights = weights.index_put((routing.token_index, routing.expert_index), routing.weight)[:, :-1]
        loss = (weights * upstream).sum() + (sums["probs"] * upstream[0]).sum() + sums["router_z"] + sums["entropy"]
        loss.backward()
        found.append({"weights": weights, "x": x.grad, **sums, "top_k": torch.tensor(routing.top_k or 0)})
    assert_close(found[0], found[1])
    per_expert = other.gate.weight.grad.view(router.num_rows, router.num_columns, 5)
    by_part = torch.cat([per_expert.sum(0), per_expert.sum(1)] if router.has_rows else [per_expert.sum(0)])
    assert_close(router.gate.weight.grad, by_part)


def test_nothing_is_computed_for_every_token_and_expert():
    router = ProductKey(8, num_experts=1024, top_k=2)
    with Largest() as largest:
        routing = router(torch.randn(256, 8))
        (routing.weight.sum() + routing.sums.probs.square().sum()).backward()
    assert largest.size < 256 * 1024 / 4
    assert routing.logits is routing.probs is None


def test_rows_that_do_not_divide_the_experts_are_refused():
    with pytest.raises(ValueError, match="num_rows must divide num_experts; got 5 rows of 12 experts"):
        ProductKey(4, 12, num_rows=5)
    assert "num_rows=3" in repr(ProductKey(4, 12))
