"""The expert bias of layers: whose load moves it, and forwards that are repeated or compiled."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gatewright import Biased, GroupedFeedForward, GroupLimited, MoE, aux_loss, end_step, reference
from tests.cases import make_moe
from tests.routers.test_expert_bias import biased_moe


def test_end_step_moves_every_layer_once_by_its_own_load():
    model = nn.Sequential(biased_moe(), make_moe("top-k"), biased_moe(bias_rate=0.25))
    loads = [torch.zeros(5), torch.zeros(5)]
    for _ in range(3):
        model(torch.randn(13, 8))
        aux_loss(model)
        for load, moe in zip(loads, (model[0], model[2]), strict=True):
            load += moe.routing.sums.tokens_per_expert
    assert not any(moe.router.expert_bias.bias.any() for moe in (model[0], model[2]))  # never by a forward
    end_step(model)
    for load, moe, rate in zip(loads, (model[0], model[2]), (0.001, 0.25), strict=True):
        assert load.sum() == 3 * 13 * 2
        assert torch.equal(moe.router.expert_bias.bias, reference.moved_bias(torch.zeros(5), load, rate))


def test_the_load_is_what_was_chosen_not_what_a_capacity_let_through():
    moe = make_moe("biased", dispatcher="capacity-tight")
    with pytest.warns(UserWarning, match="A capacity of 1 row"):
        moe(torch.randn(2, 8))
    moe.router.expert_bias.load.zero_()
    moe(torch.randn(40, 8))
    assert moe.routing.sums.dropped > 0
    assert moe.router.expert_bias.load.sum() == 80


def test_evaluation_and_a_frozen_router_note_nothing():
    moe = biased_moe()
    moe.eval()(torch.randn(13, 8))
    assert not moe.router.expert_bias.load.any()
    moe.train().router.eval()
    moe(torch.randn(13, 8))
    assert not moe.router.expert_bias.load.any()
    moe.train()(torch.randn(13, 8))
    assert moe.router.expert_bias.load.sum() == 26


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_forward_repeated_in_backward_counts_once(use_reentrant):
    moe, x = biased_moe(), torch.randn(13, 8, requires_grad=True)
    forwards = []
    moe.register_forward_pre_hook(lambda *_: forwards.append(1))
    checkpoint(moe, x, use_reentrant=use_reentrant).sum().backward()
    assert len(forwards) == 2
    assert moe.router.expert_bias.load.sum() == 26


def compiled():
    """One graph without breaks for all forwards, also after steps and beyond the warning's count: as in eager mode."""
    from torch._dynamo.testing import CompileCounterWithBackend  # Half a second, for the process that needs it.

    counter = CompileCounterWithBackend("aot_eager")
    moe = MoE(GroupLimited(8, 4, 2), GroupedFeedForward(4, 8, 8))
    moe.router.expert_bias._forwards_left = 3
    other = copy.deepcopy(moe)
    other.router.expert_bias._forwards_left = 0
    models = {moe: torch.compile(moe, backend=counter, fullgraph=True), other: other}
    for count in (1, 4, 2):
        for module, model in models.items():
            torch.manual_seed(count)
            for _ in range(count):
                (model(torch.randn(16, 8)).square().sum() + aux_loss(module)).backward()
        loads = [module.router.expert_bias.load.clone() for module in models]
        assert loads[0].sum() == count * 32
        assert torch.equal(*loads)
        for module in models:
            end_step(module)
    biases = [module.router.expert_bias.bias for module in models]
    assert biases[0].any()
    assert torch.equal(*biases)
    return counter.frame_count


def test_compiled_forwards_are_counted_by_one_graph(run_unhooked):
    assert run_unhooked(compiled) == 1


def compiled_and_checkpointed():
    moe = MoE(Biased(8, 4, 2), GroupedFeedForward(4, 8, 8))
    model = torch.compile(lambda x: checkpoint(moe, x, use_reentrant=False), backend="aot_eager")
    model(torch.randn(16, 8, requires_grad=True)).sum().backward()
    return moe.router.expert_bias.load.sum().item()


def test_a_compiled_forward_repeated_in_backward_counts_once(run_unhooked):
    assert run_unhooked(compiled_and_checkpointed) == 32
