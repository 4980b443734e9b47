"""Sinkhorn routing: even in training, by the logits alone in evaluation."""

import pytest
import torch

from gatewright import Sinkhorn
from gatewright.ops import sinkhorn

DIM = 8


def skewed_router(num_experts=6, top_k=1, **options):
    """A gate whose first feature is a bias that likes some experts, and features to go with it."""
    router, features = Sinkhorn(DIM, num_experts, top_k, **options), torch.randn(600, DIM)
    features[:, 0] = 1
    with torch.no_grad():
        router.gate.weight.copy_(0.5 * torch.randn(num_experts, DIM))
        router.gate.weight[:, 0] = torch.linspace(-5, 5, num_experts)
    return router, features


def test_training_is_even_where_evaluation_is_not():
    for top_k in [1, 2]:
        router, features = skewed_router(top_k=top_k)
        even = 600 * top_k / 6
        trained, evaluated = router(features).sums.tokens_per_expert, router.eval()(features).sums.tokens_per_expert
        assert trained.max() < 1.4 * even
        assert trained.min() > 0.6 * even
        assert evaluated.max() > 0.8 * 600  # nearly every token likes the last expert
        assert evaluated.min() == 0


def test_the_tolerance_and_the_iterations_are_the_routers():
    """After one iteration the columns are still far from even; a wide tolerance ends there too."""
    router, features = skewed_router()
    chosen = router(features).expert_index
    for options in ({"max_iterations": 1}, {"tolerance": 100.0}):
        other = Sinkhorn(DIM, 6, **options)
        other.load_state_dict(router.state_dict())
        logits = features @ router.gate.weight.t()
        assert torch.equal(other(features).expert_index, (logits + sinkhorn(logits, 1e-3, 1)).argmax(-1))
        assert not torch.equal(other(features).expert_index, chosen)


@pytest.mark.usefixtures("unchecked")
def test_wrong_settings_are_refused():
    for setting, message in [
        ({"score": "softmin"}, "score is 'softmax', 'sigmoid' or 'sqrt_softplus'; got 'softmin'"),
        ({"tolerance": 0.0}, "tolerance is above 0 and max_iterations at least 1; got 0.0 and 100"),
        ({"tolerance": float("nan")}, "got nan and 100"),
        ({"max_iterations": 0}, "got 0.001 and 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            Sinkhorn(4, 3, **setting)
