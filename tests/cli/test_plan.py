"""`gatewright plan`: what it prints, what it says of flags that do not fit."""

import re

import pytest

from gatewright.cli.plan import SizeArguments, explicit_sizes
from gatewright.planner import plan

SIZES = "--num-experts 64 --dim 128 --ffn 256 --tokens 4096 --processes 8 --parallel.ep-size 8"


def cells(output, row):
    """The numbers of a row of every table that was printed."""
    return re.findall(rf"^│ +{row} +│ ([^│]*?) +│", output, re.MULTILINE)


def test_sizes_become_a_prediction(gatewright):
    status, output, errors = gatewright("plan", *SIZES.split())
    assert (status, errors) == (0, "")
    assert "Prediction for these sizes: 8 processes, ep size 8" in output
    assert "A prediction from formulas, not a measurement" in output
    given = SizeArguments(num_experts=64, dim=128, ffn=256, tokens=4096)
    found = plan(explicit_sizes(given), 8, 8)
    assert cells(output, "weights") == [f"{found.memory.weights / 1e6:.4g} MB"]
    assert cells(output, "all-to-all") == [
        f"{found.traffic.all_to_all / 1e3:.4g} kB",
        f"{found.seconds.all_to_all * 1e6:.4g} us",
    ]
    assert cells(output, "expert gradients") == ["0 B"]
    assert cells(output, "efficiency") == [f"{found.seconds.efficiency:.1%}"]


def test_it_answers_how_many_processes(gatewright):
    words = "--num-experts 1024 --dim 1024 --ffn 4096 --layers 12 --tokens 1048576 --memory-per-rank 80e9"
    status, output, _ = gatewright("plan", *words.split())
    assert status == 0
    (processes, ep_size) = map(int, re.findall(r"Fewest processes of 80 GB each: (\d+), with ep size (\d+)", output)[0])
    assert processes % 8 == 0
    assert f"{processes} processes, ep size {ep_size}" in output
    here, there = (float(cell.removesuffix(" GB").replace(" TB", "e3")) for cell in cells(output, "memory"))
    assert there <= 80 < here
    status, output, _ = gatewright("plan", *SIZES.split(), "--imbalance", "2.5", "--memory-per-rank", "80e9")
    assert (status, "Fewest processes of 80 GB each: 1, with ep size 1." in output) == (0, True)


def test_a_recipe_takes_the_flags_of_train(gatewright):
    flags = "--model.num-experts 40 --processes 4 --parallel.ep-size 4 --links.inside 1e9 --optim.name adamw"
    status, output, errors = gatewright("plan", "cifar10-resnets", *flags.split())
    assert (status, errors) == (0, "")
    assert "Prediction for cifar10-resnets: 4 processes, ep size 4" in output
    (weights,), (state) = cells(output, "weights"), cells(output, "optimizer")
    assert weights == f"{4 * (10 * 474_720 + 27_546) / 1e6:.4g} MB"
    assert float(state[0].split()[0]) == pytest.approx(2 * float(weights.split()[0]), rel=1e-3)


def test_a_language_model_is_planned_with_all_its_layers(gatewright):
    """And other tasks by their data: the example's."""
    flags = "--model.num-layers 2 --model.dim 32 --model.num-heads 2 --model.ffn 64 --data.context 16"
    status, output, errors = gatewright("plan", "python-lm", *flags.split(), "--processes", "2")
    assert (status, errors) == (0, "")
    parameters = 257 * 32 + 2 * (2 * 32 + 4 * 32 * 32 + 8 * 32 + 8 * 2 * 32 * 32) + 32 + 32 * 256
    assert cells(output, "weights") == [f"{4 * parameters / 1e3:.4g} kB"]
    status, output, errors = gatewright("plan", "examples.regression.recipe:regression")
    assert (status, errors) == (0, "")


def test_the_hardware_is_said_and_a_small_model_takes_time(gatewright):
    _, output, _ = gatewright("plan", "digits")
    assert "Prediction for digits: 1 process, ep size 1" in output
    assert "an H100's peak, unless given" in output
    assert cells(output, "assumed device") == ["989 TFLOP/s"]
    (step,) = cells(output, "step time")
    assert step.endswith(" ms")  # not half a microsecond: each operation takes a while to start
    assert "assumed links" not in output
    given = ["--device.flops", "2e12", "--links.between", "1e9", "--memory-per-rank", "80e9"]
    _, output, _ = gatewright("plan", *SIZES.split(), *given)
    assert cells(output, "assumed device") == ["2 TFLOP/s", "2 TFLOP/s"]  # beside both predictions
    assert "H100" not in output
    assert cells(output, "between nodes") == ["1 GB/s"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("digits --processes 3 --parallel.ep-size 2", "divides the number of processes (3)"),
        ("digits --parallel.shard fsdp", "got --engine torch and --parallel.shard fsdp. Leave both out"),
        ("digits --model.router soft", "for mixtures of one kind, whose routers choose experts; got Soft"),
        ("python-lm --processes 33", "33 processes and ep_size 1 for 8 experts and 32 items"),
        (f"{SIZES} --memory-per-rank 1e3", "No number of processes up to 4096"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_gets_a_sentence(gatewright, words, sentence):
    status, output, errors = gatewright("plan", *words.split())
    assert (status, output) == (2, "")
    assert "Traceback" not in errors
    assert sentence in " ".join(word for word in errors.split() if word not in "│|")
