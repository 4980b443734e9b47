import json
import struct
import sys

import pytest
import torch

from gatewright.report import plot_class_by_expert, plot_confusion, plot_load_over_time, plot_training_curves
from gatewright.report.figure import DOTS_PER_INCH

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")


def check_picture(path, min_inches, max_inches):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert min_inches * DOTS_PER_INCH <= width <= max_inches * DOTS_PER_INCH
    assert min_inches * DOTS_PER_INCH <= height <= max_inches * DOTS_PER_INCH
    with Image.open(path) as image:
        image.load()
        assert all(low < high for low, high in image.convert("RGB").getextrema())
    assert [file.name for file in path.parent.iterdir() if file.name.startswith(".")] == []


@pytest.mark.parametrize("num_experts", [1, 4, 8, 9, 64])
def test_load_over_time(num_experts, tmp_path):
    loads = torch.rand(30, num_experts).softmax(1)
    path = plot_load_over_time(list(range(0, 600, 20)), loads, tmp_path / "load.png", "Load")
    check_picture(path, 4, 10)


def test_load_of_a_single_point(tmp_path):
    check_picture(plot_load_over_time([20], torch.tensor([[1.0, 0.0]]), tmp_path / "load.png", "Load"), 4, 10)


@pytest.mark.parametrize(("num_classes", "num_experts"), [(10, 1), (10, 8), (100, 64), (1, 2)])
def test_class_by_expert(num_classes, num_experts, tmp_path):
    counts = torch.randint(1, 100, (num_classes, num_experts))
    names = [f"class {index}" for index in range(num_classes)]
    check_picture(
        plot_class_by_expert(counts, counts.sum(1), names, tmp_path / "new" / "classes.png", "Classes"), 2, 20
    )


def test_a_dead_expert_and_a_class_without_images(tmp_path):
    counts = torch.tensor([[5, 0, 5], [0, 0, 0], [1, 0, 9]])
    check_picture(plot_class_by_expert(counts, counts.sum(1), ["a", "b", "c"], tmp_path / "classes.png", "Odd"), 2, 10)
    check_picture(
        plot_class_by_expert(counts * 0, 0 * counts.sum(1), ["a", "b", "c"], tmp_path / "empty.png", "Empty"), 2, 10
    )


def test_names_are_not_read_as_formulas(tmp_path):
    names = ["$50", "a_b$c^2$", r"\frac{", "<b>"]
    check_picture(plot_confusion(torch.eye(4, dtype=torch.long), names, tmp_path / "confusion.png"), 2, 10)
    counts = torch.ones(4, 2, dtype=torch.long)
    check_picture(plot_class_by_expert(counts, counts.sum(1), names, tmp_path / "classes.png", r"layer $x\bad{"), 2, 10)


@pytest.mark.parametrize("num_classes", [1, 10, 100])
def test_confusion(num_classes, tmp_path):
    matrix = torch.randint(0, 50, (num_classes, num_classes)) + 900 * torch.eye(num_classes, dtype=torch.long)
    names = [f"class {index}" for index in range(num_classes)]
    check_picture(plot_confusion(matrix, names, tmp_path / "confusion.png"), 2, 20)


def test_a_confusion_with_a_class_without_images(tmp_path):
    check_picture(plot_confusion(torch.tensor([[3, 1], [0, 0]]), ["a", "b"], tmp_path / "confusion.png"), 2, 10)


def write_lines(path, *points):
    path.write_text("".join(json.dumps({"step": s, "time": 0.0, "values": v}) + "\n" for s, v in points))
    return path


def test_training_curves(tmp_path):
    points = [(step, {"train/task_loss": 1 / step, "train/learning_rate": 0.1}) for step in range(1, 100)]
    metrics = write_lines(tmp_path / "metrics.jsonl", *points, (99, {"test/accuracy": 0.9}))
    check_picture(plot_training_curves(metrics, tmp_path / "curves.png"), 4, 10)


def test_curves_of_a_run_that_logged_nothing_or_diverged(tmp_path):
    metrics = write_lines(tmp_path / "metrics.jsonl")
    check_picture(plot_training_curves(metrics, tmp_path / "none.png"), 4, 10)
    metrics = write_lines(tmp_path / "metrics.jsonl", (1, {"loss": "nan"}), (2, {"loss": "inf"}), (3, {"loss": 1.0}))
    check_picture(plot_training_curves(metrics, tmp_path / "nan.png"), 4, 10)


@pytest.mark.parametrize("name", ["猫", "சிங்கம்", "قطة", "🐈"])
def test_names_in_other_scripts_leave_no_empty_boxes(name, tmp_path):
    """matplotlib warns of a character that no font has, and warnings are errors here."""
    names = ["cat", name]
    check_picture(plot_confusion(torch.eye(2, dtype=torch.long), names, tmp_path / "confusion.png"), 2, 10)
    counts = torch.ones(2, 2, dtype=torch.long)
    check_picture(plot_class_by_expert(counts, counts.sum(1), names, tmp_path / "classes.png", "Classes"), 2, 10)


def test_pyplot_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    plot_load_over_time([20, 40], torch.rand(2, 4), tmp_path / "load.png", "Load")
    assert "matplotlib.pyplot" not in sys.modules
