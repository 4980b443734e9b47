"""Two-level gating against the reference, what is warned of, and what is refused."""

import warnings
from itertools import product

import pytest
import torch
from torch.testing import assert_close

from gatewright import Hierarchical, reference
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


def test_a_group_that_no_token_chose_has_load_0():
    router = make((6, 2, 3, 2), dim=1)
    with torch.no_grad():
        router.primary.gate.weight[1] = -50.0
    sums = route(router, torch.ones(9, 1)).sums
    assert sums.extra["group_tokens"].tolist() == [9, 0, 9]
    assert expert_load(sums)[2:4].tolist() == [0, 0]
    (importance_loss(sums) + load_loss(sums)).backward()
    assert all(parameter.grad.isfinite().all() for parameter in router.parameters())


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
