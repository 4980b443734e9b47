import json
import math

import pytest

from gatewright.report.curves import draw_panel, load_curves, read_metrics, smooth
from gatewright.report.figure import new_figure

pytest.importorskip("matplotlib")


def drawn(draw, *arguments):
    axes = new_figure(4, 3).add_subplot()
    draw(axes, *arguments)
    return axes


def test_a_resumed_run_is_read_once(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    lines = ({"step": step, "time": 0.0, "values": {"loss": loss}} for step, loss in ((1, 3.0), (2, 2.0)))
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with metrics.open("a") as file:
        file.write('{"step": 3, "va\n' + json.dumps({"step": 2, "time": 0.0, "values": {"loss": 1.5}}) + "\n")
    assert read_metrics(metrics) == {"loss": {1: 3.0, 2: 1.5}}


def test_a_smoothed_line_is_steadier_and_goes_where_the_raw_one_goes():
    noisy = [1 + (-1) ** step * 0.5 for step in range(200)]
    assert max(smooth(noisy)[20:]) - min(smooth(noisy)[20:]) < 0.3
    assert sum(smooth(noisy)[100:]) / 100 == pytest.approx(1, abs=0.01)
    assert smooth([3.0]) == [3.0]
    assert smooth([2.0, math.inf, math.nan, 2.0]) == pytest.approx([2.0] * 4)
    assert math.isnan(smooth([math.nan])[0])


def test_losses_of_training_and_of_held_out_images_share_a_panel():
    training = {step: 2.0 + (-1) ** step for step in range(20)}
    curves = {"train/task_loss": training, "holdout/loss": {9: 1.5, 19: 1.0}, "train/layers/moe/load_loss": {0: 9.0}}
    axes = drawn(draw_panel, "loss", curves)
    raw, smoothed, held_out = axes.get_lines()
    assert list(raw.get_ydata()) == list(training.values())
    assert list(smoothed.get_ydata()) == smooth(list(training.values()))
    assert raw.get_color() == smoothed.get_color() != held_out.get_color()
    assert axes.get_legend_handles_labels()[1] == ["training", "held out"]


def test_steps_are_whole_where_there_are_few():
    axes = drawn(draw_panel, "loss", {"train/task_loss": {20: 2.0}})
    assert all(float(tick).is_integer() for tick in axes.get_xticks())


def test_the_load_in_training_is_not_that_of_other_images():
    curves = {
        f"{split}/layers/moe/load/{index:02d}": {5: share}
        for split, share in (("train", 0.5), ("test", 1.0))
        for index in range(11)
    }
    steps, loads = load_curves(curves, "moe")
    assert (steps, loads.tolist()) == ([5], [[0.5] * 11])
    assert load_curves(curves, "other") is None
