"""What was measured, in one JSON file per device, each record with the machine and the versions it came from."""

import json
import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import CUDA_PACKAGES, PACKAGES

FOLDER = Path(__file__).parent / "results"


def machine(device: str) -> dict[str, Any]:
    """Return hardware, threads, versions, commit and date."""
    found: dict[str, Any] = {
        "hardware": torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} cores of {processor()}",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    for package in (*PACKAGES, *(CUDA_PACKAGES if device == "cuda" else ())):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """Return the processor's name and what torch uses of it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    amx = " with AMX" if any("amx_bf16" in line for line in lines) else ""
    return f"{names[0] if names else platform.machine()}{amx} ({torch.backends.cpu.get_cpu_capability()})"


def commit() -> str:
    """Return the commit measured; a plus says that files differed from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def load(device: str, folder: Path = FOLDER) -> dict[str, dict[str, Any]]:
    """Return all records of a device by section and key."""
    path = folder / f"{device}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def record(section: str, key: str, device: str, found: dict[str, Any], folder: Path = FOLDER) -> None:
    """Put a record in the place of the one with its key."""
    records = load(device, folder)
    records.setdefault(section, {})[key] = {"machine": machine(device), **found}
    folder.mkdir(parents=True, exist_ok=True)
    parts = [
        f'"{name}": {{\n' + ",\n".join(f'"{key}": {json.dumps(each)}' for key, each in entries.items()) + "\n}"
        for name, entries in records.items()
    ]  # A line per record, so that a difference shows what was measured anew.
    (folder / f"{device}.json").write_text("{\n" + ",\n".join(parts) + "\n}\n")
