"""Processes beside the tests' own: they never saw its import hook, and stay for the whole session."""

from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from multiprocessing import get_context

import torch
import torch.distributed as dist

TIMEOUT = 120
IMPORTED_ONCE = ["gatewright.train", "torch._dynamo", "torch.distributed.fsdp", "torch.testing"]


def processes(number, **options):
    """Start processes that have torch and the package at once: one server imports them, and forks the others."""
    context = get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_ONCE)
    return ProcessPoolExecutor(number, mp_context=context, **options)


def join(rank, world, store):
    """Become a rank of a gloo group."""
    torch.set_num_threads(1)
    timeout = timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=timeout)


class Ranks:
    """Groups of processes by size, started when first asked for: each runs all cases of its world size."""

    def __init__(self, folder):
        self.folder, self.groups = folder, {}

    def run(self, world, function, *args):
        """Run a function on every rank of a group; return each one's result."""
        if world not in self.groups:
            store = str(self.folder / f"store-{world}")
            self.groups[world] = [
                processes(1, initializer=join, initargs=(rank, world, store)) for rank in range(world)
            ]
        futures = [process.submit(function, *args) for process in self.groups[world]]
        return [future.result(timeout=2 * TIMEOUT) for future in futures]

    def close(self):
        for group in self.groups.values():
            for process in group:
                process.shutdown(cancel_futures=True)
