"""Images keep their memory format on the way to the experts and back."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from gatewright import Capacity, Dropless, ModuleExperts, MoE, TopK
from gatewright.ops import in_memory_format, split_rows


@pytest.mark.parametrize(
    ("rows", "memory_format"),
    [
        (torch.randn(4, 3, 5, 6), torch.channels_last),
        (torch.randn(4, 3, 5, 6), torch.contiguous_format),
        (torch.randn(4, 3, 2, 5, 6), torch.channels_last_3d),
        (torch.randn(4, 3), torch.contiguous_format),
    ],
)
def test_results_have_the_format_of_the_rows(rows, memory_format):
    rows, index = rows.contiguous(memory_format=memory_format), torch.tensor([2, 0, 2])
    selected = in_memory_format(lambda rows: rows.index_select(0, index), rows)
    first, none, rest = split_rows(rows, [1, 0, 3])
    assert torch.equal(selected, rows[index])
    assert torch.equal(first, rows[:1])
    assert none.shape == (0, *rows.shape[1:])
    for result in (selected, rest):
        assert result.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("dispatcher", [Dropless(), Capacity(0.5, 1)])
def test_a_layer_of_convolutions_stays_channels_last_forward_and_backward(dispatcher):
    """With an expert that has no images, and with images that were dropped."""
    experts = ModuleExperts(lambda: nn.Conv2d(3, 4, 3), 4)
    layer = MoE(TopK(2, 4, 2), experts, item_shape=(3, 6, 6), dispatcher=dispatcher, losses={})
    nn.init.eye_(layer.router.gate.weight)  # Positive features choose the first two experts alone.
    features, results = torch.rand(9, 2) + 0.1, []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        layer.to(memory_format=memory_format).zero_grad()
        x = torch.linspace(-1, 1, 9 * 108).view(9, 3, 6, 6).contiguous(memory_format=memory_format).requires_grad_()
        seen = []
        x.register_hook(lambda gradient, seen=seen: seen.append(gradient))
        output = layer(x, features)
        output.square().sum().backward()
        assert all(tensor.is_contiguous(memory_format=memory_format) for tensor in (output, *seen))
        results.append([output, *seen, *(parameter.grad.clone() for parameter in experts.parameters())])
    assert not results[1][-1].any()  # of the expert without images
    for contiguous, channels_last in zip(*results, strict=True):
        assert_close(channels_last, contiguous)
