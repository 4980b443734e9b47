import pytest
import torch
from torch import nn

from gatewright import (
    Capacity,
    Dropless,
    ExpertDropout,
    GroupedFeedForward,
    MergedMoE,
    MoE,
    NoisyTopK,
    ResidualMixture,
    SoftMoE,
    aux_loss,
)
from gatewright.models import CHOOSABLE_ROUTERS, MixtureConfig


def build(config):
    return config.build_mixture(lambda: nn.Linear(4, 4), router_dim=4, item_shape=(4,))


@pytest.mark.parametrize("name", CHOOSABLE_ROUTERS)
def test_every_router_is_made_by_its_name(name):
    router = MixtureConfig(num_experts=5, top_k=3, router=name).build_router(6)
    assert type(router) is CHOOSABLE_ROUTERS[name]
    assert (router.dim, router.num_experts, router.top_k) == (6, 5, 5 if name == "soft" else 3)


def test_the_default_is_the_papers():
    layer = build(MixtureConfig())
    assert isinstance(layer, MoE)
    assert isinstance(layer.router, NoisyTopK)
    assert isinstance(layer.dispatcher, Dropless)
    assert layer.losses == dict(NoisyTopK.default_losses)


def test_options_reach_the_router():
    router = MixtureConfig(router="top-k", router_options={"jitter": 0.5, "score": "sigmoid"}).build_router(3)
    assert (router.jitter, router.score) == (0.5, "sigmoid")


def test_soft_routing_has_options_and_a_layer_of_its_own():
    layer = build(MixtureConfig(num_experts=3, router="soft", router_options={"slots_per_expert": 2, "group_size": 1}))
    assert isinstance(layer, SoftMoE)
    assert (layer.router.slots_per_expert, layer.router.group_size) == (2, 1)


def test_assignments_may_be_dropped_at_random():
    layer = build(MixtureConfig(expert_dropout=0.25))
    assert isinstance(layer.router, ExpertDropout)
    assert (type(layer.router.router), layer.router.rate) == (NoisyTopK, 0.25)
    assert layer.losses == dict(NoisyTopK.default_losses)


def test_no_losses_are_no_losses():
    assert build(MixtureConfig(losses={})).losses == {}


def test_one_expert_is_itself():
    assert isinstance(build(MixtureConfig(num_experts=1, upcycle_epoch=3)), nn.Linear)


def test_each_model_has_a_dispatcher_of_its_own():
    config = MixtureConfig(dispatch="capacity")
    assert isinstance(config.build_dispatcher(), Capacity)
    assert config.build_dispatcher() is not config.build_dispatcher()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"router": "noisy-topk"}, "No router is called 'noisy-topk'; did you mean 'noisy-top-k'? Known: "),
        (
            {"router": "top-k", "router_options": {"normalise": True}},
            "option of the router top-k is called 'normalise'",
        ),
        (
            {"router_options": {"jitter": 0.1}},
            "No option of the router noisy-top-k is called 'jitter'. Known: gate_bias.",
        ),
        ({"router": "top-k", "router_options": {"dim": 3}}, "option of the router top-k is called 'dim'"),
        ({"router": "soft", "dispatch": "capacity"}, "the router soft mixes all tokens into slots of a fixed number"),
        ({"router": "soft", "router_options": {"top_k": 2}}, "No option of the router soft is called 'top_k'"),
        ({"router": "top-k", "router_options": {"top_k": 2}}, "No option of the router top-k is called 'top_k'"),
        ({"router": "hashed"}, "The router hashed takes integer keys, and a recipe's model hands its router features."),
        ({"expert_dropout": 1.0}, "`model.expert_dropout` should be less than 1; got 1.0"),
        ({"expert_dropout": -0.1}, "`model.expert_dropout` should be greater than or equal to 0; got -0.1"),
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
