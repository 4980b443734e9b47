"""What each process spends its steps on is counted as it is."""

import time

import pytest
import torch
from torch import nn

from gatewright import ModuleExperts, MoE, TopK, aux_loss
from gatewright.train.pace import Pace, peak_memory
from gatewright.train.strategies.ddp import DDPStrategy
from gatewright.train.strategies.single import ALONE
from tests.train.spread import mesh_of

pytestmark = pytest.mark.distributed
DIM, TOKENS = 8, 6


def model_of(num_experts=4):
    torch.manual_seed(0)
    mixture = MoE(TopK(DIM, num_experts, 1), ModuleExperts(lambda: nn.Linear(DIM, DIM), num_experts))
    return nn.Sequential(nn.Linear(DIM, DIM), mixture)


def one_step(ep_size, late=None):
    """A step in which every token goes to the last expert, and one process may come late."""
    strategy = DDPStrategy(mesh_of(ep_size))
    model = model_of()
    strategy.setup(model, wrap=False)
    model[1].router.gate.weight.data.zero_()[-1] = 1.0
    pace = Pace(model, strategy)
    strategy.barrier()
    with pace.step():
        if strategy.rank == late:
            torch.randn(400, 400) @ torch.randn(400, 400)
            busy = time.perf_counter()
            while time.perf_counter() - busy < 0.3:
                torch.randn(100).sum()
        y = model(torch.ones(TOKENS, DIM))
        (y.sum() + aux_loss(model)).backward()
    return pace.metrics(), pace.summary(torch.device("cpu"))


def test_bytes_are_those_of_the_rows_that_leave(ranks):
    """Rows, outputs and the gradients of both: those of the first process all go to the second, and come back."""
    row, dense = DIM * 4, 4 * (DIM * DIM + DIM + 4 * DIM)
    for metrics, summary in ranks(2, one_step, 2):
        assert metrics["processes/0/all_to_all_bytes"] == 2 * TOKENS * row  # there, and back the gradient of the output
        assert metrics["processes/1/all_to_all_bytes"] == 2 * TOKENS * row  # outputs, and the gradient of the rows
        assert [each["reduced_bytes"] for each in summary] == [dense, dense]
        assert all(each["peak_memory_bytes"] > 1e7 for each in summary)


def test_with_every_expert_everywhere_nothing_travels_and_all_is_reduced(ranks):
    metrics, summary = ranks(2, one_step, 1)[0]
    assert metrics["processes/0/all_to_all_bytes"] == 0
    assert summary[1]["reduced_bytes"] == 4 * (DIM * DIM + DIM + 4 * DIM + 4 * (DIM * DIM + DIM))


def test_who_waits_is_who_is_early(ranks):
    metrics, _ = ranks(2, one_step, 2, 1)[0]
    assert metrics["processes/0/waiting_seconds"] > 0.2
    assert metrics["processes/0/waiting_seconds"] > metrics["processes/1/waiting_seconds"]
    assert metrics["processes/1/step_seconds"] > 0.3


def test_one_process_alone_tracks_none_and_sums_up_itself():
    pace = Pace(model_of(), ALONE)
    with pace.step():
        pass
    assert pace.metrics() == {}
    (summary,) = pace.summary(torch.device("cpu"))
    assert summary["waiting_seconds"] == summary["all_to_all_bytes"] == summary["reduced_bytes"] == 0
    assert 0 < summary["step_seconds"] < 10
    assert summary["peak_memory_bytes"] <= peak_memory(torch.device("cpu"))
