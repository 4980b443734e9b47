"""Processes that stay for the whole session: one group per world size runs all its cases."""

from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from multiprocessing import get_context

import torch
import torch.distributed as dist

TIMEOUT = 120


def join(rank, world, store):
    """Become a rank of a gloo group."""
    torch.set_num_threads(1)
    timeout = timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=timeout)


class Ranks:
    """Groups of processes by size, started when first asked for."""

    def __init__(self, folder):
        self.folder, self.groups = folder, {}

    def run(self, world, function, *args):
        """Run a function on every rank of a group; return each one's result."""
        if world not in self.groups:
            context, store = get_context("spawn"), str(self.folder / f"store-{world}")
            self.groups[world] = [
                ProcessPoolExecutor(1, mp_context=context, initializer=join, initargs=(rank, world, store))
                for rank in range(world)
            ]
        futures = [process.submit(function, *args) for process in self.groups[world]]
        return [future.result(timeout=2 * TIMEOUT) for future in futures]

    def close(self):
        for group in self.groups.values():
            for process in group:
                process.shutdown(cancel_futures=True)
