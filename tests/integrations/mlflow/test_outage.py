"""A server that goes away, hangs or never was: training goes on, and what is missing is told."""

import logging
import os
import signal
import socket

import pytest

from gatewright.train.tracking.base import TrackingConfig
from gatewright.train.tracking.tracked import start_tracking
from tests.integrations.mlflow.server import history
from tests.train.runs import wait_until

pytest.importorskip("mlflow")


def test_what_was_logged_while_the_server_was_away_arrives(server, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("gatewright.train.tracking.retry_queue.AWAY_SECONDS", 120.0)
    tracker = start_tracking(TrackingConfig(uri=server.uri), output=tmp_path, run_name="outage")
    tracker.log_parameters({"seed": 0})
    tracker.log_metrics({"loss": 0.0}, step=0)
    server.kill()
    for step in range(1, 200):
        tracker.log_metrics({"loss": float(step)}, step)
    wait_until(lambda: "is tried again" in caplog.text)
    tracker.log_artifact(tmp_path / "metrics.jsonl")
    server.start()
    tracker.close("FINISHED")

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=server.uri)
    assert history(client, tracker.run_id, "loss") == [(step, float(step)) for step in range(200)]
    assert client.get_run(tracker.run_id).info.status == "FINISHED"
    assert client.get_run(tracker.run_id).data.params == {"seed": "0"}
    assert [file.path for file in client.list_artifacts(tracker.run_id)] == ["metrics.jsonl"]
    assert [record.levelno for record in caplog.records if record.name == "gatewright"] == [logging.WARNING]


def test_a_server_that_hangs_does_not_hold_the_run(server, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setattr("gatewright.train.tracking.retry_queue.AWAY_SECONDS", 1.0)
    tracker = start_tracking(TrackingConfig(uri=server.uri), output=tmp_path, run_name="hang")
    server.signal(signal.SIGSTOP)
    try:
        tracker.log_metrics({"loss": 1.0}, 0)
        tracker.close("FINISHED")  # returns, while the server still hangs
    finally:
        server.signal(signal.SIGCONT)
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "1"
    assert "1 metrics, 1 end of run" in caplog.text


def test_no_server_at_the_start_is_one_clear_error(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(
        ConnectionError, match=r"Connection refused.*MLFLOW_TRACKING_URI.*`tracking.enabled=False`"
    ) as error:
        start_tracking(TrackingConfig(uri=f"http://me:secret@{address}"), output=tmp_path, run_name="nobody")
    assert address in str(error.value)
    assert "secret" not in str(error.value)
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ
