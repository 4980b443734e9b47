import logging

import pytest

from gatewright.integrations.mlflow.store import artifact_location
from gatewright.train.tracking.base import TrackingConfig
from gatewright.train.tracking.tracked import start_tracking

pytest.importorskip("mlflow")


def test_the_default_is_a_quiet_sqlite_store_beside_the_runs(tmp_path, caplog, capfd):
    caplog.set_level(logging.INFO)
    (tmp_path / "all runs").mkdir()
    (tmp_path / "all runs" / "mlflow.db.partial").write_bytes(b"of a run that was killed while it made the store")
    trackers = []
    for name in ("one", "two"):
        tracker = start_tracking(TrackingConfig(), output=tmp_path / "all runs" / name, run_name=name)
        tracker.log_metrics({"loss": 1.0}, step=0)
        tracker.log_artifact(tmp_path / "all runs" / name / "metrics.jsonl", "files")
        tracker.close("FINISHED")
        trackers.append(tracker)

    from mlflow import MlflowClient

    store = tmp_path / "all runs"
    client = MlflowClient(tracking_uri=f"sqlite:///{store}/mlflow.db")
    runs = [client.get_run(tracker.run_id) for tracker in trackers]
    assert runs[0].info.experiment_id == runs[1].info.experiment_id
    assert [run.data.metrics for run in runs] == [{"loss": 1.0}] * 2
    assert len(list(store.glob("mlartifacts/*/artifacts/files/metrics.jsonl"))) == 2
    assert f"--backend-store-uri 'sqlite:///{store}/mlflow.db'" in trackers[0].location
    assert not (store / "mlflow.db.partial").exists()
    assert caplog.text == ""
    assert capfd.readouterr().err == ""


def test_a_sqlite_store_of_ones_own_keeps_its_files_beside_it(tmp_path, monkeypatch):
    (tmp_path / "stores").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///../stores/my.db")
    tracker = start_tracking(TrackingConfig(), output=tmp_path / "runs" / "run", run_name="run")
    tracker.log_artifact(tmp_path / "runs" / "run" / "metrics.jsonl")
    tracker.close("FINISHED")
    assert len(list(tmp_path.glob("stores/mlartifacts/*/artifacts/metrics.jsonl"))) == 1
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize(
    ("uri", "location"),
    [
        ("sqlite+pysqlite:////a/b/my.db?timeout=5", "/a/b/mlartifacts"),
        ("sqlite:///:memory:", None),
        ("http://127.0.0.1:5000", None),
        ("./mlruns", None),
    ],
)
def test_only_a_sqlite_file_has_a_place_for_artifacts_beside_it(uri, location):
    assert artifact_location(uri) == location
