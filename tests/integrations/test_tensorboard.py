from dataclasses import replace

import numpy as np
import pytest

from gatewright.report import write_all
from gatewright.train import TrackingConfig, train
from tests.train.runs import FIVE_STEPS, digits_config, logged

pytest.importorskip("tensorboard", reason="tensorboard is missing: pip install 'gatewright[tensorboard]'")


def test_the_event_files_of_a_resumed_run_hold_its_curves_its_settings_and_its_pictures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracking = TrackingConfig(name="tensorboard", uri=str(tmp_path / "logs"), log_interval=1)
    config = replace(digits_config(tmp_path / "run", data=FIVE_STEPS), tracking=tracking)
    train(config, report=write_all)
    result, output = train(replace(config, epochs=2), resume=True, report=write_all)

    assert result["tracking"] == f"TensorBoard: run tensorboard --logdir {tmp_path}/logs/run"
    events = EventAccumulator(str(tmp_path / "logs/run")).Reload()
    points = {}
    for line in logged(output):
        for name, value in line["values"].items():
            points.setdefault(name, []).append((line["step"], np.float32(value)))
    assert set(events.Tags()["scalars"]) == set(points)
    for name, expected in points.items():
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in found] == [step for step, _ in expected], name
        assert [value for _, value in found] == [pytest.approx(value, nan_ok=True) for _, value in expected], name
    assert events.Tags()["images"] == ["curves", "confusion", "load-network.mixture", "classes-network.mixture"]
    texts = {name: events.Tensors(name)[-1].tensor_proto.string_val[0].decode() for name in events.Tags()["tensors"]}
    assert '"num_experts": 4' in texts["settings/text_summary"]
    assert texts["status/text_summary"] == "FINISHED"
