"""What a layer keeps to, whatever it is made of: every router, experts and dispatcher together."""

import copy
import io
import pickle

import pytest
import torch

from gatewright import aux_loss
from tests.cases import DISPATCHER_CASES, EXPERT_CASES, ROUTER_CLASSES, SOFT_CASES, make_moe, make_soft_moe, run

SPARSE = {
    **{router: [(router, "modules", "capacity-tight")] for router in ROUTER_CLASSES},
    "merged": [(router, "merged", "dropless") for router in ("noisy-top-k", "expert-choice", "hashed")],
    "every kind of experts": [("noisy-top-k", experts, "dropless") for experts in EXPERT_CASES],
    "every dispatcher": [("noisy-top-k", "grouped-feed-forward", dispatcher) for dispatcher in DISPATCHER_CASES],
}
DENSE = {router: [(router, experts) for experts in EXPERT_CASES] for router in SOFT_CASES}

pytestmark = pytest.mark.filterwarnings("ignore:A capacity of 1 row")
sparse = pytest.mark.parametrize("case", SPARSE)
every = pytest.mark.parametrize("case", [*SPARSE, *DENSE])


def layers(case, **options):
    for parts in SPARSE.get(case, ()):
        yield make_moe(*parts, **options)
    for parts in DENSE.get(case, ()):
        yield make_soft_moe(*parts)


def chosen(moe):
    """The experts that served each token of the last batch."""
    routing = moe.routing
    served = [set() for _ in range(int(routing.sums.num_tokens))]
    for token, expert in zip(routing.token_index.tolist(), routing.expert_index.tolist(), strict=True):
        served[token] |= {expert} - {routing.num_experts}
    return served


def save_and_load(moe):
    """Through a file, into a layer made anew."""
    file = io.BytesIO()
    torch.save(moe.state_dict(), file)
    twin = copy.deepcopy(moe)
    for parameter in twin.parameters():
        torch.nn.init.zeros_(parameter)
    file.seek(0)
    twin.load_state_dict(torch.load(file, weights_only=True))
    return twin


@every
def test_a_training_step_gives_every_parameter_a_gradient(case):
    for moe in layers(case):
        for num_tokens in (0, 1, 12) if case in SPARSE else (0, 3, 12):
            moe.zero_grad()
            x = torch.randn(num_tokens, 8, requires_grad=True)
            output = run(moe, x)
            (output.sum() + aux_loss(moe)).backward()
            assert output.shape == (num_tokens, 8)
            assert x.grad.isfinite().all()
            assert all(parameter.grad.isfinite().all() for parameter in moe.parameters())
            reached = [bool(parameter.grad.any()) for parameter in moe.parameters()]
            assert (any(reached) if case in SPARSE else all(reached)) or num_tokens == 0


@sparse
def test_a_token_without_an_expert_gets_zero_and_gives_no_gradient(case):
    for moe in layers(case, top_k=1):
        x = torch.randn(40, 8, requires_grad=True)
        output = run(moe, x)
        aux_loss(moe)
        output.sum().backward()
        lost = torch.tensor([not experts for experts in chosen(moe)])
        assert sum(map(len, chosen(moe))) + moe.routing.sums.dropped == moe.routing.sums.tokens_per_expert.sum()
        assert not output[lost].any()
        assert not x.grad[lost].any()
        assert output[~lost].any(-1).all()
        assert lost.any() or "Capacity(0.6" not in repr(moe)


@every
def test_inference_mode_and_no_grad_compute_the_same(case):
    for moe in layers(case):
        for training in (True, False):
            moe.train(training)
            outputs, x = [], torch.randn(12, 8)
            for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
                torch.manual_seed(1)
                with context():
                    outputs.append(run(moe, x).detach())
            assert torch.equal(outputs[0], outputs[1])
            assert torch.equal(outputs[0], outputs[2])


@every
def test_copies_compute_the_same_and_leave_the_last_batch_behind(case):
    for moe in layers(case):
        for copied in (copy.deepcopy, lambda moe: pickle.loads(pickle.dumps(moe)), save_and_load):
            x = torch.randn(12, 8)
            run(moe, x)
            twin = copied(moe)
            assert twin.routing is None
            assert aux_loss(twin) == 0  # the original's losses are not the copy's
            assert aux_loss(moe) > 0 or not moe.losses
            outputs = []
            for module in (moe, twin):
                torch.manual_seed(1)
                outputs.append(run(module, x))
            assert torch.equal(*outputs)
