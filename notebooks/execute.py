"""Execute the notebooks from top to bottom: ``python notebooks/execute.py [NAME ...]``.

Each is written with its outputs to ``executed/``, and every line of an output that names a test accuracy is printed.
The exit status is 1 if a cell of any notebook failed.
"""

import os
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

HERE = Path(__file__).parent
NOTEBOOKS = ("cnn_with_a_mixture", "mixture_of_resnets", "parallel_networks")  # in the order of the article


def execute(name: str) -> bool:
    """Execute one notebook, keep its outputs whether it fails or not, and say what became of it."""
    print(f"{name}: started", flush=True)
    notebook = jupytext.read(HERE / f"{name}.py")
    start = time.monotonic()
    failure = ""
    try:
        NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(HERE)}}).execute()
    except (CellExecutionError, DeadKernelError) as error:
        failure = str(error)
    written = HERE / "executed" / f"{name}.ipynb"
    written.parent.mkdir(exist_ok=True)
    nbformat.write(notebook, written)
    print(f"{name}: {'FAILED' if failure else 'executed'} in {time.monotonic() - start:.0f} s, {written}", flush=True)
    print(failure or "\n".join(f"  {line.strip()}" for line in accuracies(notebook)), flush=True)
    return not failure


def accuracies(notebook: nbformat.NotebookNode) -> list[str]:
    """Return the printed lines that name a test accuracy."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.text for output in outputs if output.get("name") == "stdout")
    return [line for line in text.splitlines() if "test accuracy" in line]


def main(names: list[str]) -> int:
    """Execute the notebooks that are named, or all of them."""
    unknown = set(names).difference(NOTEBOOKS)
    if unknown:
        raise SystemExit(f"The notebooks are {', '.join(NOTEBOOKS)}; got {', '.join(sorted(unknown))}.")
    data = os.environ.get("GATEWRIGHT_CIFAR10")
    if data and Path(data).is_dir():
        os.environ["GATEWRIGHT_CIFAR10"] = str(Path(data).resolve())  # A notebook runs in its own folder.
    succeeded = [execute(name) for name in names or NOTEBOOKS]
    return 0 if all(succeeded) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
