"""Programs exported from a layer in evaluation: the same outputs, at any batch size.

Each check runs in a process without the import hook (see `run_unhooked` in conftest.py).
"""

from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from gatewright import ModuleExperts, MoE, TopK
from gatewright.routers import ROUTERS
from tests.cases import make_merged, make_moe, make_soft_moe
from tests.compare import arguments

# An exported program runs every expert on every row: each of them makes the program longer, and proves no more.
FOUR = partial(make_moe, num_experts=4)


def agrees_at_other_sizes(build, *parts):
    layer = build(*parts).eval()
    example = arguments(layer, torch.randn(6, 8))
    batch = torch.export.Dim("batch")
    dynamic = tuple({0: batch} for _ in example)
    program = torch.export.export(layer, example, dynamic_shapes=dynamic).module()
    for num_tokens in (2, 6, 13):
        inputs = arguments(layer, torch.randn(num_tokens, 8))
        assert_close(program(*inputs), layer(*inputs))


@pytest.mark.parametrize("router", [*ROUTERS, "expert-dropout"])
def test_an_exported_layer_takes_batches_of_any_size(run_unhooked, router):
    run_unhooked(agrees_at_other_sizes, FOUR, router, "grouped-swiglu-bias")


def test_module_experts_and_soft_and_merged_layers_are_exported_too(run_unhooked):
    run_unhooked(agrees_at_other_sizes, FOUR, "expert-choice", "modules")
    run_unhooked(agrees_at_other_sizes, partial(make_soft_moe, num_experts=3), "soft-per-token", "modules")
    run_unhooked(agrees_at_other_sizes, partial(make_merged, num_experts=3), "top-k")


def images_agree():
    def expert():
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 10))

    moe = MoE(TopK(75, 4, 2), ModuleExperts(expert, 4), item_shape=(3, 5, 5)).eval()
    dynamic = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(moe, (torch.randn(4, 3, 5, 5),), dynamic_shapes=dynamic).module()
    images = torch.randn(7, 3, 5, 5)
    assert_close(program(images), moe(images))


def test_convolutional_experts_of_whole_images(run_unhooked):
    run_unhooked(images_agree)


def agrees_in_onnx(build, *parts):
    """Run the layer's ONNX program at other batch sizes; the scores of a batch of zeros tie."""
    import onnxruntime

    layer = build(*parts).eval()
    example = arguments(layer, torch.randn(6, 8))
    dynamic = tuple({0: torch.export.Dim("batch")} for _ in example)
    program = torch.onnx.export(layer, example, dynamo=True, dynamic_shapes=dynamic, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for x in (torch.randn(1, 8), torch.randn(13, 8), torch.zeros(5, 8)):
        inputs = arguments(layer, x)
        named = {taken.name: tensor.numpy() for taken, tensor in zip(session.get_inputs(), inputs, strict=True)}
        assert_close(torch.from_numpy(session.run(None, named)[0]), layer(*inputs).detach())


@pytest.mark.peer
@pytest.mark.parametrize(
    ("router", "experts"),
    [
        ("noisy-top-k", "modules"),
        ("biased", "grouped-swiglu-bias"),
        ("hierarchical", "modules"),
        ("expert-choice", "modules"),
        ("hashed", "modules"),
    ],
)
def test_an_onnx_program_returns_what_the_layer_does(run_unhooked, router, experts):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    run_unhooked(agrees_in_onnx, FOUR, router, experts)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("build", [make_moe, make_merged])
def test_tracing_by_example_is_refused(build):
    with pytest.raises(RuntimeError, match=r"torch\.export\.export"):
        torch.jit.trace(build().eval(), torch.randn(6, 8))
