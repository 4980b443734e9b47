"""The article's claim, measured: what sparse experts save in memory and in bytes to synchronise.

    python -m studies.article_claim FOLDER_OF_PARQUET_FILES

40 experts, each the article's own residual network of 13.1 million parameters, on 4 processes of this machine, a few
steps of plain SGD on the same 640 images: once with every expert on every process, whose gradients DDP adds up, and
once with ten experts on each. Beside what the run counts itself stand the bytes that crossed the loopback device, as
Linux counts them, and each process's resident memory: 17 GB in all for the first. What a whole epoch with ten on each
makes of it, by which commands, is in docs/article.md.
"""

import json
import os
import sys
import tempfile
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.multiprocessing.spawn import spawn

from gatewright.data import DataConfig, load_images, training_batches
from gatewright.recipes import RECIPES
from gatewright.train import OptimConfig, RunConfig
from gatewright.train.build import build_engine
from gatewright.train.config import ParallelConfig
from gatewright.train.launch.join import join_processes
from gatewright.train.pace import Pace

PROCESSES, BATCH, STEPS, PORT = 4, 640, 4, "29551"


def claim_config(folder: str, ep_size: int) -> RunConfig:
    """The run of the article's script: top-1 over 40 whole networks."""
    recipe = RECIPES["cifar10-resnets-article"]()
    model = replace(
        recipe.model,
        num_experts=40,
        top_k=1,
        router="biased",
        router_options={"normalize": False, "bias_rate": 0.003},
        losses=None,
        upcycle_epoch=0,
    )
    return replace(
        recipe,
        model=model,
        data=DataConfig(name="cifar10", path=folder, batch_size=BATCH, augment=recipe.data.augment),
        optim=OptimConfig(name="sgd", lr=0.01, momentum=0.0),
        parallel=ParallelConfig(ep_size=ep_size),
        device="cpu",
    )


def measure(rank: int, folder: str, ep_size: int, results: str) -> None:
    """Make a few steps on one process and write what they took."""
    torch.set_num_threads(1)
    places = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": PROCESSES,
        "MASTER_PORT": PORT,
        "MASTER_ADDR": "localhost",
    }
    os.environ.update({name: str(value) for name, value in places.items()})
    config = claim_config(folder, ep_size)
    with join_processes(config) as strategy:
        torch.manual_seed(0)
        splits = load_images(config.data)
        engine = build_engine(config, splits, torch.device("cpu"), strategy)
        pace = Pace(engine.model, strategy)
        batches = training_batches(splits.train, config.data, seed=0, epoch=0, start=0)
        losses, crossed = [], []
        for batch in islice(batches, STEPS):
            strategy.barrier()
            before = loopback_bytes()
            with pace.step():
                losses.append(float(engine.step([batch]).task_loss))
            strategy.barrier()
            crossed.append(loopback_bytes() - before)
        spent = pace.summary(engine.device)[rank]
        found = {"rank": rank, "losses": losses, "loopback_bytes": median(crossed), "resident": resident(), **spent}
        Path(results, f"{rank}.json").write_text(json.dumps(found))


def loopback_bytes() -> int:
    """Return what Linux has sent over the loopback device so far."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[8])
    raise OSError("There is no loopback device in /proc/net/dev.")


def resident() -> int:
    """Return the bytes of this process's own that are in memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise OSError("There is no VmRSS in /proc/self/status.")


def run(folder: str, ep_size: int) -> list[dict[str, Any]]:
    """Measure on all processes."""
    with tempfile.TemporaryDirectory() as results:
        spawn(measure, (folder, ep_size, results), PROCESSES)
        return [json.loads(Path(results, f"{rank}.json").read_text()) for rank in range(PROCESSES)]


def main() -> None:
    """Print both rows of the table."""
    folder = sys.argv[1]
    print("| experts each | gradients summed | rows sent, most | over loopback | memory each, most | step |")
    print("| --- | --- | --- | --- | --- | --- |")
    for ep_size in (4, 1):
        found = run(folder, ep_size)
        print(json.dumps(found), file=sys.stderr)
        sent = max(each["all_to_all_bytes"] for each in found)
        print(
            f"| {40 // ep_size} | {found[0]['reduced_bytes'] / 1e6:,.2f} MB | {sent / 1e6:.2f} MB "
            f"| {found[0]['loopback_bytes'] / 1e6:,.1f} MB "
            f"| {max(each['resident'] for each in found) / 1e9:.2f} GB "
            f"(peak {max(each['peak_memory_bytes'] for each in found) / 1e9:.2f}) "
            f"| {median(each['step_seconds'] for each in found):.1f} s |",
            flush=True,
        )


if __name__ == "__main__":
    main()
