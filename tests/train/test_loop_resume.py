"""A run in parts ends where the whole ends."""

import shutil
import signal
from dataclasses import replace

import pytest

from gatewright.data import AugmentConfig
from gatewright.models import ResNetsConfig
from gatewright.train import Interrupted, load_run, train
from gatewright.train.checkpoint.format import newest_checkpoint
from tests.train.runs import (
    FIVE_STEPS,
    differences,
    digits_config,
    final_state,
    logged,
    signal_at,
    steps_of,
    text_config,
    write_image_folder,
    write_text,
)

RESNETS = ResNetsConfig(
    num_experts=2, router="top-k", router_options={"jitter": 0.1}, upcycle_epoch=1, stem_depth=2, gate_size=4
)


def train_in_parts(config, *stops):
    """Train with a signal in the middle of a step after each number of forwards, resuming every time."""
    for part, forward in enumerate(stops):
        with (
            signal_at(forward),
            pytest.raises(Interrupted, match=rf"Go on with: .*gatewright train {config.recipe}") as stopped,
        ):
            train(config, resume=part > 0)
        assert stopped.value.signal_number == signal.SIGTERM
    return train(config, resume=True)


def test_a_finished_run_that_is_resumed_only_concludes_again(finished, tmp_path):
    config, folder, result = finished
    output = shutil.copytree(folder, tmp_path / "run")
    (output / "result.json").unlink()  # as if it had been stopped while it was evaluated
    again, _ = train(replace(config, output=str(output)), resume=True)
    assert differences(final_state(output), final_state(folder)) == []
    assert again["confusion"] == result["confusion"]


@pytest.mark.parametrize(
    ("make", "changes", "stops"),
    [
        (
            digits_config,
            {
                "optim": {"name": "sgd", "lr": 0.05, "ema_decay": 0.9, "clip_norm": 1.0, "accumulation_steps": 2},
                "data": {"batch_size": 64, "augment": AugmentConfig(flip=True, translate=1, crop=0.7)},
            },
            (7, 12, 5),  # in the middle of an epoch, at its very end, and in the next
        ),
        (text_config, {"path": "text.txt", "optim": {"ema_decay": 0.9, "clip_norm": 1.0}}, (3, 3, 4)),
    ],
    ids=["images", "text"],
)
def test_a_run_in_parts_ends_bit_by_bit_as_the_whole(tmp_path, make, changes, stops):
    write_text(tmp_path)
    changes = {name: tmp_path / value if name == "path" else value for name, value in changes.items()}
    config = make(tmp_path / "whole", epochs=2, log_interval=1, **changes)
    whole, output = train(config)
    parts, parts_output = train_in_parts(replace(config, output=str(tmp_path / "parts")), *stops)
    assert differences(final_state(parts_output), final_state(output)) == []
    for name in ("test_headline", "confusion", "layers"):
        assert parts.get(name) == whole.get(name)
    assert steps_of(parts_output) == steps_of(output)


def test_a_run_in_parts_across_both_phases_ends_as_the_whole(tmp_path):
    folder = write_image_folder(tmp_path / "images")
    data = {"name": "folder", "path": str(folder), "batch_size": 8, "holdout": 0.0, "augment": AugmentConfig(flip=True)}
    optim = {"name": "sgd", "lr": 0.02, "ema_decay": 0.5, "warmup_epochs": 0.0}
    config = digits_config(tmp_path / "whole", epochs=3, log_interval=1, data=data, optim=optim)
    config = replace(config, model=RESNETS)
    _, output = train(config)
    _, parts_output = train_in_parts(replace(config, output=str(tmp_path / "parts")), 2, 4)
    state = final_state(output)
    assert differences(final_state(parts_output), state) == []
    experts = [
        {
            name.split(f"experts.{index}.")[1]: value
            for name, value in state["engine"]["model"].items()
            if f"experts.{index}." in name
        }
        for index in range(2)
    ]
    assert len(differences(*experts)) > 5  # after the copies were made they went ways of their own
    assert [line["step"] for line in logged(output) if "train/layers/network.mixture/load_cv" in line["values"]] == [
        *range(5, 13)
    ]


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(tmp_path, capsys):
    config = digits_config(tmp_path / "run", epochs=2, data=FIVE_STEPS)
    _, output = train(config)
    expected = final_state(output)
    newest = newest_checkpoint(output / "checkpoints")
    content = newest.read_bytes()
    newest.unlink()  # what was loaded is still mapped into memory
    newest.write_bytes(content[:-100])
    assert load_run(output).config == config
    assert f"{newest} is damaged; this is the model of step 6." in capsys.readouterr().err
    train(config, resume=True)
    assert f"{newest} is damaged, and is now {newest.name}.damaged; going on from step 6." in capsys.readouterr().err
    assert newest.with_name(f"{newest.name}.damaged").read_bytes() == content[:-100]
    assert differences(final_state(output), expected) == []


def test_a_run_saves_every_few_steps_besides_every_epoch(tmp_path):
    config = digits_config(tmp_path / "run", data=FIVE_STEPS, checkpoint_every_steps=2)
    train(config)
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step-00000004.safetensors",
        "step-00000006.safetensors",
    ]
    with pytest.raises(ValueError, match="`checkpoint_every_steps` should be greater than 0; got 0"):
        replace(config, checkpoint_every_steps=0)
