"""What the report says of each expert, against the same counted by hand."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close

from gatewright import ModuleExperts, MoE, TopK
from gatewright.tasks.profiles import expert_profiles
from tests.train.runs import image_set


def classifier(top_k=1):
    experts = ModuleExperts(lambda: nn.Linear(12, 4), 3)
    return nn.Sequential(nn.Flatten(), MoE(TopK(12, 3, top_k), experts))


def test_each_expert_is_described_by_its_own_images():
    model, images = classifier().train(), image_set(40, size=2)
    nn.init.normal_(model[1].router.gate.weight)
    found = expert_profiles(model, images)["1"]
    assert model.training
    model.eval()
    pixels = images.images / 255
    predicted = model(pixels).argmax(-1)
    routing = model[1].routing
    chosen = torch.empty(40, dtype=torch.int64).scatter_(0, routing.token_index, routing.expert_index)
    weight = torch.empty(40).scatter_(0, routing.token_index, routing.weight.detach())
    assert found["of"] == 40
    assert found["confidence"] == pytest.approx(float(weight.mean()))
    flat, alone = pixels.flatten(1), model[1].experts.experts
    outputs = torch.stack([expert(flat).flatten() for expert in alone])
    assert_close(torch.tensor(found["alike"]), nn.functional.cosine_similarity(outputs[:, None], outputs[None], dim=-1))
    for expert, each in enumerate(found["profiles"]):
        own = chosen == expert
        right = predicted == images.labels
        assert each["own"] == int(own.sum())
        assert each["accuracy"] == (pytest.approx(float(right[own].float().mean())) if own.any() else None)
        assert sum(number for *_, number in each["confuses"]) <= int((own & ~right).sum())
        best = weight.where(own, -1.0).sort(descending=True, stable=True).indices[: min(6, int(own.sum()))].tolist()
        assert [one["weight"] for one in each["examples"]] == pytest.approx(weight[best].tolist())
        for one, place in zip(each["examples"], best, strict=True):
            content = base64.b64decode(one["image"].removeprefix("data:image/png;base64,"))
            shown = np.asarray(Image.open(io.BytesIO(content)))
            assert np.array_equal(shown, images.images[place].movedim(0, 2).numpy())
            assert (one["class"], one["taken_for"]) == (f"class {images.labels[place]}", f"class {predicted[place]}")


def test_without_an_expert_its_images_go_to_the_next_one():
    model, images = classifier(), image_set(40, size=2)
    found = expert_profiles(model, images)["1"]["profiles"]
    kept = model[1].router.gate.weight.detach().clone()
    for expert, each in enumerate(found):
        others = [other for other in range(3) if other != expert]
        logits = images.images.flatten(1) / 255 @ kept.t()
        winner = torch.tensor(others)[logits[:, others].argmax(-1)]
        weight = logits[:, others].softmax(-1).amax(-1)
        outputs = torch.stack([one(images.images.flatten(1) / 255) for one in model[1].experts.experts], 1)
        output = outputs[torch.arange(40), winner] * weight[:, None]
        accuracy = (output.argmax(-1) == images.labels).float().mean()
        assert each["without"] == pytest.approx(float(accuracy))
    assert torch.equal(model[1].router.gate.weight, kept)


def test_a_dense_network_and_an_empty_set_have_no_profiles():
    assert expert_profiles(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), image_set(4, size=2)) == {}
    assert expert_profiles(classifier(), image_set(4, size=2).select(torch.arange(0))) == {}
