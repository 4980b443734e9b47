import json
import struct
import sys

import pytest
import torch

from gatewright.report import plot_class_by_expert, plot_confusion, plot_load_over_time, plot_training_curves
from gatewright.report.figure import DOTS_PER_INCH

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")


def check_picture(path, min_inches=2, max_inches=20):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert min_inches * DOTS_PER_INCH <= width <= max_inches * DOTS_PER_INCH
    assert min_inches * DOTS_PER_INCH <= height <= max_inches * DOTS_PER_INCH
    with Image.open(path) as image:
        image.load()
        assert all(low < high for low, high in image.convert("RGB").getextrema())
    assert [file.name for file in path.parent.iterdir() if file.name.startswith(".")] == []


@pytest.mark.parametrize(("points", "num_experts"), [(30, 1), (30, 9), (1, 2)])
def test_load_over_time_leaves_pyplot_alone(points, num_experts, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    loads = torch.rand(points, num_experts).softmax(1)
    path = plot_load_over_time(list(range(0, 20 * points, 20)), loads, tmp_path / "load.png", "Load")
    check_picture(path, 4, 10)
    assert "matplotlib.pyplot" not in sys.modules


@pytest.mark.parametrize("counts", [[[5, 0, 5], [0, 0, 0], [1, 0, 9]], [[0, 0]] * 3, [[1] * 64] * 100])
def test_class_by_expert(counts, tmp_path):
    """With a dead expert and a class without images; with none at all; with many."""
    counts = torch.tensor(counts)
    names = [f"class {index}" for index in range(len(counts))]
    check_picture(plot_class_by_expert(counts, counts.sum(1), names, tmp_path / "new" / "classes.png", "Classes"))


@pytest.mark.parametrize("names", [["$50", "a_b$c^2$", r"\frac{", "<b>"], ["猫", "சிங்கம்", "قطة", "🐈"]])
def test_names_are_no_formulas_and_leave_no_empty_boxes(names, tmp_path):
    """matplotlib warns of a character that no font has, and warnings are errors here."""
    check_picture(plot_confusion(torch.eye(4, dtype=torch.long), names, tmp_path / "confusion.png"), 2, 10)
    counts = torch.ones(4, 2, dtype=torch.long)
    check_picture(plot_class_by_expert(counts, counts.sum(1), names, tmp_path / "classes.png", r"layer $x\bad{"), 2, 10)


def test_training_curves_also_of_a_run_that_logged_nothing_or_diverged(tmp_path):
    trained = [(step, {"train/task_loss": 1 / step, "train/learning_rate": 0.1}) for step in range(1, 100)]
    diverged = [(1, {"loss": "nan"}), (2, {"loss": "inf"}), (3, {"loss": 1.0})]
    for points in ([*trained, (99, {"test/accuracy": 0.9})], [], diverged):
        lines = (json.dumps({"step": step, "time": 0.0, "values": values}) + "\n" for step, values in points)
        (tmp_path / "metrics.jsonl").write_text("".join(lines))
        check_picture(plot_training_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png"), 4, 10)
