"""docs/coming-from.md beside the libraries it speaks of: the page's layers with a peer's weights, number by number."""

import copy
import importlib.util
from functools import cache

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import gatewright as gw
from tests.documents.examples import ROOT, python_of
from tests.integrations.deepspeed.runs import installed as deepspeed_installed

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]  # The peers use what others deprecated.
DROPPING = "    dispatcher=gw.Capacity(capacity_factor=1.25, min_capacity=4),\n"
LUCIDRAINS = "lucidrains' mixture-of-experts and st-moe-pytorch"


def needs(package):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is missing: pip install 'gatewright[bench]'")


@cache
def programs():
    """What comes first on the page, and the program of each section."""
    page = (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8")
    first, *sections = page.split("\n## ")
    return python_of(first), {section.partition("\n")[0]: python_of(section) for section in sections}


def of_the_page(section, **changes):
    """The names that a section's program defines; ``changes`` are words of it and what takes their place."""
    first, program = programs()[0], programs()[1][section]
    for before, after in changes.items():
        assert before in program
        program = program.replace(before, after)
    names = {"__name__": "page"}
    exec(compile(f"{first}\n{program}", section, "exec"), names)
    gw.aux_loss(names["moe"])  # of the page's own forward
    return names


def learned(call, gate, experts, sequences=4, tokens=10):
    """Output, auxiliary loss and all gradients, where ``call`` returns an output and a loss."""
    generator = torch.Generator().manual_seed(1)
    x, upstream = torch.randn(2, sequences, tokens, 32, generator=generator)
    output, loss = call(x.requires_grad_())
    of_x, of_gate, *of_experts = torch.autograd.grad((output * upstream).sum(), [x, gate, *experts], retain_graph=True)
    (of_loss,) = torch.autograd.grad(loss, [gate])
    found = {"output": output.detach(), "x": of_x, "gate": of_gate, "experts": of_experts}
    return found, {"loss": loss.detach(), "gate": of_loss}


def ours(moe, **sizes):
    """What the page's layer learns; the gate's gradient has a row per expert."""
    return learned(
        lambda x: (moe(x), gw.aux_loss(moe)), moe.router.gate.weight, list(moe.experts.parameters()), **sizes
    )


def scaled(losses, factor):
    return {name: factor * value for name, value in losses.items()}


def in_deepspeed(moe, top_k, **options):
    """What DeepSpeed's layer learns with the weights of ours."""
    from deepspeed.moe.layer import MoE

    experts = copy.deepcopy(moe.experts.experts)
    layer = MoE(32, experts[0], len(experts), k=top_k, **options)
    layer.deepspeed_moe.experts.deepspeed_experts = experts
    gate = layer.deepspeed_moe.gate.wg.weight
    gate.data.copy_(moe.router.gate.weight.data)
    return *learned(lambda x: layer(x)[:2], gate, list(experts.parameters())), layer.deepspeed_moe.exp_counts


def deepspeed_without_drops(top_k):
    more = "top_k=1" if top_k == 1 else f"top_k={top_k}, normalize=True"
    moe = of_the_page("DeepSpeed", **{DROPPING: "", "top_k=1": more})["moe"]
    found, loss = ours(moe)
    return found, loss, *in_deepspeed(moe, top_k, drop_tokens=False, top2_2nd_expert_sampling=False)


@deepspeed_installed
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_deepspeed_where_nothing_is_dropped(run_unhooked, top_k):
    found, loss, wanted, unweighted, counts = run_unhooked(deepspeed_without_drops, top_k)
    assert_close(found, wanted)
    assert counts.sum() == 40 * top_k
    if top_k != 2:  # of two choices DeepSpeed's loss counts the first alone
        assert_close(loss, scaled(unweighted, 0.01))


def deepspeed_with_drops():
    names = of_the_page("DeepSpeed")
    moe = names["moe"]
    (found, loss), layer = ours(moe), in_deepspeed(moe, 1, capacity_factor=1.25, min_capacity=4)
    return found["output"], loss, moe.routing.sums.tokens_per_expert, *layer


@deepspeed_installed
def test_deepspeed_drops_as_many_and_by_chance(run_unhooked):
    output, loss, tokens_per_expert, wanted, unweighted, counts = run_unhooked(deepspeed_with_drops)
    assert torch.equal(tokens_per_expert, counts)
    assert_close(loss, scaled(unweighted, 0.01))
    kept, theirs = (each.abs().sum(-1) > 0 for each in (output, wanted["output"]))
    assert kept.sum() == theirs.sum() < 40
    assert_close(output[kept & theirs], wanted["output"][kept & theirs])


def deepspeed_residual():
    from deepspeed.moe.layer import MoE

    names = of_the_page("DeepSpeed", **{DROPPING: ""})
    layer = gw.ResidualMixture(names["moe"], names["expert"]())
    nn.init.normal_(layer.coefficient.weight)
    theirs = MoE(32, layer.branch, 8, k=1, drop_tokens=False, use_residual=True)
    experts = copy.deepcopy(layer.moe.experts.experts)
    theirs.deepspeed_moe.experts.deepspeed_experts = experts
    theirs.coefficient.load_state_dict(layer.coefficient.state_dict())
    theirs.deepspeed_moe.gate.wg.weight.data.copy_(layer.moe.router.gate.weight.data)
    theirs.mlp = copy.deepcopy(layer.branch)
    learners = [*layer.moe.experts.parameters(), *layer.branch.parameters(), *layer.coefficient.parameters()]
    found = learned(lambda x: (layer(x), gw.aux_loss(layer)), layer.moe.router.gate.weight, learners)[0]
    learners = [*experts.parameters(), *theirs.mlp.parameters(), *theirs.coefficient.parameters()]
    return found, learned(lambda x: theirs(x)[:2], theirs.deepspeed_moe.gate.wg.weight, learners)[0]


@deepspeed_installed
def test_deepspeed_beside_a_dense_branch(run_unhooked):
    found, wanted = run_unhooked(deepspeed_residual)
    assert_close(found, wanted)


@needs("transformers")
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_transformers(kind):
    import transformers
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    sizes = {"hidden_size": 32, "num_experts_per_tok": 2, "experts_implementation": "eager"}
    moe = of_the_page("transformers")["moe"]
    if kind == "mixtral":
        config = transformers.MixtralConfig(**sizes, intermediate_size=64, num_local_experts=8)
        block = MixtralSparseMoeBlock(config)
    else:
        config = transformers.Qwen3MoeConfig(**sizes, moe_intermediate_size=64, num_experts=8, norm_topk_prob=True)
        block = Qwen3MoeSparseMoeBlock(config)
    stacked = [block.experts.gate_up_proj, block.experts.down_proj]
    block.gate.weight.data.copy_(moe.router.gate.weight.data)
    for theirs, mine in zip(stacked, moe.experts.parameters(), strict=True):
        theirs.data.copy_(mine.data.mT)

    def call(x):
        logits = block.gate(x.flatten(0, 1))[0]
        return block(x), config.router_aux_loss_coef * load_balancing_loss_func((logits,), 8, 2)

    found, loss = ours(moe)
    wanted, their_loss = learned(call, block.gate.weight, stacked)
    wanted["experts"] = [gradient.mT for gradient in wanted["experts"]]
    assert_close(found, wanted)
    assert_close(loss, their_loss)


class OneEach(nn.Module):
    """Experts as mixture-of-experts wants them: a module of ``(experts, rows, dim)``."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, x):
        return torch.stack([expert(rows) for expert, rows in zip(self.experts, x, strict=True)])


def lucidrains(name, moe):
    """A layer of lucidrains with the weights of ours, its gate, whose gradient is transposed for mixture-of-experts."""
    experts = copy.deepcopy(moe.experts.experts)
    if name == "mixture_of_experts":
        from mixture_of_experts import MoE

        layer = MoE(32, num_experts=8, second_policy_train="all", experts=OneEach(experts))
        layer.gate.w_gating.data.copy_(moe.router.gate.weight.data.t())
        return layer, layer.gate.w_gating
    from st_moe_pytorch import MoE

    layer = MoE(32, num_experts=8, threshold_train=0.0, straight_through_dispatch_tensor=False, experts=experts)
    layer.gate.to_gates.weight.data.copy_(moe.router.gate.weight.data)
    return layer, layer.gate.to_gates.weight


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs(name)) for name in ("mixture_of_experts", "st_moe_pytorch")]
)
def test_lucidrains_drops_the_same_of_one_sequence(name):
    moe = of_the_page(LUCIDRAINS, **{'"load_balance": 0.01': '"router_z": 0.001'})["moe"]
    layer, gate = lucidrains(name, moe)
    sizes = {"sequences": 1, "tokens": 64}
    found, loss = ours(moe, **sizes)
    assert moe.routing.sums.dropped > 0
    wanted, their_loss = learned(
        lambda x: (layer(x)[0], 0.001 * layer(x)[-1]), gate, list(layer.experts.parameters()), **sizes
    )
    if name == "mixture_of_experts":
        wanted["gate"] = wanted["gate"].t()
    else:
        assert_close(loss, their_loss)
    assert_close(found, wanted)
