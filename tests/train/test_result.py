import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from gatewright import GroupedFeedForward, MergedMoE, ModuleExperts, MoE, ResidualMixture, TopK
from gatewright.models import CnnConfig, ImageClassifier
from gatewright.tasks import Classification
from gatewright.train import evaluate
from gatewright.train.result import (
    active_flops,
    describe_layer,
    describe_result,
    layer_metrics,
    num_active_parameters,
    write_json,
)
from tests.train.runs import image_set

CONV1, CONV2 = 3 * 6 * 25 + 6, 6 * 16 * 25 + 16
FC1, FC2, FC3, FC4 = 400 * 120 + 120, 120 * 84 + 84, 84 * 84 + 84, 84 * 10 + 10
GATES = 2 * 84 * 8  # of the noisy router: logits and noise
CNN_WITHOUT_FC3 = CONV1 + CONV2 + FC1 + FC2 + FC4
# A multiplication and an addition per weight and place; biases are not counted by torch.
CNN_FLOPS_WITHOUT_FC3 = 2 * (28 * 28 * 6 * 75 + 10 * 10 * 16 * 150 + 400 * 120 + 120 * 84 + 84 * 10)


def active_flops_per_item(model, inputs):
    return active_flops(model, inputs) // len(inputs)


def cnn(**settings):
    return ImageClassifier(CnnConfig(**settings).build((3, 32, 32), 10), [0.5] * 3, [0.2] * 3)


def test_the_article_cnn_by_hand():
    top_k = 2
    model = cnn(num_experts=8, top_k=top_k)
    assert sum(p.numel() for p in model.parameters()) == CNN_WITHOUT_FC3 + 8 * FC3 + GATES
    assert num_active_parameters(model) == CNN_WITHOUT_FC3 + top_k * FC3 + GATES
    flops = CNN_FLOPS_WITHOUT_FC3 + 2 * (top_k * 84 * 84 + 84 * 8)  # no noise is drawn in evaluation
    assert active_flops_per_item(model, torch.rand(5, 3, 32, 32)) == flops


@pytest.mark.parametrize(
    ("activation", "matrices", "bias", "dim", "ffn", "top_k"),
    [("gelu", 2, True, 8, 16, 3), ("swiglu", 3, False, 8, 16, 1), ("relu", 2, False, 7, 5, 3)],
)
def test_grouped_experts_by_hand(activation, matrices, bias, dim, ffn, top_k):
    experts = GroupedFeedForward(4, dim, ffn, activation=activation, bias=bias)
    model = nn.Sequential(nn.Flatten(), MoE(TopK(dim, 4, top_k), experts))
    biases = ((matrices - 1) * ffn + dim) * bias
    assert num_active_parameters(model) == 4 * dim + top_k * (matrices * dim * ffn + biases)
    flops = 2 * (4 * dim + top_k * matrices * dim * ffn)
    assert active_flops_per_item(model, torch.rand(6, dim, 1, 1)) == flops


def test_experts_of_different_sizes_count_by_their_mean():
    experts = ModuleExperts([nn.Sequential(nn.Linear(4, ffn), nn.Linear(ffn, 4)) for ffn in (2, 6)])
    sizes = [sum(p.numel() for p in expert.parameters()) for expert in experts.experts]
    assert num_active_parameters(MoE(TopK(4, 2, 1), experts)) == 8 + sum(sizes) / 2


def test_a_shared_expert_counts_whole():
    layer = MoE(TopK(8, 4, 2), ModuleExperts(lambda: nn.Linear(8, 8), 4), shared=nn.Linear(8, 8, bias=False))
    assert num_active_parameters(layer) == 8 * 4 + 2 * (8 * 8 + 8) + 8 * 8
    assert active_flops_per_item(layer, torch.rand(6, 8)) == 2 * (8 * 4 + 2 * 8 * 8 + 8 * 8)


def test_merged_experts_count_where_their_parameters_are_mixed():
    layer = MergedMoE(TopK(8, 4, 2), lambda: nn.Linear(8, 5), 4)
    assert num_active_parameters(layer) == 8 * 4 + 2 * (8 * 5 + 5)
    assert active_flops_per_item(layer, torch.rand(6, 8)) == 2 * (8 * 4 + 4 * (8 * 5 + 5) + 8 * 5)


def test_a_residual_mixture_counts_its_branch_whole():
    layer = ResidualMixture(MoE(TopK(8, 4, 1), ModuleExperts(lambda: nn.Linear(8, 8), 4)), nn.Linear(8, 8))
    assert num_active_parameters(layer) == 8 * 4 + 2 * (8 * 8 + 8) + 2 * 8 + 2


def test_the_description_is_that_of_the_evaluation():
    images = replace(image_set(20, size=32, num_classes=10), class_names=tuple("abcdefghij"))
    model = cnn(num_experts=3, top_k=2)
    nn.init.normal_(model.network.mixture.router.gate.weight)
    task = Classification()
    found = evaluate(task, model, images, batch_size=7)
    described = describe_result(task, model, found, (torch.rand(2, 3, 32, 32),))
    assert described["test_accuracy"] == found.accuracy
    assert list(described["test_accuracy_per_class"]) == list("abcdefghij")
    layer, use = described["layers"]["network.mixture"], found.layers["network.mixture"]
    tokens = use.sums.tokens_per_expert
    assert layer == describe_layer(use) | {"layer": "MoE", "router": "NoisyTopK", "top_k": 2}
    assert described["test_loss"] == found.loss
    assert described["active_flops_per_image"] == active_flops_per_item(model, torch.rand(2, 3, 32, 32))
    assert layer["tokens_per_expert"] == tokens.tolist()
    assert layer["load_cv"] == pytest.approx(float(tokens.double().std(correction=0) / tokens.double().mean()))
    assert layer["dead_experts"] == [index for index, count in enumerate(tokens) if count == 0]
    assert json.loads(json.dumps(described)) == described


def test_the_metrics_of_a_layer_are_named_and_are_numbers():
    layer = MoE(TopK(8, 12, 2), GroupedFeedForward(12, 8, 4)).eval()
    layer(torch.rand(1, 8))
    values = layer_metrics("a.b", layer.routing.sums, "train")
    assert {type(value) for value in values.values()} == {float}
    assert values["train/layers/a.b/dead_experts"] == 10
    assert [values[f"train/layers/a.b/load/{index:02d}"] for index in (10, 11)] == pytest.approx(
        (layer.routing.sums.tokens_per_expert / 2)[10:].tolist()
    )


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "result.json"
    write_json({"a": 1}, path)
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json({"a": object()}, path)
    assert json.loads(path.read_text()) == {"a": 1}
