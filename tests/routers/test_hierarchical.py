"""Two-level gating against the reference, its loads against frequencies, and its two degenerate shapes."""

import math
import warnings
from itertools import product

import pytest
import torch
from torch.testing import assert_close

from gatewright import BatchScope, Hierarchical, NoisyTopK, reference
from gatewright.losses import importance_loss
from gatewright.routers.hierarchical import expert_load, load_loss
from tests.cases import dense_weights
from tests.references import levels

SEED = 1
# num_experts, top_k, num_groups, top_k_groups
SHAPES = [
    (9, 4, 3, 2),
    (9, 2, 3, 1),
    (8, 2, 4, 2),
    (6, 6, 2, 2),
    (8, 6, 4, 3),
    (5, 2, 1, 1),
    (5, 2, 5, 2),
    (1, 1, 1, 1),
]

shapes = pytest.mark.parametrize("shape", SHAPES)


def make(shape, dim=6, std=0.4):
    """A router with random parameters of a deviation."""
    num_experts, top_k, num_groups, top_k_groups = shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of a level whose weight is always 1.
        router = Hierarchical(dim, num_experts, top_k, num_groups=num_groups, top_k_groups=top_k_groups)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return router


def route(router, features):
    torch.manual_seed(SEED)
    return router(features)


def parts(router, features):
    """What the router draws after `torch.manual_seed(SEED)`, as the reference takes it."""
    torch.manual_seed(SEED)
    return levels(router, features)


def test_training_is_the_references():
    for shape in SHAPES:
        router, features = make(shape).double(), torch.randn(21, 6, dtype=torch.float64)
        primary, secondary = parts(router, features)
        _, top_k, num_groups, top_k_groups = shape
        gates = reference.hierarchical(primary, secondary, top_k_groups, top_k)
        load = reference.hierarchical_load(primary, secondary, top_k_groups, top_k)
        routing = route(router, features)
        sums = routing.sums
        assert_close(dense_weights(routing), gates, rtol=0, atol=1e-12)
        assert_close(sums.importance, gates.sum(0), rtol=0, atol=1e-12)
        assert_close(
            sums.extra["group_load"], reference.load_probability(*primary, top_k_groups).sum(0), rtol=0, atol=1e-12
        )
        sent = (gates.view(21, num_groups, -1) > 0).any(-1)
        assert_close(sums.extra["group_tokens"], sent.long().sum(0))
        assert_close(expert_load(sums), load, rtol=0, atol=1e-12)
        assert_close(load_loss(sums), reference.cv_squared(load), rtol=0, atol=1e-12)


def test_gradients_of_the_losses_are_the_references():
    """And they reach the gates and the noise of every level that chooses."""
    for shape, loss in product(SHAPES, [importance_loss, load_loss]):
        router, features = make(shape).double(), torch.randn(21, 6, dtype=torch.float64)
        num_experts, top_k, num_groups, top_k_groups = shape
        of = reference.hierarchical if loss is importance_loss else reference.hierarchical_load
        values = of(*parts(router, features), top_k_groups, top_k)
        expected = reference.cv_squared(values.sum(0) if loss is importance_loss else values)
        names, parameters = zip(*router.named_parameters(), strict=True) if num_experts > 1 else ((), ())
        assert bool(parameters) == (num_experts > 1)
        if not expected.requires_grad:
            assert num_experts == 1 or (loss is load_loss and top_k == num_experts)
            continue
        actual = torch.autograd.grad(loss(route(router, features).sums), parameters, allow_unused=True)
        wanted = torch.autograd.grad(expected, parameters, allow_unused=True)
        for name, gradient, other in zip(names, actual, wanted, strict=True):
            choices, chosen = {"primary": (num_groups, top_k_groups)}.get(
                name.split(".")[0], (num_experts // num_groups, top_k // top_k_groups)
            )
            if loss is load_loss and choices == chosen:  # certain, whatever the noise
                assert gradient is None
                assert other is None
                continue
            assert_close(gradient, other, rtol=0, atol=1e-12)
            assert chosen == 1 or gradient.abs().max() > 1e-4
            assert loss is importance_loss or gradient.abs().max() > 1e-4


def test_evaluation_has_no_noise():
    for shape in SHAPES:
        router, features = make(shape).eval(), torch.randn(21, 6)
        routing = router(features)
        gates = reference.hierarchical(*levels(router, features), shape[3], shape[1])
        assert_close(dense_weights(routing), gates)
        counts = (gates > 0).float().sum(0)
        assert_close(routing.sums.load, counts)
        assert_close(expert_load(routing.sums), counts)
        assert_close(routing.sums.extra["group_load"], routing.sums.extra["group_tokens"].to(counts.dtype))


def test_groups_are_chosen_first_and_experts_within_them():
    """Two groups of 3, two experts in each, by hand; the group's weight is shared out among its experts."""
    router = Hierarchical(1, 6, 4, num_groups=2, top_k_groups=2).eval()
    with torch.no_grad():
        router.primary.gate.weight.copy_(torch.tensor([[1.0], [3.0]]).log())
        router.secondary.gate.weight.copy_(torch.tensor([[1.0], [2.0], [6.0], [3.0], [2.0], [1.0]]).log())
    routing = router(torch.ones(1, 1))
    assert_close(dense_weights(routing), torch.tensor([[0, 1 / 16, 3 / 16, 9 / 20, 6 / 20, 0]]))
    assert routing.expert_index.tolist() == [3, 4, 2, 1]  # best first
    assert_close(routing.sums.probs, torch.tensor([1 / 36, 2 / 36, 6 / 36, 9 / 24, 6 / 24, 3 / 24]))
    assert_close(routing.sums.router_z, torch.tensor(9.0 + 18.0).log() ** 2)


def test_one_group_is_the_flat_gate():
    for training in [True, False]:
        router, flat = make((5, 2, 1, 1)).train(training), NoisyTopK(6, 5).train(training)
        flat.load_state_dict({name.removeprefix("secondary."): value for name, value in router.state_dict().items()})
        features = torch.randn(21, 6)
        routing, expected = route(router, features), route(flat, features)
        assert torch.equal(routing.expert_index, expected.expert_index)
        assert_close(routing.weight, expected.weight)
        for name, value in expected.sums.by_name().items():
            assert_close(routing.sums.by_name()[name], value)
        assert_close(expert_load(routing.sums), expected.sums.load)


def test_groups_of_one_expert_are_the_flat_gate():
    router, flat = make((5, 2, 5, 2)).eval(), NoisyTopK(6, 5).eval()
    flat.load_state_dict({name.removeprefix("primary."): value for name, value in router.state_dict().items()})
    features = torch.randn(21, 6)
    routing, expected = router(features), flat(features)
    assert torch.equal(routing.expert_index, expected.expert_index)
    assert_close(routing.weight, expected.weight)
    assert_close(routing.sums.router_z, expected.sums.router_z)


def test_a_group_that_no_token_chose_has_load_0():
    router = make((6, 2, 3, 2), dim=1)
    with torch.no_grad():
        router.primary.gate.weight[1] = -50.0
    sums = route(router, torch.ones(9, 1)).sums
    assert sums.extra["group_tokens"].tolist() == [9, 0, 9]
    assert expert_load(sums)[2:4].tolist() == [0, 0]
    (importance_loss(sums) + load_loss(sums)).backward()
    assert all(parameter.grad.isfinite().all() for parameter in router.parameters())


def within_5_standard_errors(frequency, probability, draws):
    """Or 5 counts, near 0 and 1."""
    probability = probability.double()
    standard_error = (probability * (1 - probability) / draws).sqrt()
    return ((frequency.double() - probability).abs() <= 5 * standard_error + 5 / draws).all()


def test_experts_are_chosen_as_often_as_the_distribution_says():
    """Two groups of two, one of each chosen: a difference of two normal numbers decides at either level."""
    draws, router = 40_000, make((4, 1, 2, 1), dim=3, std=1.0)
    token = torch.randn(1, 3)
    exact = []
    for logits, noise_std, _ in levels(router, token):
        mean, std = logits.view(-1, 2), noise_std.view(-1, 2)
        first = torch.special.ndtr((mean[:, 0] - mean[:, 1]) / std.square().sum(1).sqrt())
        exact.append(torch.stack([first, 1 - first], dim=1))
    probability = (exact[0].view(2, 1) * exact[1]).flatten()
    counts = route(router, token.expand(draws, 3)).sums.tokens_per_expert
    assert within_5_standard_errors(counts / draws, probability, draws)
    assert probability.min() > 0.01  # neither level is certain


def test_loads_are_how_often_a_choice_is_kept_under_fresh_noise_of_its_own():
    """Eq. 8 at each level, for one token: the other choices' noise stays. Groups not chosen have no load."""
    draws = 20_000
    for shape in [(9, 4, 3, 2), (12, 6, 4, 3), (8, 2, 4, 2)]:
        num_experts, top_k, num_groups, top_k_groups = shape
        size, router, token = num_experts // num_groups, make(shape, std=0.7), torch.randn(1, 6)
        routing = route(router, token)
        upper, lower = ((mean[0], std[0], mean[0] + std[0] * noise[0]) for mean, std, noise in parts(router, token))

        def check(mean, std, noisy, top_k, probability):
            for choice in range(len(mean)):
                fresh = noisy.repeat(draws, 1)
                fresh[:, choice] = mean[choice] + std[choice] * torch.randn(draws)
                kept = (fresh.topk(top_k).indices == choice).double().sum() / draws
                assert within_5_standard_errors(kept, probability[choice].detach(), draws)

        with torch.no_grad():
            check(*upper, top_k_groups, routing.sums.extra["group_load"])
            for group, load in enumerate(routing.sums.load.view(num_groups, size)):
                if routing.sums.extra["group_tokens"][group]:
                    check(*(part[group * size : (group + 1) * size] for part in lower), top_k // top_k_groups, load)
                else:
                    assert not load.any()
        assert routing.sums.extra["group_tokens"].sum() == top_k_groups


def test_the_first_batches_are_routed_evenly():
    """All matrices start at zero: every expert has the same chance, within 5 standard errors."""
    router, num_tokens = Hierarchical(6, 12, num_groups=4), 4000
    assert not any(parameter.any() for parameter in router.parameters())
    sums, chance = route(router, torch.randn(num_tokens, 6)).sums, 4 / 12
    bound = 5 * math.sqrt(chance * (1 - chance) / num_tokens)
    for values in (sums.tokens_per_expert, expert_load(sums), sums.importance * 4):
        assert (values / num_tokens - chance).abs().max() < bound


def test_noise_differs_between_levels_groups_and_tokens():
    router = Hierarchical(1, 4, num_groups=2)
    captured = []
    router.primary.register_forward_hook(lambda module, args, output: captured.append(output.noisy.flatten()))
    router.secondary.register_forward_hook(lambda module, args, output: captured.append(output.noisy.flatten()))
    router(torch.ones(50, 1), BatchScope(torch.tensor(3)))
    values = torch.cat(captured)
    assert len(values) == 50 * (2 + 4)
    assert len(values.unique()) == len(values)


@pytest.mark.parametrize(
    ("shape", "gate", "message"),
    [
        (
            (9, 2, 3, 1),
            "primary",
            "one group per token .* the primary gate gets no gradient from the task.*top_k_groups=2",
        ),
        ((9, 2, 3, 2), "secondary", "one expert per chosen group .* the secondary gate gets .*Use top_k=4"),
    ],
)
def test_a_level_whose_weight_is_always_1_is_warned_of_and_learns_nothing(shape, gate, message):
    num_experts, top_k, num_groups, top_k_groups = shape
    with pytest.warns(UserWarning, match=message) as caught:
        Hierarchical(6, num_experts, top_k, num_groups=num_groups, top_k_groups=top_k_groups)
    assert len(caught) == 1
    router = make(shape)
    weight = route(router, torch.randn(21, 6)).weight
    (weight * torch.randn_like(weight)).sum().backward()
    for name, parameter in router.named_parameters():
        assert (parameter.grad.abs().max() > 1e-4) is not name.startswith(gate)


def test_two_groups_and_two_experts_in_each_are_the_default(recwarn):
    router = Hierarchical(6, 8, num_groups=4)
    assert (router.top_k, router.top_k_groups, router.top_k_in_group) == (4, 2, 2)
    assert Hierarchical(6, 8).top_k_groups == 1
    assert "num_groups=4, top_k_groups=2" in repr(router)
    assert not recwarn


def test_sizes_that_do_not_fit_are_refused():
    for num_groups, top_k_groups, message in [
        (0, 1, "num_groups must divide num_experts into groups of equal size; got 0 groups of 8"),
        (3, 1, "num_groups must divide num_experts into groups of equal size; got 3 groups of 8"),
        (4, 0, r"top_k_groups is from 1 to num_groups \(4\); got 0"),
        (4, 5, r"top_k_groups is from 1 to num_groups \(4\); got 5"),
        (4, 3, "top_k is a multiple of top_k_groups up to 6; got 4"),
        (4, 1, "of 2 that there are, from each of 1 groups: top_k is a multiple of top_k_groups up to 2; got 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            Hierarchical(6, 8, 4, num_groups=num_groups, top_k_groups=top_k_groups)
