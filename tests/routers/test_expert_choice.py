"""Expert choice: the same number of tokens to each expert, thresholds that learn to do without the batch."""

from itertools import product

import pytest
import torch
from torch.testing import assert_close

from gatewright import ExpertChoice, reference
from gatewright.routers.expert_choice import even_share, largest_mask, threshold_loss
from tests.cases import make_router

DIM = 6
SIZES = [(17, 5, 2), (63, 8, 1), (1, 5, 2), (2, 5, 1), (9, 3, 3), (6, 1, 1), (0, 4, 2)]  # tokens, experts, top_k


def router_and_scores(num_tokens, num_experts=5, top_k=2, case="expert-choice"):
    router, features = make_router(case, DIM, num_experts, top_k).double(), torch.randn(num_tokens, DIM).double()
    return router, features, (features @ router.gate.weight.t()).softmax(-1)


def test_each_expert_takes_exactly_its_share_best_first():
    for num_tokens, num_experts, top_k in SIZES:
        router, features, scores = router_and_scores(num_tokens, num_experts, top_k)
        routing, count = router(features), even_share(num_tokens, num_experts, top_k)
        assert routing.sums.tokens_per_expert.tolist() == [count] * num_experts
        assert routing.expert_index.tolist() == [*range(num_experts)] * count
        best = scores.sort(dim=0, descending=True).values[:count]
        assert_close(routing.weight.view(count, num_experts), best)
        assert_close(scores[routing.token_index, routing.expert_index].view(count, num_experts), best)


def test_the_share_is_rounded_half_up_and_at_least_1():
    for sizes, share in [
        ((64, 8, 2), 16),
        ((9, 5, 2), 4),
        ((8, 5, 2), 3),
        ((3, 6, 1), 1),
        ((5, 10, 3), 2),
        ((1, 9, 1), 1),
        ((0, 3, 1), 0),
    ]:
        assert even_share(*sizes) == share


def test_of_equal_scores_the_first_are_taken():
    scores = torch.tensor([[0.5, 0.1], [0.9, 0.1], [0.5, 0.1], [0.5, 0.7], [0.2, 0.1]])
    expected = torch.tensor([[1, 1], [1, 1], [1, 0], [0, 1], [0, 0]]).bool()
    assert torch.equal(largest_mask(scores, torch.tensor(3), 4), expected)
    assert torch.equal(largest_mask(scores, torch.tensor(5), 5), torch.ones(5, 2).bool())
    router = ExpertChoice(DIM, 4, 2)
    torch.nn.init.zeros_(router.gate.weight)  # every token ties
    assert sorted(router(torch.randn(10, DIM)).token_index.tolist()) == sorted([*range(5)] * 4)


def test_the_threshold_loss_is_the_references_and_teaches_thresholds_alone():
    for case, (num_tokens, num_experts, top_k) in product(["expert-choice", "expert-choice-normalized"], SIZES[:-1]):
        router, features, scores = router_and_scores(num_tokens, num_experts, top_k, case)
        loss, expected = (
            router(features).sums.extra["threshold"],
            reference.threshold_loss(scores, router.threshold, top_k),
        )
        assert_close(loss, expected)
        assert loss >= 0
        assert_close(torch.autograd.grad(loss, router.threshold), torch.autograd.grad(expected, router.threshold))
        with pytest.raises(RuntimeError, match="not have been used in the graph"):
            torch.autograd.grad(router(features).sums.extra["threshold"], router.gate.weight)


def test_thresholds_start_at_an_even_score():
    router = ExpertChoice(DIM, 5, 2)
    assert_close(router.threshold, torch.full((5,), 0.2))
    torch.nn.init.zeros_(router.gate.weight)
    assert not router.eval()(torch.randn(9, DIM)).weight.any()  # every score is 0.2, above no threshold


@pytest.mark.usefixtures("unchecked")  # many forwards
def test_thresholds_learn_the_load_of_training():
    """From batches of 100 tokens and a gate that likes some experts, until fresh tokens load every expert alike."""
    router = ExpertChoice(DIM, 4, 2)
    with torch.no_grad():
        router.gate.weight.normal_()
        router.gate.weight[:, 0] = torch.linspace(-2, 2, 4)
    features = torch.cat([torch.ones(19_000, 1), torch.randn(19_000, DIM - 1)], dim=1)

    def load_error():
        loads = router.eval()(features[15_000:]).sums.tokens_per_expert / 4000
        return (loads - 2 / 4).abs().max()

    before = load_error()
    optimizer = torch.optim.SGD([router.threshold], lr=0.2)
    for step, batch in enumerate(features[:15_000].split(100)):
        optimizer.param_groups[0]["lr"] = 0.2 * (1 - step / 150)
        optimizer.zero_grad()
        threshold_loss(router.train()(batch).sums).backward()
        optimizer.step()
    assert before > 0.2
    assert load_error() < 0.03
