"""Run a command of ``gatewright``, or a Python program, in a process of its own that has imported everything already.

One server imports the package and forks a process for each, as tests/ranks.py does: an import takes seconds, and there
are a hundred of them.
"""

import os
import re
import shlex
import sys
from multiprocessing import get_context

from gatewright_command import main

IMPORTED_ONCE = [
    "gatewright.cli.main",
    "gatewright.report",
    "matplotlib.pyplot",
    "mlflow",
    "transformers",
    "torch._dynamo",
]
PLAIN = re.compile(r"(\.venv/bin/)?gatewright [^|&;<>$`*]*$")
SERVER = get_context("forkserver")
SERVER.set_forkserver_preload(IMPORTED_ONCE)


def run(text, python, folder, variables, log):
    """Run Python, or a plain command of ``gatewright``, in a folder; return its status, and keep what it printed."""
    process = SERVER.Process(target=_run, args=(text, python, folder, variables, log))
    process.start()
    process.join()
    return process.exitcode


def _run(text, python, folder, variables, log):
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    if python:
        sys.argv = ["-c"]
        exec(compile(text, "page", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = shlex.split(text)
        sys.exit(main())
