"""What DeepSpeed 0.19.8 does by itself, and why the engine works round it: gradients, groups, clipping, broadcasts."""

from contextlib import contextmanager

import pytest
import torch

from gatewright import aux_loss
from gatewright.integrations.deepspeed.parameters import adapt_to_deepspeed
from gatewright.parallel import expert_parameters, total_gradient_norm
from tests.integrations.deepspeed.runs import installed
from tests.integrations.deepspeed.test_parameters import mesh_of, spread

pytestmark = [installed, pytest.mark.distributed]

ADAM = {"type": "Adam", "params": {"lr": 0.01, "torch_adam": True}}


def started(model, **settings):
    """DeepSpeed's engine round a model."""
    import deepspeed

    from gatewright.integrations.deepspeed.engine import start_deepspeed

    start_deepspeed(torch.device("cpu"))
    settings = {"train_batch_size": 8, "optimizer": ADAM} | settings
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)[0]


def backward(engine, model):
    rank = torch.distributed.get_rank()
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(rank))
    engine.backward(engine(x).square().mean() + aux_loss(model))


@contextmanager
def norms_of_clipping():
    """What DeepSpeed takes for the norm when it clips at stage 0."""
    import deepspeed.runtime.engine as theirs

    found, clip = [], theirs.clip_grad_norm_

    def noted(*args, **options):
        found.append(float(clip(*args, **options)))
        return found[-1]

    theirs.clip_grad_norm_ = noted
    try:
        yield found
    finally:
        theirs.clip_grad_norm_ = clip


def clipping():
    model = adapt_to_deepspeed(spread(experts="grouped-relu-bias"))
    engine = started(model, gradient_clipping=1e-3)
    backward(engine, model)
    true = float(total_gradient_norm(model, mesh_of(2)))
    with norms_of_clipping() as found:
        engine.step()
    return true, found


def test_its_clipping_at_stage_0_is_not_by_the_global_norm(ranks):
    """G3: it averages each process's own norm, which is less than the norm of all."""
    (true, (first,)), (also, (second,)) = ranks(2, clipping)
    assert true == pytest.approx(also)
    assert first == pytest.approx(second)
    assert abs(first - true) > 1e-3 * true


def groups():
    model = adapt_to_deepspeed(spread(experts="grouped-relu-bias"))
    found = started(model).optimizer.param_groups
    spread_here = {parameter for _, parameter in expert_parameters(model)}
    return [(group.get("moe", False), {*group["params"]} == spread_here) for group in found if group["params"]]


def test_an_optimizer_of_its_json_has_the_experts_in_a_group_of_their_own(ranks):
    """O1."""
    assert ranks(2, groups) == [[(False, False), (True, True)]] * 2


def idle():
    model = adapt_to_deepspeed(spread())
    with torch.no_grad():  # Every token to the first two experts: the second process's have none.
        model.block.router.gate.weight.zero_()
        model.block.router.gate.weight[:2] = 1.0
    engine = started(model)
    engine.backward(engine(torch.rand(4, 8) + 0.1).square().mean() + aux_loss(model))
    gradients = [parameter.grad for _, parameter in expert_parameters(model)]
    found = [None if gradient is None else float(gradient.abs().max()) for gradient in gradients]
    engine.step()
    return found


def test_experts_without_rows_have_gradients_of_zero_and_do_not_hang_it(ranks):
    """G2."""
    first, second = ranks(2, idle)
    assert max(first) > 0
    assert set(second) == {0.0}


def untagged():
    """A model whose experts are spread but not adapted: what DeepSpeed makes of it."""
    model = spread()
    torch.manual_seed(torch.distributed.get_rank())
    with torch.no_grad():
        for _, parameter in expert_parameters(model):
            parameter.normal_()
    before = [parameter.tolist() for _, parameter in expert_parameters(model)]
    started(model)
    return before, [parameter.tolist() for _, parameter in expert_parameters(model)]


def test_without_the_adapter_it_overwrites_each_processs_experts_by_the_firsts(ranks):
    """R4: silently."""
    (first, kept), (second, overwritten) = ranks(2, untagged)
    assert first == kept != second
    assert overwritten == first
