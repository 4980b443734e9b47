"""Starting processes: settings are refused once, and before any of them."""

import pytest

from gatewright.train import launch, save_config, train
from gatewright.train.config import ParallelConfig
from gatewright.train.launch.elastic import how_to_go_on
from tests.train.runs import FIVE_STEPS, digits_config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel": ParallelConfig(ep_size=3)}, r"`parallel.ep_size` \(3\) divides the number of processes \(4\)"),
        ({"optim": {"accumulation_steps": 30}}, r"fewer than `optim.accumulation_steps` \(30\)"),
    ],
)
def test_whatever_each_process_would_refuse_is_refused_before_any_starts(tmp_path, changes, message):
    config = digits_config(**{"output": tmp_path / "run", "processes": 4, "data": FIVE_STEPS} | changes)
    with pytest.raises(ValueError, match=message):
        launch(config, [])
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_stopped_says_what_it_saved_and_what_to_type(tmp_path):
    config = digits_config(tmp_path / "run", data=FIVE_STEPS)
    assert how_to_go_on(config) == (
        "Stopped before training began, and nothing was saved. Give the same command again."
    )
    (tmp_path / "run").mkdir()
    save_config(config, tmp_path / "run" / "config.yaml")
    assert "Stopped, and nothing was saved yet. Go on with: " in how_to_go_on(config)
    train(config, resume=True)  # What it says to type begins again.
    said = how_to_go_on(config)
    assert "Stopped, and the newest checkpoint is step-00000006.safetensors. Go on with: " in said
    assert said.endswith(f"train digits --output {tmp_path / 'run'} --resume")
