"""The peers: one adapter each, which copies a case's weights into the peer's own layer and sets it to drop nothing.

A peer is left out of a case that it cannot compute, and that is said. Those for CUDA alone were written from their
sources and have not run, so parity decides whether they count.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.arms import Build, FeedForward, LeftOutError, Routed, experts_of, longest_group, refuse_copies
from benchmarks.cases import Case, Weights


class Called(nn.Module):
    """A peer's layer, called as it wants to be; those that mix dtypes in bfloat16 run under autocast."""

    def __init__(self, layer: nn.Module, call: Callable[[nn.Module, Tensor], Tensor], autocast: bool = False) -> None:
        super().__init__()
        self.layer, self.call, self.autocast = layer, call, autocast

    def forward(self, x: Tensor) -> Tensor:
        """Return the output alone."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast and x.dtype == torch.bfloat16):
            return self.call(self.layer, x)


def only(holds: bool, reason: str) -> None:
    """Leave the peer out where it cannot compute the case."""
    if not holds:
        raise LeftOutError(reason)


def transformers(case: Case, weights: Weights, experts: str) -> nn.Module:
    """Make Qwen3-MoE's block, with its experts by one of the library's implementations, or by Liger's."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeSparseMoeBlock

    only(case.activation == "swiglu", "its experts are SwiGLU")
    if experts == "batched_mm":
        refuse_copies("copies of matrices", case.tokens * case.top_k * 3 * case.dim * case.ffn, weights)
    config = Qwen3MoeConfig(
        hidden_size=case.dim, moe_intermediate_size=case.ffn, num_experts=case.experts,
        num_experts_per_tok=case.top_k, norm_topk_prob=case.top_k > 1,
    )  # fmt: skip
    config._experts_implementation = "eager" if experts == "liger" else experts
    block: Any = Qwen3MoeSparseMoeBlock(config)
    if experts == "liger":
        from liger_kernel.transformers.swiglu import LigerExperts

        block.experts = LigerExperts(config)
    block = block.to(weights.gate)
    with torch.no_grad():
        block.gate.weight.copy_(weights.gate.t())
        block.experts.gate_up_proj.copy_(weights.up.transpose(1, 2))
        block.experts.down_proj.copy_(weights.down.transpose(1, 2))
    return Called(block, lambda layer, x: layer(x[None])[0])


def deepspeed(case: Case, weights: Weights) -> nn.Module:
    """Make DeepSpeed's layer on one process, without sampling of the second expert or of tokens."""
    only(case.tokens >= 4, "it wants four tokens at least")
    return deepspeed_layer(weights.gate, experts_of(case, weights), case.top_k)


def deepspeed_layer(gate: Tensor, experts: list[nn.Module], top_k: int) -> nn.Module:
    """Make DeepSpeed's layer of modules. It holds copies of its first expert, until others take their places."""
    from deepspeed.moe.layer import MoE

    options = {"drop_tokens": False, "use_rts": False, "top2_2nd_expert_sampling": False}
    layer = MoE(len(gate), experts[0], len(experts), k=top_k, **options).to(gate)
    moe = layer.deepspeed_moe
    moe.experts.deepspeed_experts = nn.ModuleList(experts)
    with torch.no_grad():
        moe.gate.wg.weight.copy_(gate.t())
    return Called(layer, lambda layer, x: layer(x)[0])


def capacity_factor(case: Case, weights: Weights, masks: int) -> float:
    """Return the least factor that drops no token; a layer that needs too much memory for its masks is left out."""
    longest = longest_group(case, weights)
    refuse_copies("one-hot masks", masks * case.tokens * case.experts * longest, weights)
    return (longest + 0.5) * case.experts / case.tokens


def st_moe(case: Case, weights: Weights) -> nn.Module:
    """Make st-moe-pytorch's layer, with thresholds of zero so that no choice is left to chance."""
    from st_moe_pytorch import MoE

    only(case.top_k > 1, "it wants two experts per token at least")
    layer: Any = MoE(
        case.dim, num_experts=case.experts, experts=nn.ModuleList(experts_of(case, weights)), gating_top_n=case.top_k,
        capacity_factor_train=capacity_factor(case, weights, masks=6 * case.top_k), threshold_train=0.0,
        straight_through_dispatch_tensor=False, is_distributed=False,
    ).to(weights.gate)  # fmt: skip
    with torch.no_grad():
        layer.gate.to_gates.weight.copy_(weights.gate.t())
    return Called(layer, lambda layer, x: layer(x[None]).outputs[0], autocast=True)


def mixture_of_experts(case: Case, weights: Weights) -> nn.Module:
    """Make mixture-of-experts' layer, with its policy "all" for second experts; its own have no gated activation."""
    from mixture_of_experts import MoE

    only(case.top_k == 2, "it wants two experts per token")
    experts = FeedForward(weights.up, weights.down, case.activation)
    layer: Any = MoE(
        case.dim, num_experts=case.experts, experts=experts, second_policy_train="all",
        capacity_factor_train=capacity_factor(case, weights, masks=6),
    ).to(weights.gate)  # fmt: skip
    with torch.no_grad():
        layer.gate.w_gating.copy_(weights.gate)
    return Called(layer, lambda layer, x: layer(x[None])[0][0], autocast=True)


class ScatterMoE(Routed):
    """ScatterMoE's gated feed-forward, which takes the second half of the hidden values as the gate."""

    def __init__(self, case: Case, weights: Weights) -> None:
        super().__init__(weights.gate, case.top_k)
        from scattermoe.mlp import GLUMLP

        only(case.activation == "swiglu", "its experts are SwiGLU")
        self.experts = GLUMLP(case.dim, case.ffn, case.experts, case.top_k, activation=nn.SiLU()).to(weights.gate)
        gate, up = weights.up.chunk(2, -1)
        with torch.no_grad():
            self.experts.experts.weight.copy_(torch.cat([up, gate], -1).transpose(1, 2))
            self.experts.output_experts.weight.copy_(weights.down.transpose(1, 2))

    def mix(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """Call the library's layer."""
        output: Tensor = self.experts(x, weight, index)
        return output


PEERS: dict[str, Build] = {
    "transformers, eager": partial(transformers, experts="eager"),
    "transformers, batched_mm": partial(transformers, experts="batched_mm"),
    "transformers, grouped_mm": partial(transformers, experts="grouped_mm"),
    "deepspeed": deepspeed,
    "st-moe-pytorch": st_moe,
    "mixture-of-experts": mixture_of_experts,
}
CUDA_PEERS: dict[str, Build] = {
    "transformers, sonicmoe": partial(transformers, experts="sonicmoe"),
    "liger": partial(transformers, experts="liger"),
    "scattermoe": ScatterMoE,
}
PACKAGES = ("transformers", "deepspeed", "st-moe-pytorch", "mixture-of-experts")
CUDA_PACKAGES = ("liger-kernel", "scattermoe", "triton")
