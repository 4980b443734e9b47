"""Top-k routing against the reference, and its warnings, jitter and first weights."""

import warnings
from itertools import product

import pytest
import torch
from torch.testing import assert_close

from gatewright import TopK, reference
from gatewright.losses import load_balance_loss, router_z_loss
from tests.cases import dense_weights

VARIANTS = [
    {"score": score, "score_after_top_k": after, "normalize": normalize}
    for score in ("softmax", "sigmoid", "sqrt_softplus")
    for after in (False, True)
    for normalize in (False, True)
]


def test_every_variant_is_the_references():
    for variant, (num_experts, top_k) in product(VARIANTS, [(6, 1), (6, 2), (6, 5), (3, 3), (1, 1)]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            router = TopK(4, num_experts, top_k, **variant).double()
        features = torch.randn(21, 4, dtype=torch.float64)
        logits = features @ router.gate.weight.t()
        assert_close(dense_weights(router(features)), reference.top_k(logits, top_k, **variant), rtol=0, atol=1e-12)


def test_the_balance_loss_reads_probabilities_over_all_experts():
    """Switch's P is the mean softmax over all experts even where weights are normalised over the chosen."""
    router, features = TopK(4, 5, 2, score_after_top_k=True), torch.randn(21, 4)
    routing = router(features)
    logits = router.gate(features)
    share = torch.bincount(routing.expert_index, minlength=5) / 42
    assert_close(load_balance_loss(routing.sums), 5 * (share * logits.softmax(-1).mean(0)).sum())
    assert_close(router_z_loss(routing.sums), logits.logsumexp(-1).square().mean())


def test_sigmoid_probabilities_sum_to_1_per_token():
    router, features = TopK(4, 5, 2, score="sigmoid"), torch.randn(21, 4)
    scores = router.gate(features).sigmoid()
    assert_close(router(features).sums.probs, (scores / scores.sum(-1, keepdim=True)).sum(0))


def test_jitter_multiplies_features_in_training_only():
    """One-dimensional features of 1 and a gate of 1 make the largest logit the noise itself."""
    for dtype in [torch.float32, torch.bfloat16]:
        router = TopK(1, 2, 1, score="sigmoid", jitter=0.1).to(dtype)
        torch.nn.init.ones_(router.gate.weight)
        features = torch.ones(4000, 1, dtype=dtype)
        noise = router(features).weight.logit()
        assert 0.9 - 1e-5 <= noise.min() < 0.902
        assert 1.098 < noise.max() <= 1.1 + 1e-5
        assert_close(noise.mean(), torch.tensor(1.0), rtol=0, atol=5 * 0.2 / 12**0.5 / 4000**0.5)  # 5 sigma
        assert len(noise.unique()) > 2000  # drawn in float32, also for half the bits
        assert_close(router.eval()(features).weight.logit(), torch.ones(4000))


def test_first_logits_are_small():
    """Switch's initialisation at a tenth, cut at two deviations; the cut takes 12 % off the deviation."""
    weight, std = TopK(200, 100, 1).gate.weight, (0.1 / 200) ** 0.5
    assert 1.9 * std < weight.abs().max() <= 2 * std
    assert_close(weight.std().item(), 0.88 * std, rtol=0.02, atol=0)


@pytest.mark.usefixtures("unchecked")
def test_wrong_settings_are_refused():
    for setting, message in [
        ({"score": "softmin"}, "score is 'softmax', 'sigmoid' or 'sqrt_softplus'; got 'softmin'"),
        ({"jitter": 1.0}, "jitter is at least 0 and below 1; got 1.0"),
        ({"jitter": -0.1}, "jitter is at least 0 and below 1; got -0.1"),
        ({"jitter": float("nan")}, "jitter is at least 0 and below 1; got nan"),
    ]:
        with pytest.raises(ValueError, match=message):
            TopK(4, 3, 1, **setting)
