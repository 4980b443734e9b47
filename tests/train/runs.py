"""Tiny real runs: images that can be learned in seconds, configs, processes, and comparison bit by bit."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.modules.module import register_module_forward_pre_hook

from gatewright.data import ImageSet
from gatewright.models import ImageClassifier
from gatewright.models.transformer import Transformer
from gatewright.recipes import RECIPES
from gatewright.train import TrackingConfig
from gatewright.train.checkpoint.format import load_checkpoint, newest_checkpoint
from gatewright.train.step import TorchEngine

FIVE_STEPS = {"batch_size": 256, "holdout": 0.1}  # of 1,294 images, in an epoch that leaves some over


def digits_config(output, *, optim=None, data=None, model=None, recipe="digits", log_interval=20, **changes):
    """The recipe in one epoch without MLflow, and with what else is asked for."""
    config = RECIPES[recipe]()
    parts = {
        "model": replace(config.model, **(model or {})),
        "data": replace(config.data, **(data or {})),
        "optim": replace(config.optim, **(optim or {})),
        "tracking": TrackingConfig(enabled=False, log_interval=log_interval),
    }
    return replace(config, **parts, **{"epochs": 1, "output": str(output)} | changes)


def text_config(output, path, *, optim=None, data=None, model=None, log_interval=20, **changes):
    """A language model of a few thousand parameters, on a text file, without MLflow."""
    config = RECIPES["python-lm"]()
    small = {"num_layers": 2, "dim": 16, "num_heads": 2, "num_experts": 4}
    text = {"name": "text", "path": str(path), "cache": str(path.parent / "cache"), "context": 16, "batch_size": 4}
    parts = {
        "model": replace(config.model, **small | (model or {})),
        "data": replace(config.data, **text | {"epoch_batches": 6, "eval_batch_size": 32} | (data or {})),
        "optim": replace(config.optim, **{"name": "adamw", "lr": 0.01} | (optim or {})),
        "tracking": TrackingConfig(enabled=False, log_interval=log_interval),
    }
    short = {"epochs": 2, "output": str(output), "device": "cpu", "precision": "float32"}
    return replace(config, **parts, **short | changes)


def write_text(folder):
    """A text that is quickly learned, in one file."""
    file = folder / "text.txt"
    file.write_bytes(b"".join(b"line %d is 1%d\n" % (number, number % 7) for number in range(300)))
    return file


def image_set(num_images, *, channels=3, size=16, num_classes=4, seed=0):
    """Images of noise whose brightness tells the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_images) % num_classes
    noise = torch.randint(0, 40, (num_images, channels, size, size), generator=generator)
    images = noise + (labels * (200 // num_classes)).view(-1, 1, 1, 1)
    return ImageSet(images.to(torch.uint8), labels, tuple(f"class {index}" for index in range(num_classes)))


def write_image_folder(folder, *, num_train=32, num_test=8, num_classes=2, size=16):
    """The same images as PNG files, sorted by split and class."""
    for split, number in (("train", num_train), ("test", num_test)):
        images = image_set(number, size=size, num_classes=num_classes, seed=len(split))
        for index, (image, label) in enumerate(zip(images.images, images.labels.tolist(), strict=True)):
            place = folder / split / f"class{label}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.asarray(image.movedim(0, 2))).save(place / f"{index}.png")
    return folder


def make_engine(model, config, *, steps_per_epoch=4):
    return TorchEngine(model, config, device=torch.device("cpu"), steps_per_epoch=steps_per_epoch)


def batches_of(images, batch_size):
    """Pixels and labels, batch by batch and over and over."""
    while True:
        for first in range(0, len(images) - batch_size + 1, batch_size):
            rows = slice(first, first + batch_size)
            yield images.images[rows].float() / 255, images.labels[rows]


def differences(one, other, path=""):
    """Paths in two nested states at which a type, a number or a bit differs."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape and _bits(one) == _bits(other)
        return [] if same else [path]
    if isinstance(one, dict) and isinstance(other, dict) and list(one) == list(other):
        return [place for key in one for place in differences(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [place for index, (a, b) in pairs for place in differences(a, b, f"{path}/{index}")]
    return [] if type(one) is type(other) and repr(one) == repr(other) else [path]


def _bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def final_state(output):
    """The newest checkpoint, without what differs between equal runs: the clock, the folder, the tracker's name."""
    state = load_checkpoint(newest_checkpoint(output / "checkpoints"))
    for name in ("train_seconds", "tracking_id"):
        del state["position"][name]
    del state["config"]
    return state


def logged(output):
    """Lines of metrics.jsonl, the last one left out where it is not complete yet."""
    path = output / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def steps_of(output):
    """Steps that a run logged, in the order in which they were made."""
    return [line["step"] for line in logged(output) if "train/task_loss" in line["values"]]


def wait_until(condition, seconds=180.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.005)


@contextmanager
def signal_at(forward, number=signal.SIGTERM):
    """Send this process a real signal in the middle of a step: when a model in training begins its n-th forward."""
    forwards = count(1)

    def send(module, images):
        if isinstance(module, ImageClassifier | Transformer) and module.training and next(forwards) == forward:
            signal.raise_signal(number)

    hook = register_module_forward_pre_hook(send)
    try:
        yield
    finally:
        hook.remove()


def environment(folder, **more):
    """Of a process that keeps to a folder, to one thread and to local tracking."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # where gatewright is
    ours = {
        "PATH": path,
        "GATEWRIGHT_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
        "HOME": str(folder),
    }
    return {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"} | ours | more


def start(*words, folder, program=("-m", "gatewright"), **more):
    return subprocess.Popen(
        [sys.executable, *program, *map(str, words)],
        cwd=folder,
        env=environment(folder, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, seconds=300):
    """Wait for the end of a process and return its status, output and errors."""
    try:
        output, errors = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, output, errors


def call(*words, folder, **more):
    return finish(start(*words, folder=folder, **more))
