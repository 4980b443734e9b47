import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from gatewright.train import train
from gatewright.train.tracking.base import TrackingConfig
from gatewright.train.tracking.tracked import start_tracking
from tests.integrations.mlflow.server import history
from tests.train.runs import FIVE_STEPS, digits_config, logged

pytest.importorskip("mlflow")


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


def test_a_run_shows_its_metrics_its_data_and_its_source(server, client, tmp_path):
    """MLflow 3 opens an empty page about language models where the link does not name the view."""
    config = replace(digits_config(tmp_path / "run", data=FIVE_STEPS, seed=3), tracking=TrackingConfig(uri=server.uri))
    result, output = train(config)
    (link,) = (word for word in result["tracking"].split() if word.startswith("http"))
    assert link.startswith(f"{server.uri}/#/experiments/")
    page, _, query = link.partition("?")
    assert page.endswith("/model-metrics")
    assert query == "workflowType=machine_learning"
    run = client.get_run(page.split("/")[-2])
    assert run.info.run_name == "digits-seed3"
    assert run.data.tags["mlflow.source.name"]
    assert run.data.tags["mlflow.source.type"] == "LOCAL"
    assert run.data.tags["gatewright.output"] == str(output)
    seen = {given.tags[0].value: given.dataset for given in run.inputs.dataset_inputs}
    rows = {context: json.loads(data_set.profile)["num_rows"] for context, data_set in seen.items()}
    assert rows == {"training": 1294, "validation": 144, "test": 359}
    assert {data_set.name for data_set in seen.values()} == {"digits"}
    assert len({data_set.digest for data_set in seen.values()}) == 3


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
    (line,) = logged(tmp_path)
    assert {name: float(value) for name, value in line["values"].items() if name != "nan"} == {
        "up": math.inf,
        "down": -math.inf,
        "fine": 1.0,
    }
    assert math.isnan(float(line["values"]["nan"]))
    assert line["step"] == 3


def test_an_unknown_run_is_replaced(server, tmp_path, caplog):
    tracker = start_tracking(TrackingConfig(uri=server.uri), output=tmp_path, run_name="replaced", resume_id="0" * 32)
    tracker.close("FINISHED")
    assert tracker.run_id != "0" * 32
    assert "going on in a new one" in caplog.text
