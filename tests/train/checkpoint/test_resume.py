"""Every setting has a decision for a run that goes on: in silence, with a sentence, or not at all."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from gatewright.data import DataConfig
from gatewright.recipes import RECIPES
from gatewright.tasks import Classification
from gatewright.train import Interrupted, RunConfig, load_config, train
from gatewright.train.checkpoint.format import checkpoints
from gatewright.train.checkpoint.resume import DECISIONS, check_changes, flat, rule_of
from gatewright.train.config_file import settings_of
from tests.train.runs import FIVE_STEPS, digits_config, signal_at, steps_of, write_image_folder

PAGE = Path(__file__).parents[3] / "docs" / "resume.md"


def test_every_setting_has_a_decision_and_its_row_on_the_page():
    """Whoever adds a setting decides here what becomes of it; the page says the same as the code."""
    configs = [RunConfig(recipe="any", model=network(), data=DataConfig()) for network in Classification.models]
    names = {name for config in configs for name in flat(settings_of(config))}
    assert set(DECISIONS) | set(Classification.decisions) <= names
    rules = {name: rule_of(name, Classification()) for name in names}
    kinds = {name: "depends" if callable(rule) else rule.kind for name, rule in rules.items()}
    rows = re.findall(r"^\| (`.*?) \| (exact|rounding|from here|refused|depends)\b", PAGE.read_text(), re.MULTILINE)
    told = {name: kind for names, kind in rows for name in re.findall(r"`([\w.]+)`", names)}
    assert told == kinds


def saved(config, *, epoch=1, step=3, step_count=24):
    return {
        "config": json.loads(json.dumps(settings_of(config))),
        "position": {"epoch": epoch, "step": step},
        "steps_per_epoch": 21,
        "engine": {"step_count": step_count},
    }


DIGITS = replace(RECIPES["digits"](), epochs=4)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"data": replace(DIGITS.data, batch_size=32)},
            r"data.batch_size was 64 and is 32, but it decides which items",
        ),
        ({"model": replace(DIGITS.model, router="top-k")}, r"model.router was 'noisy-top-k' and is 'top-k'"),
        (
            {"model": replace(DIGITS.model, upcycle_epoch=3)},
            r"model.upcycle_epoch was 0 and is 3, but a run begins either",
        ),
        ({"epochs": 1}, r"epochs was 4 and is 1, but it has begun 2 epochs"),
        ({"precision": "float16", "seed": 1}, r"seed was 0 and is 1, .*precision was 'float32' and is 'float16'"),
    ],
)
def test_what_would_make_it_another_run_is_refused(changes, reason):
    with pytest.raises(ValueError, match=rf"A run goes on with .*{reason}.*begin another run"):
        check_changes(replace(DIGITS, **changes), saved(DIGITS))


@pytest.mark.parametrize(
    ("changes", "sentences"),
    [
        ({"output": "elsewhere", "checkpoint_every_steps": 5, "data": replace(DIGITS.data, cache="here")}, []),
        (
            {"processes": 2, "device": "cpu"},
            [r"device was 'auto' .*: the same .* rounding", r"processes was 1 and is 2"],
        ),
        (
            {"optim": replace(DIGITS.optim, label_smoothing=0.1, betas=(0.9, 0.95))},
            [
                r"optim.betas was \[0.9, 0.999\] until step 3 of epoch 2, and is \[0.9, 0.95\] from there on",
                "optim.label_smoothing was 0.05",
            ],
        ),
        (
            {"optim": replace(DIGITS.optim, lr=1e-3)},
            ["optim.lr was 0.003 until", r"The learning rate was 0.003 in the last step and is 0.00099 in the next"],
        ),
    ],
)
def test_what_changes_the_rest_of_it_is_said(changes, sentences):
    said = check_changes(replace(DIGITS, **changes), saved(DIGITS))
    found = zip(sentences, sorted(said, key=str.lower), strict=True)
    assert all(re.search(pattern, sentence) for pattern, sentence in found)


def test_another_number_of_experts_per_token_is_refused_where_it_decides_how_wide_they_are():
    """And not where they are copies of a dense layer, whose width they have."""
    vit = RECIPES["cifar10-vit"]()
    other = replace(vit, model=replace(vit.model, top_k=4))
    with pytest.raises(ValueError, match=r"model.top_k was 2 and is 4, but an expert's hidden layer is `model.ffn` / "):
        check_changes(other, saved(vit))
    copies = {"experts": "modules", "upcycle_epoch": 1}
    vit, other = (replace(config, model=replace(config.model, **copies)) for config in (vit, other))
    (sentence,) = check_changes(other, saved(vit))
    assert sentence.startswith("model.top_k was 2 until")


def test_nothing_is_said_of_an_int_for_a_float_or_of_a_setting_that_is_new():
    older = saved(replace(DIGITS, optim=replace(DIGITS.optim, warmup_epochs=1)))
    del older["config"]["compile"]
    assert check_changes(replace(DIGITS, optim=replace(DIGITS.optim, warmup_epochs=1.0), compile=True), older) == []


def test_images_are_neither_seen_twice_nor_left_out(tmp_path):
    """In the middle of an epoch another batch size, or another number of images, would do either."""
    data = {"name": "folder", "path": str(write_image_folder(tmp_path / "images")), "batch_size": 8, "holdout": 0.0}
    config = digits_config(tmp_path / "run", data=data, log_interval=1)
    with signal_at(2), pytest.raises(Interrupted):
        train(config)
    with pytest.raises(ValueError, match=r"data.batch_size was 8 and is 16"):
        train(replace(config, data=replace(config.data, batch_size=16)), resume=True)
    more = write_image_folder(tmp_path / "more", num_train=40)
    with pytest.raises(ValueError, match="was trained on 32 images, and now there are 40"):
        train(replace(config, data=replace(config.data, path=str(more))), resume=True)
    train(config, resume=True)
    assert steps_of(tmp_path / "run") == [1, 2, 3, 4]


def test_a_finished_run_is_not_relabelled_and_more_epochs_say_what_they_do_to_the_rate(tmp_path, capsys):
    config = digits_config(tmp_path / "run", data=FIVE_STEPS, optim={"warmup_epochs": 0.0})
    train(config)
    result = (tmp_path / "run" / "result.json").read_text()
    with pytest.raises(ValueError, match="seed was 0 and is 7"):
        train(replace(config, seed=7), resume=True)
    with pytest.raises(ValueError, match=r"optim.lr was 0.003 and is 0.1, but the run is finished"):
        train(replace(config, optim=replace(config.optim, lr=0.1)), resume=True)
    assert (tmp_path / "run" / "result.json").read_text() == result
    assert load_config(tmp_path / "run" / "config.yaml") == config

    capsys.readouterr()
    longer, output = train(replace(config, epochs=2), resume=True)
    sentences = [
        "epochs was 1 until the end of epoch 1, and is 2 from there on.",
        "The learning rate was 0.0002 in the last step and is 0.0015 in the next.",
    ]
    assert capsys.readouterr().err.splitlines() == [f"resumed: {sentence}" for sentence in sentences]
    assert longer["resumed_with"] == sentences
    assert json.loads((output / "result.json").read_text())["epochs"] == 2
    assert train(replace(config, epochs=2), resume=True)[0]["resumed_with"] == sentences  # and stays on record


def test_a_stop_after_the_last_step_of_an_epoch_saves_that_step_once(tmp_path):
    config = digits_config(tmp_path / "run", epochs=2, data=FIVE_STEPS)
    with signal_at(6), pytest.raises(Interrupted, match="Stopped in epoch 2 after 0 of its steps"):
        train(config)
    (saved_once,) = checkpoints(tmp_path / "run" / "checkpoints")
    before = saved_once.stat().st_mtime_ns
    train(config, resume=True)
    assert saved_once.stat().st_mtime_ns == before
