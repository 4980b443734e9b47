import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from gatewright import Biased, GroupedFeedForward, GroupLimited, ModuleExperts, MoE, NoisyTopK, TopK, aux_loss
from gatewright.surgery import expert_scores, grow, prune, select
from tests.cases import EXPERT_CASES, make_router, make_soft_moe
from tests.references import one_by_one

X = torch.randn(40, 8, generator=torch.Generator().manual_seed(3))
EVERY_KIND = pytest.mark.parametrize("kind", ["grouped-swiglu-bias", "modules-different"])
ROUTERS = {"top-k": TopK, "noisy-top-k": NoisyTopK, "biased": Biased}


def mixture(router="top-k-after", kind="grouped-relu-bias", num_experts=6):
    return MoE(make_router(router, 8, num_experts, 2), EXPERT_CASES[kind](num_experts, 8))


def trained(model, steps=2):
    """The model after some steps of AdamW, and the optimizer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer


def step(model, optimizer, training=True):
    optimizer.zero_grad()
    (model.train(training)(X).square().mean() + aux_loss(model)).backward()
    optimizer.step()


@EVERY_KIND
@pytest.mark.parametrize("router", ROUTERS)
def test_all_experts_in_another_order_are_the_same_model_and_it_trains_on_as_it_would_have(router, kind):
    """Optimizer state included: after one more step the outputs are still the same."""
    model, optimizer = trained(nn.Sequential(nn.Linear(8, 8), mixture(router, kind)))
    twin, twins_optimizer = copy.deepcopy((model, optimizer))
    assert select(model, [3, 0, 5, 1, 2, 4], optimizer=optimizer) is model
    assert_close(model.eval()(X), twin.eval()(X))
    for each, its_optimizer in ((model, optimizer), (twin, twins_optimizer)):
        step(each, its_optimizer, training=False)  # Experts in another order get other noise.
    assert_close(model.eval()(X), twin.eval()(X), rtol=1e-4, atol=1e-5)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}
    assert set(map(id, optimizer.state)) == {id(p) for p in model.parameters() if p.requires_grad}


@EVERY_KIND
def test_what_is_kept_of_one_layer_is_a_mixture_of_those_experts_alone(kind):
    model = nn.Sequential(mixture("biased", kind), mixture("hashed", kind)).eval()
    before, untouched = copy.deepcopy(model[0]), model[1]
    select(model, {"0": [4, 1, 2]})
    assert model[1] is untouched
    assert model[0].router.num_experts == model[0].experts.num_experts == 3
    assert len(model[0].router.gate.weight) == model[0].router.gate.out_features == 3
    scores = before.router.gate(X).sigmoid()[:, [4, 1, 2]]
    index = (scores + before.router.expert_bias.bias[[4, 1, 2]]).topk(2).indices
    weights = torch.zeros_like(scores).scatter(1, index, scores.gather(1, index))
    experts = [one_by_one(before.experts)[expert] for expert in (4, 1, 2)]
    expected = sum(
        w[:, None] * expert(X) for w, expert in zip((weights / weights.sum(1, True)).t(), experts, strict=True)
    )
    assert_close(model[0](X), expected)


@EVERY_KIND
@pytest.mark.parametrize("router", ["top-k", "top-k-after", "noisy-top-k", "biased"])
def test_twice_the_experts_and_twice_the_top_k_compute_the_same(router, kind):
    model = nn.Sequential(mixture(router, kind))
    model, optimizer = trained(model)
    expected = model.eval()(X)
    assert grow(model, 12, top_k=4, optimizer=optimizer) is model
    assert_close(model(X), expected)
    step(model, optimizer)
    assert (model[0].experts.num_experts, model[0].router.num_experts, model[0].router.top_k) == (12, 12, 4)


@EVERY_KIND
def test_noise_parts_the_copies_from_their_originals_which_stay(kind):
    model = nn.Sequential(mixture(kind=kind))
    before = copy.deepcopy(model[0])
    grow(model, 8, noise=0.1, generator=torch.Generator().manual_seed(0))
    old, new = one_by_one(before.experts), one_by_one(model[0].experts)
    for expert in range(6):
        assert_close(new[expert](X), old[expert](X))
    for copied, original in ((6, 0), (7, 1)):
        moved = (new[copied](X) - old[original](X)).norm() / old[original](X).norm()
        assert 0.01 < moved < 0.5
    rows = model[0].router.gate.weight
    assert torch.equal(rows[:6], before.router.gate.weight)
    assert 0.01 < (rows[6] - rows[0]).norm() / rows[0].norm() < 0.3


@EVERY_KIND
def test_an_expert_that_is_never_chosen_is_pruned_and_nothing_changes(kind):
    model = nn.Sequential(mixture("top-k-after", kind)).eval()
    x = X.index_fill(1, torch.tensor([0]), 1.0)
    with torch.no_grad():
        model[0].router.gate.weight[[1, 4], 0] = -100.0  # times a feature that is always 1
    expected, training = model(x), [module.training for module in model.modules()]
    for by in ("load", "contribution"):
        scores = expert_scores(model, [x[:30], (x[30:],)], by)
        assert (scores["0"] == 0).tolist() == [False, True, False, False, True, False]
    assert [module.training for module in model.modules()] == training
    assert not model[0].experts._forward_hooks
    assert prune(model, 4, scores) == {"0": [1, 4]}
    assert_close(model(x), expected)


@EVERY_KIND
def test_scores_are_those_of_a_loop(kind):
    model = nn.Sequential(mixture("top-k", kind)).eval()
    mean, share = (expert_scores(model, X.split(15), by)["0"] for by in ("contribution", "load"))
    probs = model[0].router.gate(X).softmax(1)
    chosen = probs >= probs.topk(2).values[:, 1:]
    for index, expert in enumerate(one_by_one(model[0].experts)):
        tokens = chosen[:, index]
        assert_close(share[index], tokens.double().sum() / 80)
        lengths = expert(X[tokens]).norm(dim=1) * probs[tokens, index]
        assert_close(mean[index].float(), lengths.mean() if tokens.any() else torch.tensor(0.0))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("act", "error"),
    [
        (lambda model: select(model, [0, 0, 1]), r"different indices from 0 to 5; got \[0, 0, 1\] for 0"),
        (lambda model: select(model, [0, 6]), r"got \[0, 6\]"),
        (lambda model: select(model, [3]), "got top_k=2 and 1 experts"),
        (lambda model: select(model, {"1": [0]}), "No mixture is called '1'"),
        (lambda model: grow(model, 5), "got num_experts=5 for 6 experts"),
        (lambda model: grow(model, 7, top_k=8), "got top_k=8 and 7 experts"),
        (lambda model: prune(model, 3, {"0": torch.ones(5)}), r"to keep of 6, and scores of shape \(5,\)"),
        (lambda model: expert_scores(model, [X], "size"), "by 'contribution' or 'load'; got 'size'"),
    ],
)
def test_what_cannot_be_done_is_refused_and_the_model_is_as_it_was(act, error):
    model = nn.Sequential(mixture())
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=error):
        act(model)
    assert_close(model.state_dict(), before.state_dict())
    assert repr(model) == repr(before)


def test_layers_whose_experts_cannot_be_taken_one_by_one_are_refused():
    grouped = MoE(GroupLimited(8, 4, 2), GroupedFeedForward(4, 8, 8))
    other_gate = MoE(TopK(8, 4, 2), ModuleExperts(lambda: nn.Linear(8, 8), 4))
    other_gate.router.gate = nn.Linear(8, 4)
    for layer, error in (
        (grouped, "MoE with GroupLimited"),
        (make_soft_moe(), "SoftMoE with Soft"),
        (other_gate, "a gate of another class"),
        (nn.Linear(8, 8), "Call upcycle first"),
    ):
        with pytest.raises(ValueError, match=error):
            select(nn.Sequential(layer), [0, 1])
