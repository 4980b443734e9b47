import json

import pytest

from gatewright.report import Comparison, comparison_table, plot_comparison

pytest.importorskip("scipy")


def write_run(folder, *, seed=0, held_out, seconds, flops=10, figure="bits per byte", digest="0", **result):
    """A run of a step per evaluation, with 2 items per step."""
    folder.mkdir()
    metric = figure.replace(" ", "_")
    values = [
        {f"holdout/{metric}": value, "holdout/train_seconds": second}
        for value, second in zip(held_out, seconds, strict=True)
    ]
    values.append({f"test/{metric}": held_out[-1] + 0.5})
    lines = [{"step": min(step, len(held_out)), "time": 0.0, "values": each} for step, each in enumerate(values, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    content = {
        "recipe": "lm", "seed": seed, "item": "byte", "items_per_step": 2, "active_flops_per_byte": flops,
        "num_parameters": 5, "test_headline": [figure, "text"], "higher_is_better": figure == "accuracy",
        "hardware": {"processor": "A", "threads": 2},
        "data": [{"name": "text", "split": "held-out", "digest": digest}],
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(content | result))
    return folder


@pytest.fixture
def rows(tmp_path):
    """The second of two pairs is the first, 0.1 bits per byte worse."""
    groups = [[], []]
    for seed in (1, 0):
        worse = 0.1 * seed
        held_out = [4 + worse, 3 + worse, 1 + worse]
        groups[0].append(
            write_run(tmp_path / f"a{seed}", seed=seed, held_out=held_out, seconds=[20, 40, 60 + seed], flops=20)
        )
        groups[1].append(write_run(tmp_path / f"b{seed}", seed=seed, held_out=[3.5, 2 + worse], seconds=[10, 30]))
    return {row.name: row for row in Comparison.read(*groups).rows()}


def test_runs_are_paired_by_seed(rows):
    assert rows["test bits per byte"].values == pytest.approx([1.5, 1.6])
    assert rows["test bits per byte"].others == pytest.approx([2.5, 2.6])
    assert rows["held out, at the end"].difference.startswith("-1 ±")


def test_at_equal_operations_and_time_a_run_is_read_between_its_evaluations(rows):
    assert rows["held out, at equal seconds"].values == pytest.approx([3.5, 3.6])  # at 30 of 20 and 40
    assert rows["held out, at equal operations"].values == pytest.approx([4, 4.1])  # after one step of the same cost
    assert rows["operations per byte"].difference == "2 ± 0 times"


def test_time_to_equal_quality_is_that_of_the_first_evaluation_as_good(rows):
    assert rows["seconds to equal quality"].values == pytest.approx([50, 50.5])  # halfway from 3 to 1
    assert rows["seconds to equal quality"].others == [30, 30]
    assert rows["operations to equal quality"].values == pytest.approx([2.5 * 120] * 2)
    assert rows["operations to equal quality"].p_value is None  # which differ by the same in all pairs


def test_a_quality_that_is_never_reached_is_said(tmp_path):
    worse = write_run(tmp_path / "a", held_out=[0.5, 0.6], seconds=[1, 2], figure="accuracy")
    better = write_run(tmp_path / "b", held_out=[0.5, 0.7], seconds=[1, 2], figure="accuracy")
    rows = {row.name: row for row in Comparison.read([worse], [better]).rows()}
    assert rows["seconds to equal quality"].difference == "reached by 0 of 1 times"
    back = {row.name: row for row in Comparison.read([better], [worse]).rows()}
    assert back["seconds to equal quality"].values == pytest.approx([1.5])


def test_the_p_value_is_that_of_pairs(tmp_path):
    groups = [
        [
            write_run(tmp_path / f"{name}{seed}", seed=seed, held_out=[value], seconds=[1])
            for seed, value in enumerate(of)
        ]
        for name, of in (("a", (1.0, 2.1, 3.2)), ("b", (1.1, 2.4, 3.4)))
    ]
    row = Comparison.read(*groups).rows()[0]
    assert row.p_value == pytest.approx(0.0742, abs=1e-4)  # t = 0.2 / (0.1 / sqrt(3)) with 2 degrees of freedom


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"seed": 1}, r"pairs of one seed; got the seeds \[0\] and \[1\]"),
        ({"digest": "1"}, "the same data; got text held-out 0 and text held-out 1"),
        ({"figure": "accuracy"}, "the same figure; got accuracy and bits per byte"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(tmp_path, changed, sentence):
    one = write_run(tmp_path / "a", held_out=[1.0], seconds=[1])
    other = write_run(tmp_path / "b", held_out=[1.0], seconds=[1], **changed)
    with pytest.raises(ValueError, match=sentence):
        Comparison.read([one], [other])


def test_a_run_without_a_held_out_part_is_refused(run_folder):
    with pytest.raises(ValueError, match="does not say how good it was after which time"):
        Comparison.read([run_folder], [run_folder])
    with pytest.raises(FileNotFoundError, match="Finish it first"):
        Comparison.read([run_folder / "nothing"], [run_folder])


def test_table_and_picture(tmp_path):
    from rich.console import Console

    one = write_run(tmp_path / "a", held_out=[2.0, 1.0], seconds=[1, 2], changes={"model.top_k": {"run": 1}})
    other = write_run(tmp_path / "b", held_out=[2.0, 1.5], seconds=[1, 3], hardware={"processor": "B", "threads": 2})
    comparison = Comparison.read([one], [other])
    console = Console(width=200, record=True)
    console.print(comparison_table(comparison))
    printed = console.export_text()
    assert "lm model.top_k=1" in printed
    assert "0.5 times" in printed  # as good after 1.5 of 3 seconds
    assert comparison.notes() == [
        "The seconds cannot be compared, since the runs had different hardware: A, 2 threads; B, 2 threads."
    ]
    assert plot_comparison(comparison, tmp_path / "both.png").stat().st_size > 10_000
