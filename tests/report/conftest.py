import json

import pytest

CLASSES = ["cat", "<b>dog</b>", "[red]fox", "7"]


@pytest.fixture
def result():
    layer = {
        "tokens_per_expert": [150, 0, 50],
        "load_cv": 0.9,
        "max_over_mean_load": 2.25,
        "dropped_fraction": 0.0,
        "dead_experts": [1],
        "class_by_expert": [[100, 0, 0], [25, 0, 25], [25, 0, 25], [0, 0, 0]],
        "tokens_per_class": [100, 50, 50, 0],
        "layer": "MoE",
        "router": "NoisyTopK",
        "top_k": 1,
    }
    split = {"name": "pets", "source": "/data/pets", "digest": "0"}
    return {
        "recipe": "digits <script>",
        "seed": 3,
        "test_accuracy": 0.975,
        "test_accuracy_per_class": dict.fromkeys(CLASSES, 0.975),
        "train_seconds": 75.2,
        "epochs": 1,
        "command": "gatewright train digits --optim.lr 0.1",
        "finished": "2026-01-02T03:04:05+00:00",
        "data": [split | {"split": "training", "num_images": 1000}, split | {"split": "test", "num_images": 200}],
        "resumed_with": ["optim.lr was 0.2 until step <5>, and is 0.1 from there on."],
        "changes": {"optim.lr": {"run": 0.1, "recipe": 0.001}},
        "num_parameters": 1234567,
        "num_active_parameters": 345678,
        "active_flops_per_image": 2_500_000,
        "layers": {"net/moe & co": layer},
        "confusion": [[97, 1, 1, 1], [0, 49, 1, 0], [0, 0, 50, 0], [0, 0, 0, 0]],
        "versions": {"torch": "2.13.0"},
        "hardware": {"processor": "Some <CPU>", "cores": 2},
    }


@pytest.fixture
def run_folder(result, tmp_path):
    (tmp_path / "result.json").write_text(json.dumps(result))
    loads = {f"train/layers/net/moe & co/load/{index:02d}": share for index, share in enumerate((0.7, 0.0, 0.3))}
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(20, 200, 20):
            values = {"train/task_loss": 1 / step, "train/learning_rate": 0.1, "holdout/loss": 2 / step} | loads
            file.write(json.dumps({"step": step, "time": 0.0, "values": values}) + "\n")
    return tmp_path
