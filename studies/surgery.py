"""What the commands that change the experts of a finished run do: test accuracy before, right after, an epoch later.

    python -m studies.surgery FOLDER

The recipe digits, with eight experts of which two see each image, trains for 20 epochs. ``gatewright prune``,
``merge``, ``grow`` and ``densify`` make new runs of it, and ``gatewright train --resume`` trains each of them for one
more epoch, and the run itself at last. The figures go to
studies/results/surgery/digits.json.
"""

import argparse
import contextlib
import io
import json
import re
from pathlib import Path
from statistics import mean, stdev

import torch

from gatewright.cli.main import main as command
from gatewright.train.result import hardware, versions, write_json

RESULTS = Path(__file__).parent / "results" / "surgery" / "digits.json"
EPOCHS = 20
TRAIN = "train digits --model.num-experts 8 --tracking.no-enabled"
OPERATIONS = (
    "prune --keep 0 1 2 3",
    "prune --num-experts 4 --by load",
    "prune --num-experts 4",
    "merge --num-experts 4",
    "grow --num-experts 16 --top-k 4 --noise 0.01",
    "densify",
)
NUMBERS = {
    "right_after": r"test accuracy\W+[\d.]+%\W+([\d.]+)%",
    "parameters": r"parameters\W+[\d,]+\W+([\d,]+)",
    "seconds": r"seconds of the operation\W+([\d.]+)",
}
Figures = dict[str, float]


def gatewright(words: str) -> str:
    """Run one command, and return what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        if status := command(words.split()):
            raise SystemExit(f"gatewright {words} ended with status {status}.")
    return printed.getvalue()


def test_accuracy(run: Path) -> float:
    """Return the percentage of the test images that a run classifies right."""
    accuracy: float = json.loads((run / "result.json").read_text(encoding="utf-8"))["test_accuracy"]
    return 100 * accuracy


def one_more_epoch(run: Path) -> float:
    """Train a run for one more epoch, and return its test accuracy then."""
    gatewright(f"{TRAIN.partition(' --')[0]} --output {run} --resume --epochs {EPOCHS + 1}")
    return test_accuracy(run)


def changed(run: Path, operation: str, output: Path) -> Figures:
    """Change a run by a command, train the new run, and return what was measured."""
    name, _, flags = operation.partition(" ")
    printed = gatewright(f"{name} {run} --output {output} --test {flags}")
    found = {key: float(re.findall(pattern, printed)[0].replace(",", "")) for key, pattern in NUMBERS.items()}
    return found | {"later": one_more_epoch(output)}


def measured(folder: Path, seed: int) -> dict[str, Figures]:
    """Train one network, and try every operation on it."""
    run = folder / f"seed-{seed}"
    gatewright(f"{TRAIN} --epochs {EPOCHS} --seed {seed} --output {run}")
    before = test_accuracy(run)
    parameters = json.loads((run / "result.json").read_text(encoding="utf-8"))["num_parameters"]
    found = {each: changed(run, each, folder / f"seed-{seed}-{number}") for number, each in enumerate(OPERATIONS)}
    found["nothing"] = {"right_after": before, "parameters": parameters, "seconds": 0.0, "later": one_more_epoch(run)}
    return {name: {"before": before} | figures for name, figures in found.items()}


def main() -> None:
    """Run some seeds, keep their figures, and print a row for each operation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    runs: dict[int, dict[str, Figures]] = {}
    for seed in arguments.seeds:
        runs[seed] = measured(arguments.folder, seed)
        write_json({"runs": runs, "versions": versions(), "hardware": hardware(torch.device("cpu"))}, RESULTS)
    for name in ("nothing", *OPERATIONS):
        rows = [found[name] for found in runs.values()]
        columns = ([row[key] for row in rows] for key in ("before", "right_after", "later"))
        cells = [f"{mean(each):.2f} %" + (f" ± {stdev(each):.2f}" if len(each) > 1 else "") for each in columns]
        print(
            f"| {name} | {' | '.join(cells)} | {rows[0]['parameters']:,.0f} | {mean(r['seconds'] for r in rows):.3f} |"
        )


if __name__ == "__main__":
    main()
