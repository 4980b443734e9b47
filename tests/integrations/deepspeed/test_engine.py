"""DeepSpeed's engine: the torch engine's trajectory, its checkpoints, and what it cannot go on with."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from gatewright.integrations.deepspeed.engine import DeepSpeedEngine
from gatewright.train import OptimConfig, TrainingDiverged
from gatewright.train.phases import upcycled
from gatewright.train.state import logical_state
from gatewright.train.step import TorchEngine
from tests.integrations.deepspeed.runs import (
    ADAMW,
    ARTICLE,
    PLAIN,
    STEPS,
    Network,
    config_of,
    engine_of,
    installed,
    train,
    zero,
)
from tests.train.runs import finish, start
from tests.train.spread import largest_difference, several


def run_of(kind, config, upcycle_at, **options):
    """A whole run, of which the first steps may be a dense network's."""
    if not upcycle_at:
        engine = engine_of(kind, config, **options)
        return train(engine), engine
    dense = engine_of(kind, config, dense=True, **options)
    reports = train(dense, 0, upcycle_at)
    mixture = Network(options["router"], options["experts"]).to(options.get("dtype", torch.float32))
    engine = upcycled(dense, mixture, lambda model: engine_of(kind, config, model=model))
    return reports + train(engine, upcycle_at), engine


def trajectory(ep_size, optim, settings, folder, upcycle_at=0, **options):
    """How far both engines in float32 are from torch's in float64: in what each step reports, and in the end."""
    reports, exact = run_of(TorchEngine, config_of(ep_size, optim), upcycle_at, dtype=torch.float64, **options)
    found = []
    for kind, config in (
        (TorchEngine, config_of(ep_size, optim)),
        (DeepSpeedEngine, config_of(ep_size, optim, settings, folder)),
    ):
        own, engine = run_of(kind, config, upcycle_at, **options)
        pairs = list(zip(own, reports, strict=True))
        far = {name: max(abs(getattr(a, name) - getattr(b, name)) for a, b in pairs) for name in vars(reports[0])}
        state = engine.state_dict()
        far["weights"] = largest_difference(state["model"], exact.state_dict()["model"])
        if engine.average is not None:
            far["average"] = largest_difference(state["average"], exact.state_dict()["average"])
        found.append(far)
    return found


THEIRS = {name: ARTICLE[name] for name in ("optimizer", "scheduler")}
SGD = OptimConfig(name="sgd", lr=0.1, accumulation_steps=2, clip_norm=0.3, schedule="constant")


@installed
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world", "ep_size", "optim", "settings", "experts"),
    [
        (4, 2, SGD, None, "grouped-relu-bias"),
        (4, 2, SGD, zero(1), "modules"),
        (2, 2, ADAMW, zero(2), "modules"),
        (2, 1, replace(ADAMW, ema_decay=None), zero(3), "modules"),
    ],
    ids=["accumulated", "zero1", "zero2", "zero3"],
)
def test_the_trajectory_is_the_torch_engines(ranks, tmp_path, world, ep_size, optim, settings, experts):
    """As near to float64 as torch's own float32 is: rounding grows with steps, and 4 times its size allows for order.

    Idle experts are part of it: 8 images for 4 experts leave some process's expert without any in most steps.
    """
    for torchs, deepspeeds in ranks(world, trajectory_with, ep_size, optim, settings, str(tmp_path), experts):
        for name, value in deepspeeds.items():
            assert value <= 4 * torchs[name] + 1e-7, (name, value, torchs[name])
        assert torchs["weights"] < 1e-5


def trajectory_with(ep_size, optim, settings, folder, experts, router="noisy-top-k", upcycle_at=0):
    return trajectory(ep_size, optim, settings, folder, upcycle_at, experts=experts, router=router)


@installed
@pytest.mark.distributed
def test_a_dense_network_is_upcycled_as_under_the_torch_engine(ranks, tmp_path):
    """In the middle of the run, with what the optimizer keeps."""
    options = (2, ADAMW, None, str(tmp_path), "modules", "noisy-top-k", STEPS // 2)
    for torchs, deepspeeds in ranks(4, trajectory_with, *options):
        for name, value in deepspeeds.items():
            assert value <= 4 * torchs[name] + 1e-7, (name, value, torchs[name])
        assert torchs["weights"] < 1e-5


def handed_over(first, second, folder):
    """Half a run by one engine and the rest by the other, against a whole run of the first."""
    kinds = {"torch": TorchEngine, "deepspeed": DeepSpeedEngine}
    whole = engine_of(kinds[first], config_of())
    train(whole)
    half = engine_of(kinds[first], config_of())
    train(half, 0, STEPS // 2)
    box = [half.state_dict()]
    dist.broadcast_object_list(box, 0)  # what a checkpoint holds: the state as the first process has it
    rest = engine_of(kinds[second], config_of())
    rest.load_state_dict(box[0])
    train(rest, STEPS // 2)
    return largest_difference(rest.state_dict()["model"], whole.state_dict()["model"])


@installed
@pytest.mark.distributed
@pytest.mark.parametrize(("first", "second"), [("torch", "deepspeed"), ("deepspeed", "torch")])
def test_either_engine_goes_on_from_the_others_state(ranks, tmp_path, first, second):
    for difference in ranks(2, handed_over, first, second, str(tmp_path)):
        assert difference < 1e-6


def resumed(settings, folder, ep_size):
    """Half a run and the rest from DeepSpeed's own checkpoint, against a whole run; and two refusals."""

    def engine(trust, where="own", ep_size=ep_size):
        config = config_of(ep_size, PLAIN, settings, folder, trust)
        return engine_of(DeepSpeedEngine, config, folder=Path(folder) / where)

    whole, half = engine(False, "whole"), engine(False)
    train(whole)
    for step in (2, 4, STEPS // 2):
        train(half, half.step_count, step)
        box = [half.state_dict()]
    dist.broadcast_object_list(box, 0)
    dist.barrier()
    refusals = []
    for other in (engine(False), engine(True, "nowhere")):
        with pytest.raises(ValueError, match="DeepSpeed's own checkpoint") as caught:
            other.load_state_dict(box[0])
        refusals.append(str(caught.value))
    rest = engine(True)
    rest.load_state_dict(box[0])
    train(rest, STEPS // 2)
    kept = sorted(path.name for path in (Path(folder) / "own").glob("step-*"))
    return largest_difference(rest.state_dict()["model"], whole.state_dict()["model"]), refusals, kept


@installed
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("settings", "ep_size"), [(zero(2), 2), (zero(3), 1), (THEIRS, 2)], ids=["zero2", "zero3", "their-optimizer"]
)
def test_what_our_state_cannot_hold_is_in_deepspeeds_checkpoint_if_trusted(ranks, tmp_path, settings, ep_size):
    for difference, (untrusted, missing), kept in ranks(2, resumed, settings, str(tmp_path), ep_size):
        assert difference == 0
        assert "`deepspeed.trust_checkpoint=True`" in untrusted
        assert "there is none" in missing
        assert kept == ["step-00000004", "step-00000006"]


def upcycled_under(settings, folder, ep_size):
    """The outputs of a dense network and of its mixture, and the rates before and after, as DeepSpeed keeps its own."""
    config = config_of(ep_size, PLAIN, settings, folder)
    dense = engine_of(DeepSpeedEngine, config, dense=True)
    rates = [report.learning_rate for report in train(dense, 0, 4)]
    images, weights = torch.rand(4, 1, 4, 4), logical_state(dense)["model"]
    mixture = Network("top-k-after", "modules")
    engine = upcycled(dense, mixture, lambda model: engine_of(DeepSpeedEngine, config, model=model))
    alone, whole = Network("top-k-after", "modules", dense=True), Network("top-k-after", "modules")
    alone.load_state_dict(weights)
    state = logical_state(engine)["model"]
    box = [state]
    dist.broadcast_object_list(box, 0)
    whole.load_state_dict(box[0])
    far = float((alone.eval()(images) - whole.eval()(images)).abs().max())
    return far, rates + [report.learning_rate for report in train(engine, 4, 6)]


@installed
@pytest.mark.distributed
@pytest.mark.parametrize(("settings", "ep_size"), [(zero(3), 1), (ARTICLE, 2)], ids=["3", "article"])
def test_a_network_is_upcycled_under_zero_without_its_optimizers_state(ranks, tmp_path, settings, ep_size):
    for far, rates in ranks(2, upcycled_under, settings, str(tmp_path), ep_size):
        assert far < 1e-5
        assert len(rates) == 6
        if settings is ARTICLE:
            assert rates == pytest.approx(article_rates(6), rel=1e-6)


def article_rates(steps):
    return [1e-3 * math.log(max(step, 1)) / math.log(1000) for step in range(steps)]


def diverged(folder):
    engine = engine_of(DeepSpeedEngine, config_of(2, PLAIN, zero(2), folder))
    with pytest.raises(TrainingDiverged, match="loss became nan at step 1"):
        engine.step([(torch.full((8, 1, 4, 4), torch.inf), torch.zeros(8, dtype=torch.int64))])
    return True


def two_optimizers(folder):
    with pytest.raises(ValueError, match="Use adamw or sgd"):
        engine_of(DeepSpeedEngine, config_of(2, OptimConfig(name="muon")))
    return True


def number_as_parameter(folder):
    model = Network("top-k", "modules")
    model.scale = nn.Parameter(torch.ones(()))
    options = {"device": torch.device("cpu"), "steps_per_epoch": STEPS, "strategy": several(2)}
    with pytest.raises(ValueError, match="one without dimensions: scale"):
        DeepSpeedEngine(model, config_of(2), **options)
    return True


@installed
@pytest.mark.distributed
@pytest.mark.parametrize("refused", [diverged, two_optimizers, number_as_parameter])
def test_what_cannot_go_on_says_why(ranks, tmp_path, refused):
    assert all(ranks(2, refused, str(tmp_path)))


@installed
@pytest.mark.slow
def test_deepspeeds_launcher_trains_and_one_process_goes_on(tmp_path):
    """Two processes by the launcher, which appends --local_rank, from another folder; then one more epoch by one."""
    flags = "--no-report --tracking.no-enabled --engine deepspeed --device cpu --output run"
    settings = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    launcher = Path(sys.executable).with_name("deepspeed")
    words = f"--num_gpus 2 --module gatewright train digits --epochs 1 --parallel.ep-size 2 {flags}"
    status, printed, errors = finish(start(*words.split(), folder=tmp_path, program=(launcher,), **settings))
    assert status == 0, errors
    assert printed.count("test accuracy") == 1  # the first process alone speaks
    words = f"train digits --epochs 2 --parallel.ep-size 1 {flags} --resume"
    status, printed, errors = finish(start(*words.split(), folder=tmp_path, **settings))
    assert status == 0, errors
    assert "epoch 2/2" in printed
    assert "epoch 1/2" not in printed
