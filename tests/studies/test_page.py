"""The page of a study says what its kept runs say, and nothing else."""

import json

import pytest

from gatewright.studies import Arm, Study, Tier
from gatewright.studies.page import write_page

pytest.importorskip("scipy")
STUDY = Study(
    name="width",
    question="Does it pay?",
    twin="dense",
    arms=(Arm("dense", "one expert", "lm"), Arm("mixture", "two experts", "lm", "--more")),
    tiers={"cpu": Tier(about="an hour"), "gpu": Tier(about="a minute")},
)


def keep(folder, arm, seed, test, held_out, seconds, *, load=(), jobs=1, flops=10):
    """Two evaluations, after one step of 2 bytes each."""
    curves = {
        "holdout/bits_per_byte": {"1": held_out[0], "2": held_out[1]},
        "holdout/train_seconds": {"1": seconds / 2, "2": seconds},
        "test/bits_per_byte": {"2": test},
    }
    layers = {
        f"blocks.{place}": {
            "max_over_mean_load": each,
            "load_cv": each / 10,
            "dropped_fraction": 0.25,
            "dead_experts": [1],
        }
        for place, each in enumerate(load)
    }
    content = {
        "recipe": "lm", "seed": seed, "item": "byte", "items_per_step": 2, "active_flops_per_byte": flops,
        "num_parameters": 5000, "test_headline": ["bits per byte", "1"], "higher_is_better": False,
        "train_seconds": seconds, "hardware": {"processor": "A", "cores": 2, "threads": 1}, "layers": layers,
        "processes": [{"step_seconds": seconds / 2}], "versions": {"torch": "2", "python": "3"}, "commit": "abc",
        "data": [{"name": "text", "split": "held-out", "digest": "0"}], "command": f"gatewright train lm --seed {seed}",
        "study": {"name": "width", "tier": "cpu", "arm": arm, "jobs": jobs}, "curves": curves,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{arm}-{seed}.json").write_text(json.dumps(content))


def rows(page, column):
    """The cells of each arm's rows, by the heading of a column of their table."""
    found, heading = {}, []
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            heading = []
        elif not heading:
            heading = cells
        elif column in heading and "---" not in cells:
            found[cells[0].strip("`")] = cells[heading.index(column)]
    return found


def test_figures_are_those_of_the_kept_runs(tmp_path):
    folder = tmp_path / "width" / "cpu"
    for seed, (dense, mixture) in enumerate([(2.0, 1.9), (2.2, 2.0), (2.4, 2.1)]):
        keep(folder, "dense", seed, dense, (3.0, 2.0), 10)
        keep(folder, "mixture", seed, mixture, (2.5, 1.5), 20, load=(1.5 + seed, 1.0))
    page = write_page(STUDY, tmp_path, tmp_path / "pages").read_text()
    assert page.startswith("# width\n\nDoes it pay?\n\n## cpu: an hour\n")  # no answer, and no tier without results
    assert rows(page, "test bits per byte") == {"dense": "2.2 ± 0.2", "mixture": "2 ± 0.1"}
    # Differences of -0.1, -0.2 and -0.3: t = -0.2 / (0.1 / sqrt(3)) with 2 degrees of freedom.
    # Shares are 1.9 / 2 = 0.95, 2 / 2.2 and 2.1 / 2.4 = 0.875.
    assert rows(page, "to dense") == {"dense": "", "mixture": "-0.2 ± 0.1 (-8.86 %)"}
    assert rows(page, "p")["mixture"] == "0.074"
    assert rows(page, "to dense, at equal operations")["mixture"] == "-0.5 ± 0 (-25.00 %)"
    assert rows(page, "to dense, at equal seconds")["mixture"] == "+0.5 ± 0 (+25.00 %)"  # 2.5 after 10 s
    assert rows(page, "seconds to its quality")["mixture"] == "1.5 ± 0 times"  # halfway from 2.5 to 1.5: after 15 s
    assert rows(page, "busiest over mean load, by layer") == {"dense": "", "mixture": "2.50, 1.00"}
    assert rows(page, "dead experts")["mixture"] == "2, 2, 2"
    assert rows(page, "dropped")["mixture"] == "25.0%"
    assert rows(page, "parameters") == {"dense": "5,000", "mixture": "5,000"}
    assert rows(page, "seconds per step")["mixture"] == "10 ± 0"
    assert rows(page, "the command of its first run")["dense"] == "`gatewright train lm --seed 0`"
    assert "6 runs with the seeds 0, 1, 2, on 2 cores of A, 1 thread; with torch 2, Python 3; 1 min 30 s" in page
    assert "commit abc." in page
    assert (tmp_path / "pages" / "width-cpu.png").stat().st_size > 10_000
    index = (tmp_path / "pages" / "README.md").read_text()
    assert "## [width](width.md)\n\nDoes it pay?\n" in index


def test_pairs_are_of_common_seeds_and_seconds_of_runs_side_by_side_are_left_out(tmp_path):
    folder = tmp_path / "width" / "cpu"
    for seed in (0, 1):
        keep(folder, "dense", seed, 2.0 + seed, (3.0, 2.0), 10, jobs=2)
    keep(folder, "mixture", 1, 2.5, (2.5, 1.5), 20)
    keep(folder, "forgotten", 0, 2.5, (2.5, 1.5), 20)  # an arm that the study has no more
    page = write_page(STUDY, tmp_path, tmp_path / "pages").read_text()
    assert rows(page, "n") == {"dense": "2", "mixture": "1"}
    assert rows(page, "to dense")["mixture"] == "-0.5 (-16.67 %)"
    assert rows(page, "p")["mixture"] == ""
    assert "equal seconds" not in page
    assert "up to 2 runs at once, so seconds are not compared" in page
    assert "forgotten" not in page
    with pytest.raises(FileNotFoundError, match="No run of width is kept"):
        write_page(STUDY, tmp_path / "nothing", tmp_path / "pages")
