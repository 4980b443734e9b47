"""The benchmark of a layer: what it refuses to time, what it counts, and that every installed arm runs."""

import json
import sys

import torch
from torch import nn

from benchmarks.__main__ import main
from benchmarks.arms import BASELINES, OURS, dense, module_loop
from benchmarks.cases import QUICK, make_items, make_weights
from benchmarks.compare import compare
from benchmarks.images import ImageCase, measure_images
from benchmarks.page import page
from benchmarks.profile import Operations
from benchmarks.scaling import measure_experts
from benchmarks.timing import memory
from tests.integrations.deepspeed.runs import installed

WEIGHTS = make_weights(QUICK, "cpu", torch.float32)
ITEMS = make_items(QUICK, WEIGHTS.gate)


def benchmarks(*words):
    """What ``python -m benchmarks`` does."""
    sys.argv[1:] = words
    main()


def test_every_arm_that_is_installed_computes_the_same_layer(tmp_path, run_unhooked):
    run_unhooked(benchmarks, "--quick", "--device", "cpu", "--output", str(tmp_path))
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


def test_a_profile_counts_arithmetic_and_bytes_backward_too():
    x, weight = torch.randn(32, 64), torch.randn(64, 16, requires_grad=True)
    with Operations(x.device) as operations:
        (x @ weight).backward(torch.ones(32, 16))
    product = operations.found["mm"]
    assert (product["calls"], product["flop"]) == (2, 2 * 2 * 32 * 64 * 16)
    assert product["bytes"] == 2 * 4 * (32 * 64 + 64 * 16 + 32 * 16)


def test_many_experts_are_timed_part_by_part_as_far_as_memory_allows(monkeypatch):
    found = measure_experts(8, "cpu", seconds=0.01)
    assert found["tokens"] == 8 * 64 // 2
    layers = ["layer, top-k", "router, top-k", "layer, product keys", "router, product keys"]
    assert list(found["ms"]) == [*layers, "SGD", "AdamW, fused", "AdamW, foreach"]
    monkeypatch.setattr("benchmarks.scaling.available", lambda device: 3e7)
    found = measure_experts(8, "cpu", seconds=0.01)
    assert list(found["ms"]) == [*layers, "SGD"]
    assert found["left_out"].keys() == {"AdamW, fused", "AdamW, foreach"}


@installed
def test_padding_counts_for_deepspeeds_batch_norm_and_for_no_group_norm(run_unhooked):
    cases = (ImageCase(5, 3, norm) for norm in ("Batch", "Group"))
    batch, group = (run_unhooked(measure_images, case, "cpu", 0.01)["arms"] for case in cases)
    assert batch["gatewright"]["parity"]
    assert group["gatewright"]["parity"]
    assert group["deepspeed"]["parity"]
    assert not batch["deepspeed"]["parity"]
    assert "ms" not in batch["deepspeed"]


def arm(ms, held=1.0):
    return {"ms": [ms - 1, ms, ms + 1], "forward_ms": [1, 1, 1], "held_mb": held, "peak_mb": 2.0, "difference": 1e-7}


def test_the_page_prints_losses_means_and_what_has_no_figure():
    records = [
        {"gatewright": arm(8.0), "peer": arm(2.0), "other": arm(16.0), "module loop": arm(4.0)},
        {"gatewright": arm(4.0), "peer": {"left_out": "its masks would take 9 GB"}, "other": arm(4.0)},
        {"gatewright": arm(4.0), "peer": {"difference": 0.5, "parity": False}, "other": arm(16.0)},
    ]
    about = {"hardware": "a machine", "threads": 2, "torch": "2"}
    layer = {
        str(number): {"case": f"case {number}", "dtype": "float32", "machine": about, "arms": arms}
        for number, arms in enumerate(records)
    }
    layer["2"] = layer["2"] | {"machine": about | {"torch": "3"}}
    text = page({"cpu": {"layer": layer}})
    assert "- layer of (0); (1): a machine, 2 threads, torch 2." in text
    assert "- layer of (2): a machine, 2 threads, torch 3." in text
    assert "| case 0 | 8.00 (1.00) | 2.00 (1.00) | 16.00 (1.00) | 4.00 (1.00) | 4.00 | 4.00 |" in text
    assert "| the best peer | 3 | 1.00 (4.00) |" in text  # 8 / 2, 4 / 4 and 4 / 16
    assert "| peer | 1 | 4.00 (4.00) |" in text
    assert "- peer: its masks would take 9 GB, at (case 1)." in text
    assert "- peer: its numbers differ by 5e-01, at (case 2)." in text
