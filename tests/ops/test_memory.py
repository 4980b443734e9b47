"""Memory of gradients: used again once nobody else holds it, and never before."""

import copy
import pickle

import torch

from gatewright import GroupedFeedForward, MoE, TopK
from gatewright.ops import GradientMemory


def test_it_hands_out_the_same_memory_once_nobody_holds_it():
    memory, like = GradientMemory(), torch.zeros(3, 4)
    first = memory.empty_like("in", like)
    place, view = first.data_ptr(), first[1:]
    del first
    second = memory.empty_like("in", like)
    assert second.data_ptr() != place  # A view of the first is still there.
    assert memory.empty_like("out", like).data_ptr() != second.data_ptr()
    place = second.data_ptr()
    del second, view
    assert memory.empty_like("in", like).data_ptr() == place
    assert memory.empty_like("in", like.double()).dtype == torch.float64


def test_copies_and_pickles_begin_with_none():
    memory, like = GradientMemory(), torch.zeros(3, 4)
    place = memory.empty_like("in", like).data_ptr()
    for other in (copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))):
        assert other.empty_like("in", like).data_ptr() != place


def test_a_layers_gradients_add_up_and_stay_what_they_are_while_somebody_holds_them():
    moe = MoE(TopK(8, 4, 2), GroupedFeedForward(4, 8, 16), losses={})
    x, parameter = torch.randn(9, 8), moe.experts.weight_in
    moe(x).sum().backward()
    kept, once = parameter.grad, parameter.grad.clone()
    for times in (2, 3):
        moe(x).sum().backward()
        torch.testing.assert_close(parameter.grad, times * once)
    moe.zero_grad()
    moe(2 * x).sum().backward()
    torch.testing.assert_close(kept, 3 * once)
    del kept
    for _ in range(2):
        moe.zero_grad()
        moe(x).sum().backward()
        torch.testing.assert_close(parameter.grad, once)
