"""The benchmark of a layer: what it refuses to time, what it counts, and that every installed arm runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from benchmarks.arms import BASELINES, OURS, dense, module_loop
from benchmarks.cases import QUICK, make_items, make_weights
from benchmarks.compare import compare
from benchmarks.timing import memory

WEIGHTS = make_weights(QUICK, "cpu", torch.float32)
ITEMS = make_items(QUICK, WEIGHTS.gate)


def test_every_arm_that_is_installed_computes_the_same_layer(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "--quick", "--device", "cpu", "--output", str(tmp_path)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": "src"}, cwd=Path(__file__).parents[1])
    records = json.loads((tmp_path / "cpu.json").read_text())["layer"].values()
    assert {record["dtype"] for record in records} == {"float32", "bfloat16"}
    for record in records:
        assert record["machine"]["torch"] == torch.__version__
        for name, arm in record["arms"].items():
            assert "ms" in arm or arm["left_out"] == "not installed", name
            assert name == "dense" or arm.get("parity", True), name
        assert record["arms"].keys() >= {"dense", *OURS, *BASELINES}


def test_an_arm_with_other_numbers_gets_no_figure(capsys):
    def tripled_gate():
        layer = module_loop(QUICK, WEIGHTS)
        layer.gate.register_hook(lambda gradient: 3 * gradient)  # The output is right, and one gradient is not.
        return layer

    arms = {"right": lambda: module_loop(QUICK, WEIGHTS), "wrong": tripled_gate}
    found = compare(arms, module_loop(QUICK, WEIGHTS.double()), ITEMS, seconds=0.01)
    assert "ms" in found["right"]
    assert "ms" not in found["wrong"]
    assert "parity fails" in capsys.readouterr().out


def test_dense_has_the_active_operations_of_the_mixture():
    used = sum(parameter.numel() for parameter in dense(QUICK, WEIGHTS).parameters())
    assert used == QUICK.top_k * 3 * QUICK.dim * QUICK.ffn


def test_memory_is_what_autograd_keeps_and_what_a_step_needs():
    layer = nn.Sequential(nn.Linear(256, 1024, bias=False), nn.ReLU(), nn.Linear(1024, 256, bias=False))
    x = torch.randn(512, 256, requires_grad=True)
    held, peak = memory(layer, x, torch.randn(512, 256))
    hidden, parameters = 512 * 1024 * 4, 2 * 256 * 1024 * 4
    assert held == hidden  # ReLU and the second layer share it.
    assert hidden + parameters <= peak <= 4 * hidden + parameters
