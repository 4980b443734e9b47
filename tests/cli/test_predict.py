"""What a trained run makes of image files."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from gatewright.cli.predict import expert_weights
from gatewright.data import load_images
from gatewright.routers import ExpertChoice, Soft, TopK
from gatewright.train import load_config, load_run


@pytest.fixture
def image_files(trained, tmp_path):
    """A folder of two images, one of them in a sub-folder, beside what is none."""
    folder = tmp_path / "images"
    shutil.copytree(trained / "examples", folder / "more", ignore=shutil.ignore_patterns("[1-9].png"))
    shutil.copy(trained / "examples" / "3.png", folder / "a.png")
    (folder / "._a.png").write_bytes(b"hidden")
    (folder / "notes.txt").write_text("no image")
    return folder


def test_predictions_are_those_of_the_evaluation(gatewright, trained):
    """On files of the test images, in grey, in colour, and at another size."""
    images = load_images(load_config(trained / "config.yaml").data).test
    grey = np.asarray(images.images[:6, 0])
    for index, image in enumerate(grey):
        Image.fromarray(image).save(f"{index}.png")
    Image.fromarray(grey[0]).convert("RGB").save("colour.png")
    Image.fromarray(grey[0]).resize((64, 64), Image.Resampling.NEAREST).save("large.png")
    names = [*(f"{index}.png" for index in range(6)), "colour.png", "large.png"]
    status, output, errors = gatewright("predict", trained, *names)
    assert (status, errors) == (0, "")
    lines = output.splitlines()
    assert [line.split(": ")[0] for line in lines] == names
    right = sum(
        line.split(": ")[1].startswith(f"{label} ")
        for line, label in zip(lines, images.labels[:6].tolist(), strict=False)
    )
    assert right >= 4
    assert lines[6].split(": ")[1] == lines[0].split(": ")[1]
    for line in lines:
        assert re.search(r": (\d [\d.]+%(, )?){3}; network.mixture experts (\d [\d.]+%(, )?){2}$", line)


def test_a_folder_stands_for_the_images_in_it(gatewright, trained, image_files):
    status, output, errors = gatewright("predict", trained, image_files)
    assert (status, errors) == (0, "")
    names = [line.split(": ")[0] for line in output.splitlines()]
    assert names == [str(image_files / "a.png"), str(image_files / "more" / "0.png")]
    (image_files / "empty").mkdir()
    status, output, errors = gatewright("predict", trained, image_files, image_files / "empty")
    assert (status, output) == (2, "")
    assert errors == f"error: there is no image file in the folder {image_files}/empty: name another\n"


def test_json_has_an_object_per_line(gatewright, trained, image_files):
    status, output, errors = gatewright("predict", trained, image_files, "--json", "--top", "4")
    assert (status, errors) == (0, "")
    found = [json.loads(line) for line in output.splitlines()]
    assert [each["file"] for each in found] == [str(image_files / "a.png"), str(image_files / "more" / "0.png")]
    run = load_run(trained)
    images = load_images(run.config.data).test
    for each, label in zip(found, (3, 0), strict=True):
        image = images.images[images.labels == label][:1]  # the first of the class is its example
        top = run.model(image / 255)[0].softmax(-1).topk(4)
        assert [run.fingerprint["class_names"].index(one["class"]) for one in each["classes"]] == top.indices.tolist()
        assert_close(torch.tensor([one["probability"] for one in each["classes"]]), top.values)
        routing = run.model.network.mixture.routing
        expected = dict(zip(routing.expert_index.tolist(), routing.weight.tolist(), strict=True))
        assert {one["expert"]: one["weight"] for one in each["experts"]["network.mixture"]} == pytest.approx(expected)


def test_the_number_of_classes_is_chosen(gatewright, trained):
    for top, shown in ((1, 1), (99, 10)):
        output = gatewright("predict", trained, trained / "examples" / "0.png", "--top", top)[1]
        assert output.split(": ")[1].split("; ")[0].count("%") == shown
    status, output, errors = gatewright("predict", trained, trained / "examples" / "0.png", "--top", 0)
    assert (status, output) == (2, "")
    assert errors == "error: --top is the number of classes to name, 1 or more; got 0.\n"


def test_files_that_are_no_images_are_named_and_the_others_answered(gatewright, trained, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing of use")
    good = trained / "examples" / "0.png"
    status, output, errors = gatewright("predict", trained, good, "broken.png", "nowhere.png", good)
    assert status == 2
    assert [line.split(": ")[0] for line in output.splitlines()] == [str(good)] * 2
    first, second = errors.splitlines()
    assert first.startswith("error: broken.png: cannot be decoded as an image")
    assert second == "error: there is no image file nowhere.png: check the path"


@pytest.mark.parametrize("router", [TopK(6, 4, 2), ExpertChoice(6, 4), Soft(6, 4)])
def test_the_weight_of_an_expert_is_the_mean_over_all_tokens(router):
    found = router.eval()(torch.randn(8, 6))
    routing = getattr(found, "routing", found).detach()
    found = {each["expert"]: each["weight"] for each in expert_weights(routing)}
    expected = (routing.sums.importance / 8).tolist()
    assert found == pytest.approx({index: expected[index] for index in found})
    assert all(expected[index] == 0 for index in set(range(4)) - set(found))
