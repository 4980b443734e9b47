import math

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.testing import assert_close

from gatewright import GroupedFeedForward, MoE, Soft, TopK
from gatewright.train import OptimConfig
from gatewright.train.optim import (
    build_optimizers,
    clip_gradients,
    load_named_state,
    named_state,
    rate_factor,
    set_learning_rate,
)


def factors(*, num_steps=20, steps_per_epoch=5, **settings):
    config = OptimConfig(**settings)
    return [
        rate_factor(config, step, num_steps=num_steps, steps_per_epoch=steps_per_epoch) for step in range(num_steps)
    ]


def network():
    """A filter, a norm, a matrix and biases."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def test_linear_warm_up_rises_evenly_to_the_full_rate():
    assert factors(warmup_epochs=1, schedule="constant")[:6] == [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]


def test_logarithmic_warm_up_is_that_of_deepspeed():
    rates = factors(warmup_epochs=1, warmup="log", schedule="constant")
    assert rates[:5] == [math.log(step + 1) / math.log(5) for step in range(5)]
    assert rates[0] == 0.0
    assert set(rates[4:]) == {1.0}


def test_the_cosine_is_torchs():
    optimizer = SGD([nn.Parameter(torch.ones(()))], lr=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    expected = []
    for _ in range(20):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert_close(factors(schedule="cosine"), expected)


def test_the_fall_begins_where_the_warm_up_ends():
    rates = factors(schedule="linear", warmup_epochs=2)
    assert rates[9] == rates[10] == 1.0
    assert_close(rates[10:], [1 - step / 10 for step in range(10)])


@pytest.mark.parametrize("warmup_epochs", [0.2, 1, 3.9, 100])
@pytest.mark.parametrize(("schedule", "warmup"), [("cosine", "linear"), ("linear", "log")])
def test_the_rate_rises_then_falls_within_bounds(schedule, warmup, warmup_epochs):
    rates = factors(schedule=schedule, warmup=warmup, warmup_epochs=warmup_epochs)
    peak = rates.index(max(rates))
    assert max(rates) == 1.0  # also where the warm-up is longer than the run
    assert min(rates) >= 0.0
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_groups_keep_their_ratio_and_factors_do_not_pile_up():
    optimizers = build_optimizers(network(), OptimConfig(name="muon", lr=0.1, adam_lr=0.004))
    for factor in (0.5, 0.25, 1.0, 0.0, 0.5):
        set_learning_rate(optimizers, factor)
        rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
        assert rates == [0.1 * factor, 0.1 * factor, 0.004 * factor]


def mixture():
    """Every kind of parameter that an optimizer may change."""
    layer = MoE(TopK(8, 4, 2), GroupedFeedForward(4, 8, 16, bias=True))
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm((4, 6, 6)), nn.Linear(4, 8), layer, nn.Embedding(5, 8))


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_biases_and_norms_do_not_decay_and_the_rest_does(name):
    """Also the biases of stacked experts, which are a matrix, and the weights of a norm over images."""
    model = mixture()
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    optimizers = build_optimizers(model, OptimConfig(name=name, lr=0.1, weight_decay=0.5, momentum=0.0))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for optimizer in optimizers:
        optimizer.step()
    kept = {"0.bias", "1.weight", "1.bias", "2.bias", "3.experts.bias_in", "3.experts.bias_out"}
    for key, p in model.named_parameters():
        assert_close(p.detach(), before[key] * (1.0 if key in kept else 0.95))


def test_muon_takes_matrices_and_filters_and_leaves_gates_to_adamw():
    model = mixture()
    names = {parameter: name for name, parameter in model.named_parameters()}
    muon, adamw = (
        {names[parameter]: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
        for optimizer in build_optimizers(model, OptimConfig(name="muon", lr=0.1))
    )
    assert set(muon) == {"0.weight", "2.weight", "3.experts.weight_in", "3.experts.weight_out"}
    assert {"3.router.gate.weight", "4.weight", "3.experts.bias_in"} <= set(adamw)
    assert set(adamw.values()) == {0.1}  # its own rate where adam_lr is left out
    assert len(build_optimizers(nn.Linear(3, 2, bias=False), OptimConfig(name="muon"))) == 1


def test_muon_without_matrices_is_refused():
    expected = (
        r"Muon changes matrices and filters, and this model has neither; its parameters are embedding, norm\. Use "
        r"optim\.name adamw or sgd\."
    )
    with pytest.raises(ValueError, match=expected):
        build_optimizers(nn.Sequential(nn.Embedding(3, 4), nn.LayerNorm(4)), OptimConfig(name="muon"))


def test_settings_reach_the_optimizer():
    (sgd,) = build_optimizers(network(), OptimConfig(name="sgd", lr=0.3, momentum=0.7))
    assert {(g["lr"], g["momentum"], g["nesterov"]) for g in sgd.param_groups} == {(0.3, 0.7, True)}
    (plain,) = build_optimizers(network(), OptimConfig(name="sgd", momentum=0.0))
    assert not plain.param_groups[0]["nesterov"]
    (adamw,) = build_optimizers(network(), OptimConfig(betas=(0.5, 0.75)))
    assert adamw.param_groups[1]["betas"] == (0.5, 0.75)


def with_gradients(*gradients):
    model = nn.ParameterList(torch.zeros(len(gradient)) for gradient in gradients)
    for parameter, gradient in zip(model, gradients, strict=True):
        parameter.grad = torch.tensor(gradient)
    return model


def test_clipping_returns_the_norm_and_scales_down():
    model = with_gradients([3.0], [0.0, 4.0])
    assert clip_gradients(model, 1.0) == 5.0
    assert_close(model[0].grad, torch.tensor([0.6]))
    assert_close(model[1].grad, torch.tensor([0.0, 0.8]))


def test_parameters_without_a_gradient_do_not_count():
    model = with_gradients([3.0], [0.0, 4.0])
    model[0].grad = None
    assert clip_gradients(model, 2.0) == 4.0
    assert clip_gradients(nn.Linear(2, 2), 1.0) == 0.0


def test_a_loaded_state_has_the_names_the_values_and_the_layout_of_the_parameters():
    model = network().to(memory_format=torch.channels_last)
    optimizer, other = AdamW(model.parameters()), AdamW(model.parameters())
    model(torch.randn(5, 3, 3, 3)).sum().backward()
    optimizer.step()
    named = {
        name: value.clone(memory_format=torch.contiguous_format)
        for name, value in named_state(optimizer, model).items()
    }
    assert {"0.weight|exp_avg", "0.weight|step", "3.bias|exp_avg_sq"} <= set(named)
    load_named_state(other, named, model)
    for parameter, values in optimizer.state.items():
        for what, value in values.items():
            assert torch.equal(other.state[parameter][what], value)
            assert other.state[parameter][what].stride() == value.stride()
    assert not other.state[model[0].weight]["exp_avg"].is_contiguous()


def test_a_state_from_when_the_scale_of_soft_was_a_number_is_taken():
    model = Soft(4, 3)
    optimizer = AdamW(model.parameters())
    named = {
        "scale|exp_avg": torch.tensor(0.5),
        "scale|exp_avg_sq": torch.tensor(0.25),
        "scale|step": torch.tensor(3.0),
    }
    load_named_state(optimizer, named, model)
    model.scale.grad = torch.ones(1)
    optimizer.step()
    assert_close(optimizer.state[model.scale]["exp_avg"], torch.tensor([0.55]))
    assert optimizer.state[model.scale]["step"] == 4


def test_sgd_takes_parameters_that_come_later_beside_those_with_momentum():
    """As the router does where a dense network becomes a mixture."""
    model = with_gradients([3.0], [4.0])
    (sgd,) = build_optimizers(model, OptimConfig(name="sgd", lr=0.1, momentum=0.5, weight_decay=0.0))
    load_named_state(sgd, {"0|momentum_buffer": torch.tensor([2.0])}, model)
    sgd.step()
    assert_close(model[0].detach(), torch.tensor([-0.1 * (3.0 + 0.5 * (0.5 * 2.0 + 3.0))]))
    assert_close(model[1].detach(), torch.tensor([-0.1 * (4.0 + 0.5 * 4.0)]))


def test_a_loaded_state_leaves_out_what_another_optimizer_changes():
    """A run of Muon that began when it took other parameters goes on."""
    model = network()
    muon, adamw = build_optimizers(model, OptimConfig(name="muon"))
    load_named_state(muon, {"0.weight|momentum_buffer": torch.ones(4, 3, 3, 3), "3.bias|exp_avg": torch.ones(2)}, model)
    assert [*muon.state] == [model[0].weight]
    load_named_state(adamw, {"0.weight|exp_avg": torch.ones(4, 3, 3, 3), "3.bias|exp_avg": torch.ones(2)}, model)
    assert [*adamw.state] == [model[3].bias]
