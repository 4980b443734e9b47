import contextlib
import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from gatewright.train.outbox import CAPACITY, Outbox
from gatewright.train.tracking import TrackingConfig, start_tracking

pytest.importorskip("mlflow")

# MLflow's own SQL models use an SQLAlchemy option that SQLAlchemy 2.1 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning")


def wait_until(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.05)


class Server:
    """A real `mlflow server` on loopback that can be killed and started again on the same port."""

    def __init__(self, folder):
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.uri = f"http://127.0.0.1:{probe.getsockname()[1]}"
        self.process = None

    def launch(self):
        arguments = {
            "--host": "127.0.0.1",
            "--port": self.uri.rpartition(":")[2],
            "--workers": "1",
            "--backend-store-uri": f"sqlite:///{self.folder}/mlflow.db",
            "--artifacts-destination": f"{self.folder}/artifacts",
        }
        flat = [word for pair in arguments.items() for word in pair]
        with (self.folder / "log.txt").open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *flat],
                cwd=self.folder,
                env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def start(self):
        if self.process is None:
            self.launch()
        wait_until(self.answers, seconds=120)

    def answers(self):
        assert self.process.poll() is None, (self.folder / "log.txt").read_text()
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=5) as response:
            return response.status == 200
        return False

    def signal(self, number):
        os.killpg(self.process.pid, number)

    def kill(self):
        if self.process is not None:
            self.signal(signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture(scope="session", autouse=True)
def the_server():
    """Starts while the first tests run, which need none."""
    # In memory where there is such a folder: creating the store waits five seconds for a slow disk.
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        server = Server(Path(folder))
        server.launch()
        yield server
        server.kill()


@pytest.fixture
def server(the_server):
    the_server.start()
    return the_server


@pytest.fixture
def client(server):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=server.uri)


@pytest.fixture(autouse=True)
def no_uri_from_outside(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def lines(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def seconds_of(call, *arguments):
    start = time.monotonic()
    call(*arguments)
    return time.monotonic() - start


def history(client, run_id, name):
    return [(point.step, point.value) for point in client.get_metric_history(run_id, name)]


def test_the_default_is_a_quiet_sqlite_store_beside_the_runs(tmp_path, caplog, capfd):
    caplog.set_level(logging.INFO)
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
    assert caplog.text == ""
    assert capfd.readouterr().err == ""


def test_a_run_is_readable_over_http(server, client, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"not really a picture")

    tracker = start_tracking(TrackingConfig(experiment="http"), output=tmp_path / "run", run_name="first")
    tracker.log_parameters({"model": {"num_experts": 4, "router": {"top_k": 1}}, "seed": 0})
    for step in range(5):
        tracker.log_metrics({"train/loss": 1.0 / (step + 1), "train/accuracy": step / 5}, step)
    tracker.log_artifact(picture, "pictures")
    tracker.close("FINISHED")

    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "first"
    assert run.data.params == {"model.num_experts": "4", "model.router.top_k": "1", "seed": "0"}
    assert run.data.tags["gatewright.version"]
    assert history(client, tracker.run_id, "train/loss") == [(step, 1.0 / (step + 1)) for step in range(5)]
    downloaded = client.download_artifacts(tracker.run_id, "pictures/picture.png", str(tmp_path))
    assert Path(downloaded).read_bytes() == b"not really a picture"
    assert client.get_experiment_by_name("http").experiment_id == run.info.experiment_id
    assert tracker.run_id in tracker.location
    assert server.uri in tracker.location


def test_limits_of_mlflow_are_kept(server, client, tmp_path):
    tracker = start_tracking(TrackingConfig(uri=server.uri), output=tmp_path, run_name="limits")
    tracker.log_parameters(
        {"many": {f"p{index}": index for index in range(250)}, "long": "x" * 7000, "odd(name)": None}
    )
    tracker.log_metrics({f"layer{index}/loss[mean]": float(index) for index in range(1500)}, step=0)
    tracker.close("FINISHED")

    data = client.get_run(tracker.run_id).data
    assert len(data.params) == 252
    assert data.params["long"] == "x" * 6000
    assert data.params["odd_name_"] == "None"
    assert len(data.metrics) == 1500
    assert data.metrics["layer1499/loss_mean_"] == 1499


def test_non_finite_metrics_arrive_and_stay_json(server, client, tmp_path):
    tracker = start_tracking(TrackingConfig(uri=server.uri), output=tmp_path, run_name="diverged")
    tracker.log_metrics({"nan": math.nan, "up": math.inf, "down": -math.inf, "fine": 1.0}, step=3)
    tracker.close("FAILED")

    metrics = client.get_run(tracker.run_id).data.metrics
    assert math.isnan(metrics["nan"])
    assert metrics["fine"] == 1.0
    assert metrics["up"] > 1e300
    assert metrics["down"] < -1e300
    (line,) = lines(tmp_path)
    assert {name: float(value) for name, value in line["values"].items() if name != "nan"} == {
        "up": math.inf,
        "down": -math.inf,
        "fine": 1.0,
    }
    assert math.isnan(float(line["values"]["nan"]))
    assert line["step"] == 3


def test_runs_that_start_together_share_a_new_experiment(server, client, tmp_path):
    config = TrackingConfig(uri=server.uri, experiment="together")
    barrier = threading.Barrier(3)
    trackers = []

    def start(index):
        barrier.wait()
        trackers.append(start_tracking(config, output=tmp_path / str(index), run_name=str(index)))

    threads = [threading.Thread(target=start, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, tracker in enumerate(trackers):
        tracker.log_metrics({"index": float(index)}, step=0)
    for tracker in trackers:
        tracker.close("FINISHED")

    runs = [client.get_run(tracker.run_id) for tracker in trackers]
    assert len({run.info.experiment_id for run in runs}) == 1
    assert [run.data.metrics["index"] for run in runs] == [0, 1, 2]


def test_a_resumed_run_goes_on_and_keeps_its_parameters(server, client, tmp_path, caplog):
    config = TrackingConfig(uri=server.uri)
    first = start_tracking(config, output=tmp_path, run_name="resumed")
    first.log_parameters({"epochs": 1, "seed": 0})
    first.log_metrics({"loss": 2.0}, step=1)
    first.close("KILLED")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "ti')  # as a killed process leaves it

    second = start_tracking(config, output=tmp_path, run_name="resumed", resume_id=first.run_id)
    second.log_parameters({"epochs": 2, "seed": 0, "new": True})
    second.log_metrics({"loss": 1.0}, step=2)
    second.close("FINISHED")

    run = client.get_run(first.run_id)
    assert second.run_id == first.run_id
    assert run.info.status == "FINISHED"
    assert run.data.params == {"epochs": "1", "seed": "0", "new": "True"}
    assert history(client, first.run_id, "loss") == [(1, 2.0), (2, 1.0)]
    written = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(written[index])["step"] for index in (0, 2)] == [1, 2]
    assert "refused some parameters" in caplog.text
    assert "1 parameters" in caplog.text


def test_an_unknown_run_is_replaced(server, tmp_path, caplog):
    tracker = start_tracking(TrackingConfig(uri=server.uri), output=tmp_path, run_name="replaced", resume_id="0" * 32)
    tracker.close("FINISHED")
    assert tracker.run_id != "0" * 32
    assert "going on in a new one" in caplog.text


def test_a_file_that_is_gone_does_not_hold_up_the_rest(server, client, tmp_path, caplog):
    tracker = start_tracking(TrackingConfig(uri=server.uri), output=tmp_path, run_name="gone")
    tracker.log_artifact(tmp_path / "missing.png")
    tracker.log_metrics({"loss": 1.0}, step=0)
    tracker.close("FINISHED")
    assert client.get_run(tracker.run_id).data.metrics == {"loss": 1.0}
    assert "Not delivered" in caplog.text
    assert "1 files" in caplog.text


def test_what_was_logged_while_the_server_was_away_arrives(server, tmp_path, caplog):
    tracker = start_tracking(TrackingConfig(uri=server.uri), output=tmp_path, run_name="outage")
    tracker.log_parameters({"seed": 0})
    tracker.log_metrics({"loss": 0.0}, step=0)
    server.kill()
    for step in range(1, 200):
        assert seconds_of(tracker.log_metrics, {"loss": float(step)}, step) < 0.5
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
    monkeypatch.setattr("gatewright.train.outbox.AWAY_SECONDS", 1.0)
    tracker = start_tracking(TrackingConfig(uri=server.uri), output=tmp_path, run_name="hang")
    server.signal(signal.SIGSTOP)
    try:
        assert seconds_of(tracker.log_metrics, {"loss": 1.0}, 0) < 0.5
        assert seconds_of(tracker.close, "FINISHED") < 15
    finally:
        server.signal(signal.SIGCONT)
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "1"
    assert "1 metrics, 1 end of run" in caplog.text


def test_a_server_that_never_comes_back_costs_seconds_and_is_told(server, tmp_path, caplog):
    tracker = start_tracking(TrackingConfig(uri=server.uri), output=tmp_path, run_name="killed")
    server.kill()
    for step in range(100):
        assert seconds_of(tracker.log_metrics, {"loss": float(step), "accuracy": 0.0}, step) < 0.5
    tracker.log_artifact(tmp_path / "metrics.jsonl")
    assert seconds_of(tracker.close, "FINISHED") < 15

    assert [line["values"]["loss"] for line in lines(tmp_path)] == [float(step) for step in range(100)]
    assert "Connection refused" in caplog.text
    assert "200 metrics" in caplog.text
    assert "1 files" in caplog.text
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ


def test_no_server_at_the_start_is_one_clear_error(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(
        ConnectionError, match=r"Connection refused.*MLFLOW_TRACKING_URI.*--tracking\.no-enabled"
    ) as error:
        start_tracking(TrackingConfig(uri=f"http://me:secret@{address}"), output=tmp_path, run_name="nobody")
    assert address in str(error.value)
    assert "secret" not in str(error.value)
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ


def test_without_mlflow_there_is_still_the_file(tmp_path):
    tracker = start_tracking(TrackingConfig(enabled=False), output=tmp_path / "run", run_name="alone")
    tracker.log_parameters({"seed": 0})
    tracker.log_metrics({"loss": 1.0}, step=7)
    tracker.log_artifact(tmp_path / "run" / "metrics.jsonl")
    tracker.close("FINISHED")
    assert tracker.run_id is None
    assert "metrics.jsonl" in tracker.location
    assert [(line["step"], line["values"]) for line in lines(tmp_path / "run")] == [(7, {"loss": 1.0})]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_interval_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"log_interval \(0\)"):
        TrackingConfig(log_interval=0)


def test_a_full_outbox_counts_what_it_drops():
    delivered = []
    gate = threading.Event()

    def send(kind, payloads):
        gate.wait()
        delivered.extend(payloads)

    outbox = Outbox(send, "nowhere")
    outbox.put("metrics", range(CAPACITY + 10))
    outbox.put("metrics", [0])
    gate.set()
    assert outbox.close() == {"metrics": 11}
    assert delivered == list(range(CAPACITY))


def test_files_that_fail_let_metrics_pass():
    delivered = []

    def send(kind, payloads):
        if kind == "files" and not delivered:
            raise PermissionError("read-only")
        delivered.extend(payloads)

    outbox = Outbox(send, "nowhere")
    outbox.put("files", ["a.png"])
    outbox.put("metrics", [1, 2])
    assert outbox.close() == {}
    assert delivered == [1, 2, "a.png"]


def test_a_refused_item_does_not_take_its_batch_along():
    from mlflow.exceptions import MlflowException

    delivered = []

    def send(kind, payloads):
        if 13 in payloads:
            raise MlflowException("unlucky", error_code=1000)
        delivered.extend(payloads)

    outbox = Outbox(send, "nowhere")
    outbox.put("metrics", range(50))
    assert outbox.close() == {"metrics": 1}
    assert delivered == [number for number in range(50) if number != 13]
