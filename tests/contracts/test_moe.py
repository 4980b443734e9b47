"""What a layer keeps to, whatever it is made of: every router, experts and dispatcher together."""

import copy
import io
import pickle

import pytest
import torch
from torch.testing import assert_close

from gatewright import aux_loss
from tests.cases import DISPATCHER_CASES, EXPERT_CASES, ROUTER_CASES, make_moe, run

pytestmark = pytest.mark.filterwarnings("ignore:A capacity of 1 row")
routers = pytest.mark.parametrize("router", ROUTER_CASES)
experts = pytest.mark.parametrize("experts", EXPERT_CASES)
dispatchers = pytest.mark.parametrize("dispatcher", DISPATCHER_CASES)
some = pytest.mark.parametrize(
    ("router", "experts", "dispatcher"),
    [
        *((router, "modules", "capacity-tight") for router in ROUTER_CASES),
        *((router, "merged", "dropless") for router in ROUTER_CASES),
        *(("noisy-top-k", experts, "dropless") for experts in EXPERT_CASES),
        *(("noisy-top-k", "grouped-feed-forward", dispatcher) for dispatcher in DISPATCHER_CASES),
    ],
)


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


@routers
@experts
@dispatchers
def test_evaluation_never_depends_on_the_rest_of_the_batch(router, experts, dispatcher):
    """The same item alone, in the batch and in another order: the same experts, and the same output."""
    moe, x = make_moe(router, experts, dispatcher).eval(), torch.randn(9, 8)
    order = torch.randperm(9)
    with torch.no_grad():
        joint, experts_of = run(moe, x), chosen(moe)
        assert torch.equal(run(moe, x), joint)
        assert_close(run(moe, x[order]), joint[order], rtol=0, atol=1e-6)
        assert chosen(moe) == [experts_of[item] for item in order]
        for item in (0, 4):
            assert_close(run(moe, x[item : item + 1])[0], joint[item], rtol=0, atol=1e-6)
            assert chosen(moe) == [experts_of[item]]


@some
@pytest.mark.parametrize("num_tokens", [0, 1, 11])
def test_a_training_step_gives_every_parameter_a_gradient(router, experts, dispatcher, num_tokens):
    moe, x = make_moe(router, experts, dispatcher), torch.randn(num_tokens, 8, requires_grad=True)
    output = run(moe, x)
    (output.sum() + aux_loss(moe)).backward()
    assert output.shape == (num_tokens, 8)
    assert x.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in moe.parameters())
    assert any(parameter.grad.any() for parameter in moe.parameters()) or num_tokens == 0


@some
def test_a_token_without_an_expert_gets_zero_and_gives_no_gradient(router, experts, dispatcher):
    moe, x = make_moe(router, experts, dispatcher, top_k=1), torch.randn(40, 8, requires_grad=True)
    output = run(moe, x)
    aux_loss(moe)
    output.sum().backward()
    lost = torch.tensor([not experts for experts in chosen(moe)])
    assert sum(map(len, chosen(moe))) + moe.routing.sums.dropped == moe.routing.sums.tokens_per_expert.sum()
    assert not output[lost].any()
    assert not x.grad[lost].any()
    assert output[~lost].any(-1).all()
    assert lost.any() or "tight" not in dispatcher


@some
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_inference_mode_and_no_grad_compute_the_same(router, experts, dispatcher, training):
    moe, x = make_moe(router, experts, dispatcher).train(training), torch.randn(11, 8)
    outputs = []
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        torch.manual_seed(1)
        with context():
            outputs.append(run(moe, x).detach())
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@some
def test_autocast(router, experts, dispatcher):
    """The experts compute in bfloat16, the router does not, and gradients are those of float32 parameters."""
    moe, x = make_moe(router, experts, dispatcher), torch.randn(11, 8)
    torch.manual_seed(1)
    expected, routing = run(moe, x), moe.routing
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        output = run(moe, x)
        loss = output.float().sum() + aux_loss(moe)
    loss.backward()
    assert output.dtype == torch.bfloat16
    assert torch.equal(moe.routing.weight, routing.weight)
    assert_close(output.float(), expected, rtol=0.05, atol=0.05)
    assert {parameter.grad.dtype for parameter in moe.parameters()} == {torch.float32}


@some
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda moe: pickle.loads(pickle.dumps(moe)), save_and_load])
def test_copies_compute_the_same_and_leave_the_last_batch_behind(router, experts, dispatcher, copied):
    moe, x = make_moe(router, experts, dispatcher), torch.randn(11, 8)
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
