import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from gatewright import Capacity, GroupedFeedForward, ModuleExperts, MoE, Soft, SoftMoE, TopK
from gatewright.data import ImageSet, as_floats
from gatewright.models import DigitsConfig, ImageClassifier
from gatewright.tasks import Classification, ClassificationEvaluation, class_by_expert, mirrored_too
from gatewright.train import evaluate as evaluate_task
from gatewright.train.result import describe_layer
from gatewright.train.step import take_routing
from tests.train.runs import image_set

IMAGES = image_set(37, channels=1, size=8)
evaluate = partial(evaluate_task, Classification())


class Patches(nn.Module):
    """Routes the rows of an image, 8 tokens each, through one layer, and the whole image through another."""

    def __init__(self, dispatcher=None):
        super().__init__()
        router = TopK(8, 3, 2, score_after_top_k=True)
        self.rows = MoE(router, GroupedFeedForward(3, 8, 8), dispatcher=dispatcher)
        self.head = MoE(TopK(64, 4, 1), ModuleExperts(lambda: nn.Linear(64, 4), 4))

    def forward(self, images):
        return self.head(self.rows(images.squeeze(1)).flatten(1))


def digits_model():
    config = DigitsConfig(num_experts=5, top_k=2, width=8)
    model = ImageClassifier(config.build((1, 8, 8), 4), [0.4], [0.2])
    nn.init.normal_(model.network.mixture.router.gate.weight)
    return model


@torch.no_grad()
def one_by_one(model, images):
    """The class of each image and the experts of each layer, alone."""
    model = copy.deepcopy(model).eval()
    predicted, experts = [], {name: [] for name, module in model.named_modules() if isinstance(module, MoE)}
    for image in as_floats(images.images):
        predicted.append(int(model(image[None]).argmax()))
        for name in experts:
            experts[name].append(model.get_submodule(name).routing.expert_index.tolist())
    return predicted, experts


@pytest.mark.parametrize("model", [digits_model, Patches], ids=["images", "rows"])
@pytest.mark.parametrize("batch_size", [5, 36, 1000])
def test_every_image_counts_once_at_any_batch_size(model, batch_size):
    model = model()
    predicted, experts = one_by_one(model, IMAGES)
    found = evaluate(model, IMAGES, batch_size=batch_size)
    confusion = torch.zeros(4, 4, dtype=torch.int64)
    for label, guess in zip(IMAGES.labels.tolist(), predicted, strict=True):
        confusion[label, guess] += 1
    assert torch.equal(found.confusion, confusion)
    assert set(found.layers) == set(experts)
    for name, use in found.layers.items():
        seen = torch.zeros(4, model.get_submodule(name).router.num_experts, dtype=torch.int64)
        for label, chosen in zip(IMAGES.labels.tolist(), experts[name], strict=True):
            for expert in chosen:
                seen[label, expert] += 1
        assert torch.equal(use.class_by_expert, seen)
        assert use.sums.tokens_per_expert.tolist() == seen.sum(0).tolist()
        tokens_per_image = len(experts[name][0]) // model.get_submodule(name).router.top_k
        assert use.tokens_per_class.tolist() == (IMAGES.labels.bincount() * tokens_per_image).tolist()
        assert use.sums.num_tokens == 37 * len(experts[name][0]) / model.get_submodule(name).router.top_k


def test_accuracies_are_those_of_the_confusion():
    found = ClassificationEvaluation({}, torch.tensor([[3, 1, 0], [2, 2, 0], [0, 0, 0]]), 0.0, ("a", "b", "c"))
    assert found.accuracy == pytest.approx(5 / 8)
    assert found.accuracy_per_class.tolist() == [0.75, 0.5, 0.0]
    assert ClassificationEvaluation({}, torch.zeros(2, 2, dtype=torch.int64), 0.0, ("a", "b")).accuracy == 0.0


def test_no_images_are_no_accuracy():
    nobody = ImageSet(IMAGES.images[:0], IMAGES.labels[:0], IMAGES.class_names)
    found = evaluate(digits_model(), nobody, batch_size=8)
    assert (found.accuracy, found.layers, found.loss) == (0.0, {}, 0.0)


@torch.no_grad()
def test_flipping_averages_the_two_views_and_counts_the_experts_of_one():
    model = digits_model()
    found = evaluate(model, IMAGES, batch_size=10, forward=mirrored_too)
    model.eval()
    pixels = as_floats(IMAGES.images)
    probs = model(pixels).softmax(-1) + model(pixels.flip(-1)).softmax(-1)
    expected = torch.zeros(4, 4, dtype=torch.int64)
    expected.index_put_((IMAGES.labels, probs.argmax(-1)), torch.tensor(1), accumulate=True)
    assert torch.equal(found.confusion, expected)
    assert found.loss == pytest.approx(float(nn.functional.nll_loss((probs / 2).log(), IMAGES.labels)), rel=1e-5)
    plain = evaluate(model, IMAGES, batch_size=10)
    assert plain.loss == pytest.approx(float(nn.functional.cross_entropy(model(pixels), IMAGES.labels)), rel=1e-5)
    assert not torch.equal(probs.argmax(-1), model(pixels).argmax(-1))
    assert torch.equal(found.layers["network.mixture"].class_by_expert, plain.layers["network.mixture"].class_by_expert)


def test_the_model_is_left_as_it_was():
    model = digits_model().train()
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    evaluate(model, IMAGES, batch_size=8)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_half_precision_is_used_and_counts_every_image():
    model, seen = digits_model(), []
    model.network.features[3].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    assert evaluate(model, IMAGES, batch_size=20, precision="bfloat16").confusion.sum() == 37
    assert set(seen) == {torch.bfloat16}


def test_dropped_assignments_are_not_seen_by_an_expert():
    """Counted in a loop over a batch of which a capacity dropped a part, with 8 tokens per image."""
    model = Patches(Capacity(0.5, 1)).train()
    model(as_floats(IMAGES.images))
    routing = take_routing(model.rows)
    seen = torch.zeros(4, 3, dtype=torch.int64)
    for token, expert in zip(routing.token_index.tolist(), routing.expert_index.tolist(), strict=True):
        if expert < 3:
            seen[IMAGES.labels[token // 8], expert] += 1
    assert torch.equal(class_by_expert(routing, IMAGES.labels, 4), seen)
    assert seen.sum() == 37 * 8 * 2 - routing.sums.dropped
    assert routing.sums.dropped > 0


def test_weights_of_a_soft_mixture_are_added_up_by_class():
    """Rows of an image that are a group of 8 tokens: looked up one image at a time."""
    model = Patches()
    model.rows = SoftMoE(Soft(8, 3, slots_per_expert=2, group_size=8), GroupedFeedForward(3, 8, 8))
    use = evaluate(model, IMAGES, batch_size=5).layers["rows"]
    expected = torch.zeros(4, 3)
    for image, label in zip(as_floats(IMAGES.images), IMAGES.labels, strict=True):
        expected[label] += model.rows.router(image[0]).combine.detach().sum((0, 1, 3))
    assert_close(use.class_by_expert, expected)
    assert_close(use.sums.tokens_per_expert, expected.sum(0))
    assert_close(use.class_by_expert.sum(1), use.tokens_per_class.float())
    described = describe_layer(use)
    assert described["tokens_per_expert"] == use.sums.tokens_per_expert.tolist()
    assert all(share % 1 for share in described["tokens_per_expert"])
