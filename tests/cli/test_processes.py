"""A real process of the command line, stopped by real signals and started again, ends where an unbroken run ends."""

import shlex
import signal
import sys
from pathlib import Path

from gatewright.data import AugmentConfig
from gatewright.train import train
from gatewright.train.checkpoint.format import load_checkpoint, newest_checkpoint
from tests.train.runs import differences, digits_config, final_state, finish, start, steps_of, wait_until

SETTINGS = {
    "optim": {"name": "sgd", "lr": 0.02, "ema_decay": 0.9},
    "data": {"batch_size": 16, "augment": AugmentConfig(flip=True, translate=1, crop=0.8)},
}
FLAGS = """
--epochs 1 --no-report --tracking.no-enabled --tracking.log-interval 1 --optim.name sgd --optim.lr 0.02
--optim.ema-decay 0.9
--data.batch-size 16 --data.augment.flip --data.augment.translate 1 --data.augment.crop 0.8
"""


def stop(process, output, after, number):
    """Send a signal once the run has made some steps, and return what the process said of it."""
    wait_until(lambda: len(steps_of(output)) >= after or process.poll() is not None)
    process.send_signal(number)
    status, _, errors = finish(process)
    assert status == 128 + number, errors
    assert "Traceback" not in errors
    return errors


def resume(sentence, folder):
    """Start the very command that the sentence says."""
    program, *words = shlex.split(sentence.rpartition("Go on with: ")[2])
    assert program == "gatewright"
    script = Path(sys.executable).with_name("gatewright")
    return start(*words, folder=folder, program=(script,) if script.exists() else ("-m", "gatewright"))


def test_stopped_by_sigterm_then_by_ctrl_c_and_resumed_as_told(tmp_path):
    output = tmp_path / "a run"
    process = start("train", "digits", "--output", "a run", *FLAGS.split(), folder=tmp_path)
    sentence = stop(process, output, 15, signal.SIGTERM)
    assert sentence.count("\n") == 1
    first = steps_of(output)[-1]
    assert f"Stopped in epoch 1 after {first} of its steps, and saved." in sentence
    assert load_checkpoint(newest_checkpoint(output / "checkpoints"))["position"]["step"] == first

    sentence = stop(resume(sentence, tmp_path), output, first + 15, signal.SIGINT)
    assert steps_of(output)[-1] > first

    status, printed, errors = finish(resume(sentence, tmp_path))
    assert (status, errors) == (0, "")
    assert "test accuracy" in printed
    assert "The run is in a run, without a report\n" in printed
    assert not list(output.glob("*.png"))
    assert steps_of(output) == list(range(1, len(steps_of(output)) + 1))  # each step made, and made once

    _, whole = train(digits_config(tmp_path / "whole", **SETTINGS))
    assert differences(final_state(output), final_state(whole)) == []
