"""Joining: who starts others, how long they wait, and what they agree on before anything is written."""

import os
from contextlib import chdir
from dataclasses import replace
from datetime import timedelta

import pytest

from gatewright.parallel import expert_mesh
from gatewright.recipes import RECIPES
from gatewright.train.config import ParallelConfig
from gatewright.train.folder import own_folder
from gatewright.train.launch.elastic import needs_launch
from gatewright.train.launch.join import join_processes
from gatewright.train.launch.watchdog import LostProcess
from gatewright.train.strategies.ddp import DDPStrategy

TWO = replace(RECIPES["digits"](), processes=2)


@pytest.mark.parametrize(
    ("environment", "starts"),
    [
        ({}, True),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, True),
        ({"SLURM_NTASKS": "2"}, False),
        ({"RANK": "0"}, False),
    ],
)
def test_who_starts_others(environment, starts):
    assert needs_launch(TWO, environment) == starts
    assert not needs_launch(replace(TWO, processes=1), environment)


def test_another_number_of_processes_than_asked_for_is_refused():
    with pytest.raises(ValueError, match=r"asks for 2 processes .* and 4 were started. Start 2, or set `processes=4`"):
        join_processes(TWO, {"RANK": "0", "WORLD_SIZE": "4"}).__enter__()


def test_a_process_that_never_joins_is_said(monkeypatch):
    places = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name, value in places.items():
        monkeypatch.setenv(name, value)
    config = replace(TWO, device="cpu", parallel=ParallelConfig(timeout=2.0))
    with pytest.raises(LostProcess, match=r"Not all of 2 processes joined within 2 s: "):
        join_processes(config, os.environ).__enter__()


def names(folder):
    """The folder that each process has for a run that names none, where its first name is another run's."""
    strategy, config = DDPStrategy(expert_mesh(1)), RECIPES["digits"]()
    with chdir(folder), own_folder(config, False, strategy) as first, own_folder(config, False, strategy) as second:
        return str(first), str(second)


@pytest.mark.distributed
def test_processes_agree_on_a_new_folder(ranks, tmp_path):
    (one, other) = ranks(2, names, tmp_path)
    assert one == other
    assert len(set(one)) == 2
    assert sorted(f"runs/{path.name}" for path in (tmp_path / "runs").iterdir()) == sorted(one)


def waits(ep_size):
    """How long the processes of each group wait for each other."""
    mesh = expert_mesh(ep_size, timeout=7.0)
    return [group._get_backend(group._device_types[0]).options._timeout for group in mesh.get_all_groups()]


@pytest.mark.distributed
def test_groups_wait_as_long_as_they_are_told(ranks):
    for found in ranks(4, waits, 2):
        assert found == [timedelta(seconds=7)] * 2
