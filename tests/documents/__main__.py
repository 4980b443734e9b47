"""Run what the documents say, on a small budget and page beside page: ``python -m tests.documents [PAGE ...]``."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from tests.data.samples import write_class_folders, write_hub_folder
from tests.documents import fork
from tests.documents.examples import PAGES, ROOT, Example, examples
from tests.train.runs import environment

# What is not run, and why.
SKIPPED = {
    r"^make install": "it installs packages, and ran before this check",
    r"^make clean": "it removes the environment that this check runs in",
    r"^make (check|test|test-all|coverage|promises|notebooks|docs|docs-check)\b": "it is a check itself",
    r"^make bench\b": "it installs packages, and times what runs alone",
    r"^(\S+/)?pip install|^git clone|--data.name OWNER/NAME$": "it needs a network",
    r"--hostfile": "it needs a second machine",
    r"^sbatch": "it needs a Slurm cluster; tests/test_deploy.py runs the script",
    r"^az ": "it needs an Azure subscription",
    r"^gatewright study \w": "it trains for an hour or more; tests/cli/test_study.py runs a small one",
    r"--tracking.name wandb": "it needs wandb, which is large; tests/integrations/test_wandb.py logs to it",
    r"^(mlflow (ui|server)|tensorboard)": "it serves until it is stopped",
}
FRAGMENTS = {"docs/architecture.md": "lines out of a method"}
# What stands for something that a reader has, and what it is here. Two hosts become one.
PLACEHOLDERS = {
    "--data.name folder --data.path FOLDER": "--data.name folder --data.path pets",
    "/shared/forty": "runs/forty",
    "first-host:29400": "localhost:0",
    "--nnodes 2": "--nnodes 1",
}


def main(pages):
    """Run the examples of all pages, or of those named; return the exit status."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(min(4, os.cpu_count())) as pages_at_once:
        images = write_hub_folder(Path(folder) / "images", num_train=400, num_test=40, height=32, width=32)
        Image.new("RGB", (32, 32), "orange").save(images / "cat.png")
        found = {page: examples(page) for page in pages or PAGES}
        longest_first = sorted(filter(found.get, found), key=lambda page: len(found[page]), reverse=True)
        failed = pages_at_once.map(lambda page: failures(page, found[page], Path(folder), images), longest_first)
        failed = [example for of_page in failed for example in of_page]
    print(f"{len(failed)} failed", *(f"{example.page}:{example.line}" for example in failed))
    return 1 if failed else 0


def failures(page, found, folder, images):
    """Run the examples of a page one after another in a clone of its own; return those that failed."""
    clone = fresh_clone(folder / page.replace("/", "-"))
    return [example for example in [*runs_at_hand(page, found), *found] if not passes(example, clone, images)]


def runs_at_hand(page, found):
    """Return the trainings of runs that a page goes on with, or evaluates, and never makes."""
    made, needed = set(), []
    for text in (with_placeholders(example.text) for example in found if not example.python):
        runs = set(re.findall(r"runs/[\w-]+", text))
        makes = set() if "--resume" in text else set(re.findall(r"--output (runs/[\w-]+)", text))
        needed += sorted(runs - makes - made)
        made |= runs
    return [Example(page, 0, False, f"gatewright train cifar10-cnn --output {run}") for run in needed]


def passes(example, clone, images):
    """Run one example in a clone, or say why not; print what became of it, and its output where it failed."""
    command = example.text if example.python else on_a_small_budget(example.text, images)
    shown = f"{example.page}:{example.line}  {'its Python blocks' if example.python else command}"
    if reason := reason_to_skip(example):
        print(f"skipped           {shown}  ({reason})", flush=True)
        return True
    start, log = time.monotonic(), clone.with_suffix(".log")
    if example.python or fork.PLAIN.match(command):
        status = fork.run(command, example.python, clone, variables(clone), log)
    else:
        with log.open("wb") as file:
            run = subprocess.run(["bash", "-c", command], cwd=clone, env=variables(clone), stdout=file, stderr=file)
        status = run.returncode
    printed = "".join(f"\n    {line}" for line in log.read_text().splitlines()[-30:]) if status else ""
    print(f"exit {status:<3}  {time.monotonic() - start:6.1f} s  {shown}{printed}", flush=True)
    return status == 0


def reason_to_skip(example):
    """Say why an example is not run; empty where it is."""
    if example.python:
        return FRAGMENTS.get(example.page, "")
    return next((reason for pattern, reason in SKIPPED.items() if re.search(pattern, example.text)), "")


def with_placeholders(text):
    """Put what is here where a page has a placeholder."""
    for placeholder, here in PLACEHOLDERS.items():
        text = text.replace(placeholder, here)
    return text


def on_a_small_budget(text, images):
    """Give placeholders a value, and make a training one epoch of a few images, or two epochs if it is resumed."""
    text = re.sub(r"\bFOLDER\b", str(images), with_placeholders(text))
    if text.startswith("make "):
        return f"{text} --assume-old=.venv/.installed"
    words = shlex.split(text)
    return f"{text} {shlex.join(budget(words[words.index('train') + 1 :], images))}" if "train" in words else text


def budget(words, images):
    """Return flags that shorten a training; of two equal flags the last counts."""
    recipe, *flags = words
    epochs = "2" if "--resume" in flags else "1"
    data = ["--data.path", str(images)] if recipe.startswith("cifar10") and "--data.name" not in flags else []
    if recipe.startswith("python-lm"):
        text = [] if "--data.name" in flags else ["--data.name", "text", "--data.path", "docs"]
        small = ["--model.dim", "48", "--model.num-heads", "2"]
        return ["--epochs", epochs, "--data.epoch-batches", "2", *small, *text]
    large = recipe.startswith("cifar10-resnets") and "40" in flags
    experts = ["--model.num-experts", "4"] if large else []  # of up to 13 million parameters each
    return ["--epochs", epochs, "--model.upcycle-epoch", "0", *data, *experts]


def fresh_clone(folder):
    """Copy what git keeps of the working tree, and put beside it what a reader of the pages has at hand."""
    names = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    for name in subprocess.run(names, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")[:-1]:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(ROOT / ".venv")
    shutil.copy(folder / "deploy/article.json", folder / "settings.json")
    write_class_folders(folder / "pets", per_class=20)
    (folder / "setup.py").write_text('"""Do nothing."""\n\n\ndef main() -> None:\n    """Do nothing."""\n')
    for name in ("cat.png", "cat.jpg"):
        Image.new("RGB", (32, 32), "orange").save(folder / name)
    return folder


def variables(clone):
    """Return an environment in which the clone's package is found first, and DeepSpeed takes the CPU."""
    more = environment(clone)
    path = [str(clone / "src"), *filter(None, [more.get("PYTHONPATH")])]
    return more | {"PYTHONPATH": ":".join(path), "DS_ACCELERATOR": "cpu"}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
