"""Routing replay: what one forward chose, chosen again with the weights and gradients of another."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from gatewright import ExpertChoice, GroupedFeedForward, Hierarchical, MoE, TopK, record_routing, replay_routing
from gatewright.layers.base import seed_noise
from tests.cases import NUM_EXPERTS, ROUTER_CASES, make_moe, make_soft_moe, padded, run
from tests.compare import by_the_reference
from tests.references import one_by_one

X = torch.randn(12, 8, generator=torch.Generator().manual_seed(3))
REFUSED = {"expert-choice", "expert-choice-normalized"}
REPLAYED = sorted(ROUTER_CASES.keys() - REFUSED)


def step(moe, x=X, forward=run):
    """Output and gradients of a step whose noise is always the same."""
    moe.zero_grad()
    moe.losses.clear()
    seed_noise(moe, 0, 0)
    output = forward(moe, x)
    output.square().sum().backward()
    return {
        "output": output.detach(),
        **{name: p.grad.clone() for name, p in moe.named_parameters() if p.grad is not None},
    }


def recorded_step(moe):
    with record_routing(moe) as recorded:
        result = step(moe)
    return result, recorded


def others(recorded):
    """The experts three places on: those of the next group, as different from each other as those recorded."""
    return {name: (experts + 3) % NUM_EXPERTS for name, experts in recorded.items()}


@pytest.mark.parametrize("case", REPLAYED)
def test_its_own_routing_gives_the_same_outputs_and_gradients_to_the_bit(case):
    moe = make_moe(case)
    expected, recorded = recorded_step(moe)
    assert recorded[""].shape == (12, 2)
    with replay_routing(moe, recorded):
        found = step(moe)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name
    with replay_routing(moe.eval(), others(recorded)):  # nobody's choice
        run(moe, X)
    routing = moe.routing
    chosen = torch.stack([routing.token_index, routing.expert_index], 1).tolist()
    assert sorted(chosen) == sorted([t, e] for t, row in enumerate(others(recorded)[""].tolist()) for e in row)


@pytest.mark.parametrize("after", [True, False], ids=["score after top-k", "score before"])
def test_another_routing_gives_what_a_loop_with_its_experts_does_with_gradients(after):
    """Weights are those of this model's own logits over all experts, so the gate learns."""
    moe = MoE(TopK(8, NUM_EXPERTS, 2, score_after_top_k=after), GroupedFeedForward(NUM_EXPERTS, 8, 16), losses={})
    nn.init.normal_(moe.router.gate.weight)
    chosen = torch.stack([torch.randperm(NUM_EXPERTS)[:2] for _ in range(12)])
    twin = copy.deepcopy(moe)
    with replay_routing(moe, {"": chosen.to(torch.int16)}):
        found = step(moe)

    def loop(layer, x):
        logits, experts = x @ layer.router.gate.weight.t(), one_by_one(layer.experts)
        outputs = []
        for token, pair in enumerate(chosen.tolist()):
            weights = logits[token, pair].softmax(0) if after else logits[token].softmax(0)[pair]
            outputs.append(sum(w * experts[e](x[token]) for w, e in zip(weights, pair, strict=True)))
        return torch.stack(outputs)

    expected = step(twin, forward=loop)
    assert found["router.gate.weight"].abs().sum() > 0
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert_close(value, expected[name], msg=name)


def test_product_keys_weigh_experts_that_are_not_among_their_candidates():
    moe, recorded = make_moe("product-key"), {"": torch.tensor([[0, 8]]).expand(12, 2)}
    with replay_routing(moe.eval(), recorded):
        run(moe, X)
    logits = moe.router.gate(X)
    columns, rows = logits.split([moe.router.num_columns, moe.router.num_rows], 1)
    pair = torch.stack([rows[:, 0] + columns[:, 0], rows[:, -1] + columns[:, -1]], 1)
    assert_close(moe.routing.weight.view(2, 12).t(), pair.softmax(1))


def test_batches_may_be_split_masked_tokens_stay_out_and_a_row_of_minus_one_is_free(tmp_path):
    """Over a file, as from one program to another."""
    model = nn.Sequential(make_moe("noisy-top-k"), nn.Linear(8, 8), make_moe("biased")).eval()
    x, mask = padded(X)
    with record_routing(model) as recorded:
        expected = model(X)
    torch.save(recorded, tmp_path / "routing.pt")
    recorded = torch.load(tmp_path / "routing.pt")
    assert recorded.keys() == {"0", "2"}
    with torch.no_grad():
        for moe in (model[0], model[2]):
            moe.router.gate.weight.neg_()  # The experts would now be others, and so are the weights.
        whole = {}
        with replay_routing(model, recorded):
            whole["split"] = torch.cat([model(part) for part in X.split(5)])
        with replay_routing(model, recorded):
            assert_close(model(X), whole["split"])
        assert not torch.allclose(whole["split"], expected, atol=1e-3)
        first = {"": torch.full((len(x), 2), -1).index_put((mask,), recorded["0"])}  # The padding is not recorded.
        with replay_routing(model[0], first):
            masked = model[0](x, mask=mask)
        with replay_routing(model[0], {"": recorded["0"]}):
            assert_close(masked[mask], model[0](X))
        free = {name: experts.index_fill(0, torch.tensor([4]), -1) for name, experts in recorded.items()}
        with replay_routing(model, free):
            model(X)
        row = model[2].routing.expert_index[model[2].routing.token_index == 4]
    assert set(row.tolist()) != set(recorded["2"][4].tolist())


@pytest.mark.parametrize("case", ["noisy-top-k", "top-k"])
def test_a_checkpointed_forward_replays_the_same_when_it_runs_again(case):
    """Two micro-batches, whose backward comes when the replay is over and another one runs."""
    moe = make_moe(case)
    parts = X.split(7)
    _, recorded = recorded_step(moe)
    recorded = others(recorded)

    def two(forward):
        moe.zero_grad()
        seed_noise(moe, 0, 1)
        with replay_routing(moe, recorded):
            total = sum(forward(part).square().sum() for part in parts)
        with replay_routing(moe, {"": recorded[""][:0]}):
            total.backward()
        return {name: p.grad.clone() for name, p in moe.named_parameters() if p.grad is not None}

    expected = two(moe)
    found = two(lambda part: checkpoint(moe, part, use_reentrant=False))
    for name, value in found.items():
        assert_close(value, expected[name], msg=name)
    with record_routing(moe) as again:
        replayed_no_more = step(moe, forward=lambda layer, x: checkpoint(layer, x, use_reentrant=False))
    assert len(again[""]) == 12  # and not those that ran again
    two(lambda part: checkpoint(moe, part, use_reentrant=False))
    for expected in (step(moe), step(moe, forward=lambda layer, x: checkpoint(layer, x, use_reentrant=False))):
        for name, value in replayed_no_more.items():
            assert_close(value, expected[name], msg=name)


def compiled_replay():
    moe = make_moe("top-k").eval()
    with record_routing(moe) as recorded:
        moe(X)
    compiled, chosen = torch.compile(moe, backend="aot_eager"), others(recorded)
    with torch.no_grad():
        compiled(X)
        with replay_routing(moe, chosen):
            expected = moe(X)
        with replay_routing(moe, chosen):
            found = torch.cat([compiled(part) for part in X.split(6)])
    return found, expected


def test_a_compiled_model_replays_too(run_unhooked):
    assert_close(*run_unhooked(compiled_replay))


@pytest.mark.parametrize(
    ("recorded", "error"),
    [
        ({}, "No recorded layer is called '0'"),
        ({"0": torch.zeros(3, 2).long(), "00": torch.zeros(3, 2).long()}, "No layer with a router is called '00'; did"),
        (
            {"0": torch.tensor([[0, 1, 2]])},
            r"integers of shape \(tokens, 2\); that of 0 is torch.int64 of shape \(1, 3\)",
        ),
        ({"0": torch.zeros(3, 2)}, "that of 0 is torch.float32"),
        ({"0": torch.tensor([[0, 1], [3, 9]])}, r"2 different experts from 0 to 8 .* has \[3, 9\] for token 1"),
        ({"0": torch.tensor([[4, 4]])}, r"has \[4, 4\] for token 0"),
        ({"0": torch.tensor([[4, -1]])}, r"has \[4, -1\] for token 0"),
    ],
)
def test_a_record_that_does_not_fit_is_refused_at_the_start(recorded, error):
    model = nn.Sequential(make_moe())
    with pytest.raises(ValueError, match=error), replay_routing(model, recorded):
        raise AssertionError("the block began")


def test_too_many_tokens_too_few_and_two_at_once_are_refused_and_the_layer_is_as_it_was():
    moe, chosen = make_moe().eval(), torch.tensor([[0, 1]]).expand(9, 2)
    with pytest.raises(ValueError, match="this forward wants those up to 12"), replay_routing(moe, {"": chosen}):
        moe(X)
    with pytest.raises(ValueError, match="has 9 of them and 5 were replayed"), replay_routing(moe, {"": chosen}):
        moe(X[:5])
    with pytest.raises(RuntimeError, match="End that block first"), record_routing(moe), record_routing(moe):
        raise AssertionError("the block began")
    assert_close(moe(X), by_the_reference(moe, X))


def test_a_router_that_does_not_choose_for_each_token_is_refused():
    moe = MoE(ExpertChoice(8, NUM_EXPERTS, 4), GroupedFeedForward(NUM_EXPERTS, 8, 16))
    with pytest.raises(ValueError, match=r"through scope.chosen .* ExpertChoice does not"), record_routing(moe):
        moe(X)
    moe(X)


@pytest.mark.parametrize("experts", [[0, 3, 1, 4], [0, 1, 2, 3], [0, 1, 1, 2], [0, 1, 2, 0]])
def test_two_levels_replay_experts_group_by_group(experts):
    moe = MoE(Hierarchical(8, NUM_EXPERTS, 4, num_groups=3), GroupedFeedForward(NUM_EXPERTS, 8, 16))
    error, recorded = r"different experts|2 experts of one group, then as many", {"": torch.tensor([experts])}
    with pytest.raises(ValueError, match=error), replay_routing(moe, recorded):
        raise AssertionError("the block began")
    with replay_routing(moe.eval(), {"": torch.tensor([[8, 6, 1, 0], [-1, -1, -1, -1]])}):
        moe(X[:2])


def test_layers_that_mix_tokens_are_refused():
    model = nn.Sequential(make_moe(), make_soft_moe())
    with pytest.raises(ValueError, match=r"this model has 1 \(SoftMoE\)"), record_routing(model):
        raise AssertionError("the block began")
