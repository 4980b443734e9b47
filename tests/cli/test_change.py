"""Other experts in a finished run: what the commands print, write and refuse."""

import json

from torch.testing import assert_close

from gatewright.data import load_images
from gatewright.train import load_run, train
from tests.train.runs import FIVE_STEPS, digits_config


def test_a_pruned_run_is_a_run_of_its_own(gatewright, trained, tmp_path):
    """It is evaluated, asked and exported; it gets its report where it ends, at once or after another epoch."""
    files = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    status, printed, errors = gatewright(
        "prune", trained, "--num-experts", 2, "--by", "load", "--output", "new", "--test"
    )
    assert (status, errors) == (0, "")
    removed = [
        int(expert)
        for expert in printed.splitlines()[0]
        .removeprefix("network.mixture: left out ")
        .removesuffix(" by load")
        .split(", ")
    ]
    loads = json.loads((trained / "result.json").read_text())["layers"]["network.mixture"]["tokens_per_expert"]
    assert len(removed) == 2
    assert sum(loads[expert] for expert in removed) < sum(loads) / 2
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line.startswith("│")]
    figures = {name: values for name, *values in cells}
    assert list(figures) == ["held-out accuracy", "test accuracy", "parameters", "seconds of the operation"]
    assert (
        gatewright("evaluate", trained)[1].splitlines()[-1].startswith(f"test accuracy {figures['test accuracy'][0]} ")
    )
    assert gatewright("evaluate", "new")[1].splitlines()[-1].startswith(f"test accuracy {figures['test accuracy'][1]} ")
    assert figures["parameters"] == ["80,776", "45,236"]
    assert "network.mixture experts 0 " in gatewright("predict", "new", trained / "examples" / "0.png")[1]
    assert gatewright("export", "new", "new.safetensors")[0] == 0
    status, _, errors = gatewright("report", "new")
    assert (status, errors.strip().endswith("train digits --output new --resume")) == (2, True)
    status, printed, errors = gatewright("train", "digits", "--output", "new", "--resume", "--epochs", 3, "--no-report")
    assert (status, errors.startswith("resumed: epochs was 2")) == (0, True)
    assert "\nThe run is in new, without a report\n" in printed
    assert not [*(tmp_path / "new").glob("*.png"), *(tmp_path / "new").glob("report.html")]
    assert gatewright("report", "new")[0] == 0
    assert (
        f"Prune of {trained}: network.mixture: left out "
        in json.loads((tmp_path / "new" / "result.json").read_text())["resumed_with"][0]
    )
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == files


def test_a_run_is_merged_grown_and_made_dense(gatewright, trained):
    for name, flags in (("merge", ["--num-experts", 3]), ("grow", ["--num-experts", 8, "--top-k", 4]), ("densify", [])):
        status, printed, errors = gatewright(name, trained, *flags, "--output", name)
        assert (status, errors) == (0, "")
        assert "held-out accuracy" in printed
        assert f"The new run is in {name}.\n" in printed
    before, (merged, grown, dense) = load_run(trained), map(load_run, ("merge", "grow", "densify"))
    images = load_images(before.config.data).test.images[:50] / 255
    assert_close(grown.model(images), before.model(images))
    assert merged.model.network.mixture.router.num_experts == 3
    assert dense.config.model.num_experts == 1
    assert dense.model(images).shape == (50, 10)


def test_what_cannot_be_changed_is_refused_and_leaves_nothing_behind(gatewright, trained, tmp_path):
    _, dense = train(digits_config(tmp_path / "dense", recipe="digits-dense", data=FIVE_STEPS))
    _, soft = train(digits_config(tmp_path / "soft", data=FIVE_STEPS, model={"router": "soft", "losses": None}))
    _, whole = train(digits_config(tmp_path / "whole", data={**FIVE_STEPS, "holdout": 0.0}))
    there = sorted(path.name for path in tmp_path.iterdir())
    for words, sentence in (
        (("prune", trained, "--num-experts", 9), "at most all; got 9 to keep of 4"),
        (("prune", trained, "--num-experts", 1), "got top_k=2 and 1 experts"),
        (("prune", trained, "--keep", 0, 0), "different indices from 0 to 3; got [0, 0]"),
        (("prune", trained), "Either --num-experts says how many experts to keep, or --keep which ones"),
        (("merge", trained, "--num-experts", 9), "Call grow for more"),
        (("grow", trained, "--num-experts", 2), "grows to at least the experts that it has"),
        (("densify", dense), "This model has no mixture"),
        (("prune", soft, "--keep", 0, 1), "is a SoftMoE"),
        (("densify", whole), "and this run has none. Measure it on the test set by --test."),
        (("densify", trained, "--output", trained), "holds a run already, and a changed run has a folder of its own"),
        (("densify", "nowhere"), "No run at nowhere"),
        (("densify", trained, "--noise", 1), "There is no flag --noise"),
        (("prune", trained, "--keep", 0, 1, "--batches", 0), "--batches"),
    ):
        status, printed, errors = gatewright(*words)
        assert (status, printed, errors.count("\n")) == (2, "", 1), words
        assert sentence in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == there
