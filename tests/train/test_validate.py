"""Settings that cannot be trained together, or not on these processes or this device: each is one sentence."""

from dataclasses import replace

import pytest
import torch

from gatewright.data import DataConfig
from gatewright.models import CnnConfig
from gatewright.train import OptimConfig, RunConfig
from gatewright.train.config import DeepSpeedConfig, ParallelConfig
from gatewright.train.validate import validate


def run_of(**changes):
    model = CnnConfig(**changes.pop("model", {}))
    return RunConfig(recipe="mine", model=model, data=DataConfig(), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"deepspeed": DeepSpeedConfig(config="ds.json")}, "for DeepSpeed's engine; got `engine` 'torch'"),
        ({"model": {"layer": "deepspeed"}}, "got `model.layer` 'deepspeed' and `engine` 'torch'"),
        ({"parallel": ParallelConfig(ep_size=3)}, r"`parallel.ep_size` \(3\) divides the number of processes \(2\)"),
        ({"parallel": ParallelConfig(ep_size=2), "model": {"num_experts": 1}, "compile": True}, "do not compile; got"),
        (
            {"model": {"experts": "grouped", "backend": "triton"}},
            "backend='triton' does not take this input: .+ Leave backend out",
        ),
        ({"cuda_graphs": True}, "got `compile` False and `device` 'cpu'"),
        ({"precision": "float16"}, "got `precision` 'float16' and `compile` False"),
        ({"parallel": ParallelConfig(shard="fsdp"), "optim": OptimConfig(name="muon")}, "got `optim.name` 'muon'"),
    ],
)
def test_what_two_processes_cannot_train_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        validate(run_of(**changes), 2, torch.device("cpu"))


def test_compiling_without_a_compiler_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        ValueError, match=r"`compile=True` needs a C\+\+ compiler on the CPU, and none of g\+\+, clang\+\+"
    ):
        validate(run_of(compile=True), 1, torch.device("cpu"))
    validate(run_of(compile=True), 1, torch.device("cuda"))


def test_what_fits_is_not_refused_and_draws_no_random_numbers():
    before = torch.get_rng_state()
    validate(run_of(model={"num_experts": 1, "top_k": 2}), 1, torch.device("cpu"))  # the dense twin has no router
    validate(replace(run_of(), compile=True), 1, torch.device("cuda"))
    assert torch.equal(torch.get_rng_state(), before)
