"""The notebooks run from top to bottom, as `make notebooks` runs them, and a failure in one is not passed over."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.runs import environment

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


@pytest.fixture
def copy(tmp_path):
    """A copy of the notebooks without outputs, in a folder of its own."""
    if any(importlib.util.find_spec(name) is None for name in ("ipykernel", "jupytext", "nbclient")):
        pytest.skip("the notebooks need pip install 'gatewright[notebooks]'")
    return shutil.copytree(NOTEBOOKS, tmp_path / "notebooks", ignore=shutil.ignore_patterns("executed", "runs"))


def execute(copy, *names):
    """Execute notebooks for two epochs on the digits."""
    variables = environment(copy.parent, GATEWRIGHT_EPOCHS="2")
    variables.pop("GATEWRIGHT_CIFAR10", None)
    return subprocess.run([sys.executable, copy / "execute.py", *names], env=variables, capture_output=True, text=True)


def printed(copy, name):
    notebook = json.loads((copy / "executed" / f"{name}.ipynb").read_text())
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    return "".join("".join(output["text"]) for output in outputs if output.get("name") == "stdout")


@pytest.mark.slow
@pytest.mark.distributed
def test_the_notebooks_run_and_show_what_they_say(copy):
    done = execute(copy)
    assert done.returncode == 0, done.stdout + done.stderr
    cnn = printed(copy, "cnn_with_a_mixture")
    assert "RuntimeError: backward ran before this MoE layer's auxiliary loss was taken" in cnn
    dead = dict(re.findall(r"^(\w+): test accuracy .*; (\d) of 8 experts dead", cnn, re.MULTILINE))
    assert dead["mixture"] == "0"
    assert int(dead["article"]) >= 4
    right = dict(re.findall(r"^(\w+): (.*) sorted by class", cnn, re.MULTILINE))
    assert len(set(re.findall(r"[\d.]+%", right["mixture"]))) == 1  # the order of the test set changes nothing
    assert len(set(re.findall(r"[\d.]+%", right["article"]))) == 2
    assert "mixture of ResNets: test accuracy" in printed(copy, "mixture_of_resnets")
    forty = printed(copy, "parallel_networks")
    assert re.search(r"^error: .*ep[-_]size \(10\)", forty, re.MULTILINE)
    accuracies = re.findall(r"process(?:es)?: test accuracy ([\d.]+)%", forty)
    assert len(accuracies) == 2
    assert len(set(accuracies)) == 1
    assert float(accuracies[0]) > 60


def test_a_cell_that_fails_fails_the_command_and_is_kept(copy):
    (copy / "cnn_with_a_mixture.py").write_text("# %%\nprint('before')\n\n# %%\n1 / 0\n")
    done = execute(copy, "cnn_with_a_mixture")
    assert done.returncode == 1
    assert "cnn_with_a_mixture: FAILED" in done.stdout
    assert "ZeroDivisionError" in done.stdout
    assert "before" in (copy / "executed" / "cnn_with_a_mixture.ipynb").read_text()
