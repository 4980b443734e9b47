import pytest
import torch
from torch import nn

from gatewright import ExpertDropout, GroupedFeedForward, MergedMoE, MoE, NoisyTopK, ResidualMixture, SoftMoE, aux_loss
from gatewright.models import CHOOSABLE_ROUTERS, MixtureConfig


def build(config):
    return config.build_mixture(lambda: nn.Linear(4, 4), router_dim=4, item_shape=(4,))


@pytest.mark.parametrize("name", CHOOSABLE_ROUTERS)
def test_every_router_is_made_by_its_name(name):
    router = MixtureConfig(num_experts=5, top_k=3, router=name).build_router(6)
    assert type(router) is CHOOSABLE_ROUTERS[name]
    assert (router.dim, router.num_experts, router.top_k) == (6, 5, 5 if name == "soft" else 3)


def test_options_reach_the_router():
    router = MixtureConfig(router="top-k", router_options={"jitter": 0.5, "score": "sigmoid"}).build_router(3)
    assert (router.jitter, router.score) == (0.5, "sigmoid")


def test_assignments_may_be_dropped_at_random():
    layer = build(MixtureConfig(expert_dropout=0.25))
    assert isinstance(layer.router, ExpertDropout)
    assert (type(layer.router.router), layer.router.rate) == (NoisyTopK, 0.25)
    assert layer.losses == dict(NoisyTopK.default_losses)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"router": "noisy-topk"}, "No router is called 'noisy-topk'; did you mean 'noisy-top-k'? Known: "),
        (
            {"router_options": {"jitter": 0.1}},
            "No option of the router noisy-top-k is called 'jitter'. Known: gate_bias.",
        ),
        ({"router": "soft", "dispatch": "capacity"}, "the router soft mixes all tokens into slots of a fixed number"),
        ({"router": "top-k", "router_options": {"top_k": 2}}, "No option of the router top-k is called 'top_k'"),
        ({"router": "hashed"}, "The router hashed takes integer keys, and a recipe's model hands its router features."),
        ({"backend": "torch"}, "A back-end computes grouped experts; got backend='torch' and experts='modules'."),
        ({"backend": "cutlass", "experts": "grouped"}, "No back-end is called 'cutlass'. Known: triton, torch."),
        ({"expert_dropout": 1.0}, "`model.expert_dropout` should be less than 1; got 1.0"),
        ({"top_k": 9}, r"top_k (9) cannot exceed num_experts (8)"),
        ({"losses": {"importence": 0.1}}, "No auxiliary loss is called 'importence'; did you mean 'importance'?"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=r"\w") as caught:
        build(MixtureConfig(**settings))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"experts": "grouped"}, MoE),
        ({"experts": "grouped", "router": "soft", "shared": True}, SoftMoE),
        ({"experts": "merged", "router": "top-k"}, MergedMoE),
        ({"shared": True, "dispatch": "capacity"}, MoE),
        ({"residual": True, "experts": "merged"}, ResidualMixture),
        ({"residual": True, "shared": True}, ResidualMixture),
    ],
)
def test_every_kind_of_experts_and_what_stands_beside_them_is_made_and_trains(settings, kind):
    model = build(MixtureConfig(num_experts=4, **settings))
    assert type(model) is kind
    layer = model.moe if kind is ResidualMixture else model
    if settings.get("experts") == "grouped":
        assert isinstance(layer.experts, GroupedFeedForward)
        assert isinstance(build(MixtureConfig(num_experts=1, **settings)), nn.Sequential)  # its dense twin
    (model(torch.randn(32, 4)).square().sum() + aux_loss(model)).backward()
    beside = model.branch if kind is ResidualMixture else getattr(layer, "shared", None)
    assert (beside is not None) == any(settings.get(name) for name in ("shared", "residual"))
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"experts": "merged", "shared": True}, "no shared expert; got router='noisy-top-k', dispatch='dropless', sha"),
        ({"experts": "merged", "dispatch": "capacity"}, "no capacity"),
        ({"shared": True, "upcycle_epoch": 2}, "got upcycle_epoch=2, experts='modules', shared=True and residual=Fa"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        build(MixtureConfig(**settings))


def test_grouped_experts_of_another_shape_than_the_models_are_refused():
    with pytest.raises(ValueError, match=r"take items of shape \(4,\) and return \(5,\)"):
        MixtureConfig(experts="grouped").build_mixture(lambda: nn.Linear(4, 5), router_dim=4, item_shape=(4,))
