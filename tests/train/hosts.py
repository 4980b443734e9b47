"""Two hosts on one machine: network namespaces that a virtual cable joins. Needs root, and iproute2."""

import os
import shutil
import signal
import subprocess
import sys

from tests.train.runs import environment

ADDRESSES = ("10.213.7.1", "10.213.7.2")
CABLE = "cable"


def why_not():
    """Why this machine cannot pretend to be two; None where it can."""
    if shutil.which("ip") is None:
        return "two hosts on one machine need iproute2"
    name = f"gatewright-{os.getpid()}-try"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if tried.returncode:
        return f"two hosts on one machine need rights that this user has not: {tried.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return None


class Hosts:
    """Hosts 0 and 1, with a cable between them that can be cut and mended."""

    def __init__(self):
        self.names = [f"gatewright-{os.getpid()}-{number}" for number in range(2)]

    def __enter__(self):
        for name in self.names:
            ip("netns", "add", name)
        first, second = self.names
        ip("link", "add", CABLE, "netns", first, "type", "veth", "peer", "name", CABLE, "netns", second)
        for name, address in zip(self.names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", CABLE)
            ip("-n", name, "link", "set", CABLE, "up")
            ip("-n", name, "link", "set", "lo", "up")
        return self

    def __exit__(self, *_):
        for host, name in enumerate(self.names):
            self.clear(host)
            subprocess.run(["ip", "netns", "del", name], check=False)

    def clear(self, host):
        """Kill all that runs on a host."""
        pids = subprocess.run(["ip", "netns", "pids", self.names[host]], capture_output=True, text=True).stdout.split()
        for pid in pids:
            os.kill(int(pid), signal.SIGKILL)

    def cut(self):
        ip("-n", self.names[1], "link", "set", CABLE, "down")

    def mend(self):
        ip("-n", self.names[1], "link", "set", CABLE, "up")

    def start(self, host, folder, port, *words):
        """Start torchrun with two processes on a host, and return it with the file of its errors."""
        path = folder / f"host-{host}-{port}-errors"
        torchrun = (
            *("--nnodes", "2", "--nproc-per-node", "2", "--max-restarts", "0", "--rdzv-backend", "c10d"),
            *("--rdzv-endpoint", f"{ADDRESSES[0]}:{port}", "--rdzv-id", "run", "--local-addr", ADDRESSES[host]),
            *("--rdzv-conf", f"is_host={1 - host},read_timeout=60"),
            *("-m", "gatewright", *map(str, words)),
        )
        with path.open("w") as errors:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.names[host], sys.executable, "-m", "torch.distributed.run", *torchrun],
                cwd=folder,
                env=environment(folder, GLOO_SOCKET_IFNAME=CABLE),
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )
        return process, path


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
