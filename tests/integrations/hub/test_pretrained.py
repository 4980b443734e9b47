"""A run becomes a folder for Hugging Face's hub, which says what the run found and computes what it computed."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gatewright.integrations.hub import PretrainedModel
from gatewright.train import TrackingConfig, load_run, save_config, train
from tests.train.runs import FIVE_STEPS, digits_config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of the digits: its result and its folder."""
    config = digits_config(tmp_path_factory.mktemp("finished") / "run", data=FIVE_STEPS)
    return train(replace(config, tracking=TrackingConfig(enabled=False, uri="http://me:secret@server")))


def test_a_run_is_saved_and_loaded_with_equal_outputs(run, tmp_path):
    result, output = run
    PretrainedModel(output).save_pretrained(tmp_path / "digits")
    images = torch.rand(5, 1, 8, 8)
    expected = load_run(output).model(images)
    loaded = PretrainedModel.from_pretrained(tmp_path / "digits")
    assert not loaded.training
    assert torch.equal(loaded(images), expected)
    assert torch.equal(load_run(tmp_path / "digits").model(images), expected)
    assert loaded.trained.fingerprint == load_run(output).fingerprint
    assert loaded.trained.result["confusion"] == result["confusion"]


def test_the_card_says_what_the_run_found_and_nothing_of_its_machine(run, tmp_path):
    result, output = run
    PretrainedModel(output).save_pretrained(tmp_path / "digits", model_card_kwargs={"license": "mit"})
    card = (tmp_path / "digits/README.md").read_text()
    head, body = card.removeprefix("---\n").split("\n---\n")
    assert {"license: mit", "library_name: gatewright", "pipeline_tag: image-classification"} <= set(head.splitlines())
    assert f"| test accuracy | {result['test_accuracy']:.2%} |" in body
    experts = [line for line in body.splitlines() if line.startswith(("| 0 |", "| 1 |", "| 2 |", "| 3 |"))]
    assert len(experts) == 4
    again = PretrainedModel.from_pretrained(tmp_path / "digits")
    assert again.generate_model_card(license="mit").content.strip() == card.strip()
    written = b"".join(path.read_bytes() for path in Path(tmp_path / "digits").iterdir())
    assert b"secret" not in written
    assert str(output).encode() not in written


def test_a_run_that_went_on_since_its_result_has_a_card_without_figures(run, tmp_path):
    trained = load_run(run[1])
    save_config(replace(trained.config, epochs=9), run[1] / "config.yaml")
    card = PretrainedModel(run[1]).generate_model_card()
    save_config(trained.config, run[1] / "config.yaml")
    assert "test accuracy" not in card.content
    assert "# digits" in card.content


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model.safetensors as a pretrained model has. Name a folder that"):
        PretrainedModel.from_pretrained(tmp_path)
