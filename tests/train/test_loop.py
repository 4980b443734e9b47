import json
import math
from dataclasses import replace
from datetime import datetime

import pytest
import torch

from gatewright.data import load_images
from gatewright.train import Interrupted, TrackingConfig, TrainingDiverged, load_config, train
from tests.train.runs import FIVE_STEPS, differences, digits_config, final_state, logged, signal_at

RESULT = """
recipe seed test_accuracy test_accuracy_per_class train_seconds epochs resumed_with num_parameters num_active_parameters
active_flops_per_image layers versions hardware confusion processes tracking test_loss command finished data changes
item num_test_items class_names test_headline higher_is_better items_per_step
"""
LAYER = """
tokens_per_expert load_cv max_over_mean_load dropped_fraction dead_experts class_by_expert tokens_per_class layer router
top_k profiles alike confidence of
"""


def test_the_result_has_what_it_must(finished):
    _, output, result = finished
    assert json.loads((output / "result.json").read_text()) == result
    assert set(result) == set(RESULT.split())
    assert (result["recipe"], result["seed"], result["epochs"]) == ("digits", 0, 2)
    assert 0 < result["train_seconds"] < 120
    assert {"python", "torch", "gatewright"} <= set(result["versions"])
    assert result["hardware"]["device"] == "cpu"
    assert result["hardware"]["threads"] == 1
    (process,) = result["processes"]
    assert process["step_seconds"] > process["waiting_seconds"] == 0
    assert process["all_to_all_bytes"] == process["reduced_bytes"] == 0
    assert process["peak_memory_bytes"] > 2**20
    (layer,) = result["layers"].values()
    assert set(layer) == set(LAYER.split())


def test_the_figures_agree_with_each_other(finished):
    config, _, result = finished
    labels = load_images(config.data).test.labels
    confusion = torch.tensor(result["confusion"])
    assert result["test_accuracy"] > 0.8
    assert confusion.sum(1).tolist() == labels.bincount().tolist()
    assert result["test_accuracy"] == pytest.approx(float(confusion.trace() / confusion.sum()))
    per_class = confusion.diagonal() / confusion.sum(1)
    assert list(result["test_accuracy_per_class"]) == list("0123456789")
    assert list(result["test_accuracy_per_class"].values()) == pytest.approx(per_class.tolist())
    layer = result["layers"]["network.mixture"]
    tokens, seen = torch.tensor(layer["tokens_per_expert"]), torch.tensor(layer["class_by_expert"])
    assert tokens.sum() == 2 * len(labels)  # top-2, each image once
    assert seen.sum(0).tolist() == tokens.tolist()
    assert seen.sum(1).tolist() == (2 * labels.bincount()).tolist()
    assert layer["tokens_per_class"] == labels.bincount().tolist()
    assert layer["dead_experts"] == (tokens == 0).nonzero().flatten().tolist()
    assert layer["max_over_mean_load"] == pytest.approx(float(tokens.max() / tokens.float().mean()))
    assert layer["dropped_fraction"] == 0


def test_the_folder_holds_what_the_command_line_promises(finished):
    config, output, _ = finished
    names = {path.name for path in output.iterdir()}
    files = {"config.yaml", "result.json", "metrics.jsonl"}
    assert files | {"checkpoints", "examples"} <= names
    assert not [name for name in names if name.endswith(".partial")]
    assert [path.name for path in sorted((output / "checkpoints").iterdir())] == [
        "step-00000021.safetensors",
        "step-00000042.safetensors",
    ]
    assert load_config(output / "config.yaml") == config


def test_the_metrics_are_those_of_every_layer(finished):
    _, output, _ = finished
    steps = [line for line in logged(output) if "train/task_loss" in line["values"]]
    assert [line["step"] for line in steps] == sorted({*range(5, 43, 5), 21, 42})  # and the last of each epoch
    layer = "train/layers/network.mixture/"
    loads = {f"{layer}load/{index:02d}" for index in range(4)}
    names = {"load_cv", "max_over_mean_load", "drop_rate", "router_entropy", "dead_experts", "importance_loss"}
    names = {layer + name for name in names | {"load_loss"}} | loads
    train_names = {"task_loss", "aux_loss", "learning_rate", "gradient_norm", "images_per_second"}
    for line in steps:
        values = line["values"]
        assert set(values) == names | {f"train/{name}" for name in train_names}
        assert sum(values[name] for name in loads) == pytest.approx(1, abs=1e-5)
        assert 0 < values[f"{layer}router_entropy"] <= math.log(4) + 1e-6
        assert values["train/images_per_second"] > 0
    losses = [line["values"]["train/task_loss"] for line in steps]
    assert losses[-1] < losses[0]


def test_the_test_set_is_looked_at_once_and_at_the_end(finished):
    _, output, result = finished
    lines = [line["values"] for line in logged(output)]
    assert [sum(name in line for line in lines) for name in ("test/accuracy", "holdout/accuracy")] == [1, 2]
    assert lines[-1]["test/accuracy"] == result["test_accuracy"]
    assert lines[-1]["test/loss"] == result["test_loss"] < lines[-2]["holdout/loss"] + 1
    assert all("test" not in name for line in lines[:-1] for name in line)


def test_the_result_says_where_it_came_from(finished, tmp_path):
    config, _, result = finished
    assert {part["split"]: part["num_items"] for part in result["data"]} == {
        "training": 1294,
        "held-out": 144,
        "test": 359,
    }
    assert datetime.fromisoformat(result["finished"]).utcoffset().total_seconds() == 0
    assert (bool(result["command"]), result["changes"]) == (True, None)
    few = digits_config(tmp_path / "few", data=FIVE_STEPS)
    assert train(few, recipe=config)[0]["changes"]["data.batch_size"] == {"run": 256, "recipe": 64}


def test_the_same_seed_gives_the_same_weights_and_another_one_others(finished, tmp_path):
    config, output, result = finished
    again, again_output = train(replace(config, output=str(tmp_path / "same")))
    assert differences(final_state(again_output), final_state(output)) == []
    assert again["confusion"] == result["confusion"]
    other = train(replace(config, output=str(tmp_path / "other"), seed=1))[1]
    weights = [final_state(folder)["engine"]["model"] for folder in (output, other)]
    moved = set(differences(*weights))
    assert {f"/{name}" for name in weights[0] if "weight" in name} <= moved


def test_a_run_without_an_output_gets_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = replace(digits_config(tmp_path, data=FIVE_STEPS), output=None)
    _, output = train(config)
    name, _, moment = str(output).partition("-")
    assert name == "runs/digits"
    assert datetime.strptime(moment, "%Y%m%d-%H%M%S").year >= 2024
    assert (output / "result.json").is_file()


def test_without_images_held_out_nothing_is_evaluated_between_epochs(tmp_path, capsys):
    data = FIVE_STEPS | {"holdout": 0.0}
    _, output = train(digits_config(tmp_path / "run", checkpoint_every=5, data=data))
    assert len(list((output / "checkpoints").iterdir())) == 1  # of the last epoch, whatever checkpoint_every says
    assert "held-out accuracy" not in capsys.readouterr().out
    assert not any("holdout/accuracy" in line["values"] for line in logged(output))


# MLflow's own SQL models use an SQLAlchemy option that SQLAlchemy 2.1 deprecates.
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning")
def test_tracking_by_mlflow_knows_the_end_and_the_run_goes_on_under_its_name(tmp_path, caplog):
    mlflow = pytest.importorskip("mlflow")
    config = digits_config(tmp_path / "run", data=FIVE_STEPS, epochs=2)
    config = replace(config, tracking=TrackingConfig(log_interval=1))
    with signal_at(3), pytest.raises(Interrupted):
        train(config)
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("gatewright").experiment_id
    (stopped,) = client.search_runs([experiment])
    assert stopped.info.status == "KILLED"
    result, _ = train(replace(load_config(tmp_path / "run" / "config.yaml"), epochs=3), resume=True)
    (ended,) = client.search_runs([experiment])
    assert (ended.info.status, ended.info.run_id) == ("FINISHED", stopped.info.run_id)
    assert ended.data.params["optim.lr"] == "0.003"
    assert ended.data.params["optim.warmup_epochs"] == "1.0"  # The recipe says 1, and the run's folder 1.0.
    assert {name: value for name, value in ended.data.tags.items() if "resumed" in name} == {"resumed.epochs": "3"}
    assert caplog.text == ""
    assert ended.data.metrics["test/accuracy"] == pytest.approx(result["test_accuracy"])
    hot = replace(config, output=str(tmp_path / "hot"), optim=replace(config.optim, name="sgd", lr=1e30))
    with pytest.raises(TrainingDiverged):
        train(hot)
    assert sorted(run.info.status for run in client.search_runs([experiment])) == ["FAILED", "FINISHED"]
