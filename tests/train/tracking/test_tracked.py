import pytest

from gatewright.train.tracking.base import Tracker, TrackingConfig
from gatewright.train.tracking.tracked import start_tracking
from tests.train.runs import logged


def test_without_mlflow_there_is_still_the_file(tmp_path):
    tracker = start_tracking(TrackingConfig(enabled=False), output=tmp_path / "run", run_name="alone")
    tracker.log_parameters({"seed": 0})
    tracker.log_metrics({"loss": 1.0}, step=7)
    tracker.log_artifact(tmp_path / "run" / "metrics.jsonl")
    tracker.close("FINISHED")
    assert tracker.run_id is None
    assert "metrics.jsonl" in tracker.location
    assert [(line["step"], line["values"]) for line in logged(tmp_path / "run")] == [(7, {"loss": 1.0})]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


class Kept(Tracker):
    """A tracker of one's own, which keeps metrics alone."""

    run_id, location = "mine-1", "Nowhere else."

    def __init__(self):
        self.points = []

    def log_metrics(self, metrics, step):
        self.points.append((step, metrics))


def open_kept(config, *, output, run_name, resume_id):
    open_kept.asked = (config.uri, output.name, run_name, resume_id)
    open_kept.tracker = Kept()
    return open_kept.tracker


def test_a_tracker_of_ones_own_takes_one_function(tmp_path):
    config = TrackingConfig(name=f"{__name__}:open_kept", uri="here")
    tracker = start_tracking(config, output=tmp_path / "run", run_name="first", resume_id="mine-1")
    tracker.log_parameters({"seed": 0})
    tracker.log_metrics({"loss": 1}, step=7)
    tracker.close("FINISHED")
    assert open_kept.asked == ("here", "run", "first", "mine-1")
    assert open_kept.tracker.points == [(7, {"loss": 1.0})]
    assert (tracker.run_id, tracker.location) == ("mine-1", "Nowhere else.")
    assert [(line["step"], line["values"]) for line in logged(tmp_path / "run")] == [(7, {"loss": 1.0})]


def test_an_unknown_tracker_is_refused():
    with pytest.raises(ValueError, match=r"No tracker is called 'mlfow'; did you mean 'mlflow'?"):
        TrackingConfig(name="mlfow")
