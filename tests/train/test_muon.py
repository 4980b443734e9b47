"""A stack of matrices is changed as torch's Muon changes each of them alone."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from gatewright.train.muon import FORMS, Muon

SETTINGS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.5}
SHAPES = {"matrix": (7, 3), "filter": (20, 3, 2, 2), "stacked matrix": (4, 5, 9), "stacked filter": (2, 6, 3, 2, 2)}


def gradients(shape, steps=3):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(steps)]


def take_steps(optimizer, parameters, steps):
    """Make a step by each list of gradients."""
    for each in steps:
        for parameter, gradient in zip(parameters, each, strict=True):
            parameter.grad = gradient
        optimizer.step()


@pytest.mark.parametrize("form", SHAPES)
def test_every_matrix_is_changed_as_by_torchs_muon_alone(form):
    """As `nn.Linear` would hold it, or a convolution's filter with its inputs in a row."""
    assert set(SHAPES) == set(FORMS)
    start, steps = torch.randn(SHAPES[form]), gradients(SHAPES[form])
    stack = nn.Parameter(start.clone())
    take_steps(Muon([{"params": [stack], "form": form}], **SETTINGS), [stack], [[g] for g in steps])
    alone = [nn.Parameter(matrix.clone()) for matrix in FORMS[form](start)]
    take_steps(torch.optim.Muon(alone, **SETTINGS), alone, [list(FORMS[form](g)) for g in steps])
    assert torch.equal(FORMS[form](stack.detach()), torch.stack(list(alone)).detach())


def test_the_layout_of_memory_changes_nothing():
    start, steps = torch.randn(6, 4, 3, 3), gradients((6, 4, 3, 3))
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        filters = nn.Parameter(start.clone(memory_format=layout))
        laid_out = [[gradient.contiguous(memory_format=layout)] for gradient in steps]
        take_steps(Muon([{"params": [filters], "form": "filter"}], **SETTINGS), [filters], laid_out)
        assert filters.is_contiguous(memory_format=layout)
        found.append(filters.detach())
    assert_close(*found)


def test_nothing_changes_where_a_gradient_was_not_finite():
    """Neither the weights nor what is kept for the steps after it; so `GradScaler` may skip a step and go on."""
    start = torch.randn(4, 5, 9)
    weights, (first, after) = nn.Parameter(start.clone()), gradients((4, 5, 9), 2)
    optimizer = Muon([{"params": [weights], "form": "stacked matrix"}], **SETTINGS)
    optimizer.found_inf = torch.tensor(1.0)
    take_steps(optimizer, [weights], [[torch.full_like(first, torch.inf)]])
    assert torch.equal(weights, start)
    optimizer.found_inf = torch.tensor(0.0)
    take_steps(optimizer, [weights], [[after]])
    undisturbed = nn.Parameter(start.clone())
    take_steps(Muon([{"params": [undisturbed], "form": "stacked matrix"}], **SETTINGS), [undisturbed], [[after]])
    assert torch.equal(weights, undisturbed)
