"""What every router is: a module that maps tokens to a `Routing`."""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal, Self, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Num
from torch import Tensor, nn

from gatewright.ops import stable_sort, wide_product
from gatewright.reset import refuse_unknown_start, reset_parts
from gatewright.routing import Loss, Routing, RoutingSums
from gatewright.scope import ONE_PROCESS, BatchScope, Mask

Score = Literal["softmax", "sigmoid", "sqrt_softplus"]

MIN_NOISE_STD = 1e-6
"""Floor under the noise's standard deviation. The paper has none; below it the gradient of the load would be NaN."""

TASK_GRADIENT_HINT = (
    "{router} with top_k=1 normalises the one chosen weight to 1, so the gate gets no gradient from the task and "
    "learns from the balance losses alone. Use top_k=2, or TopK(dim, num_experts, top_k=1) with its default scores "
    "(softmax over all experts, not normalised)."
)

FORGOTTEN_STEPS = 1000
"""Training forwards without a step of the expert bias after which a warning says so."""

FORGOTTEN_STEP_HINT = (
    f"{FORGOTTEN_STEPS} training forwards were routed by an expert bias that never moved, so nothing evens out the "
    "load. Call gatewright.end_step(model) after every optimizer.step(), or pass bias_rate=0 to keep the bias as it is."
)


class Router(nn.Module, ABC):
    """Map tokens to a `Routing`.

    Args:
        dim: Size of the features a token is routed by; several trailing dimensions count as their product.
        num_experts: How many experts there are to choose among.
        top_k: How many of them each token is sent to.

    Raises:
        ValueError: If a size is below 1 or top_k is above num_experts.
    """

    default_losses: Mapping[str, float] = MappingProxyType({})
    """Auxiliary losses and their coefficients where a layer names none."""
    own_losses: Mapping[str, Loss] = MappingProxyType({})
    """Losses that read what this router alone has sums of, by name; they come before those of `LOSSES`."""

    def __init__(self, dim: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        if min(dim, num_experts, top_k) < 1:
            raise ValueError(f"dim, num_experts and top_k are at least 1; got {dim}, {num_experts} and {top_k}.")
        if top_k > num_experts:
            raise ValueError(
                f"top_k ({top_k}) cannot exceed num_experts ({num_experts}): a token goes to an expert once. "
                f"Use top_k of at most {num_experts}, or more experts."
            )
        self.dim, self.num_experts, self.top_k = dim, num_experts, top_k

    @abstractmethod
    def forward(
        self, features: Float[Tensor, "tokens dim"], scope: BatchScope = ONE_PROCESS, mask: Mask = None
    ) -> Routing:
        """Route every token. Computes in at least float32, also under autocast.

        What depends on more than the token itself (noise, other tokens) comes from the scope.

        Args:
            features: What tokens are routed by.
            scope: The batch that they are part of.
            mask: True where a token is real. The others are sent nowhere, have no part in the sums, and change neither
                where the real ones are sent nor their noise.
        """

    def reset_parameters(self) -> None:
        """Initialise all parameters and buffers as construction does; see `gatewright.MoE.reset_parameters`.

        Raises:
            ValueError: If a tensor belongs to a module without this method. A router that holds tensors itself, and not
                in modules such as a gate, initialises them in a method of its own.
        """
        if type(self).reset_parameters is Router.reset_parameters:
            refuse_unknown_start("the router", self)
        reset_parts(self)

    def record(self, sums: RoutingSums) -> None:
        """Let parts that adapt note what a training forward routed; one that checkpointing repeats is noted once."""
        for part in self.children():
            if isinstance(part, Router | ExpertBias):
                part.record(sums)

    def end_step(self, scope: BatchScope = ONE_PROCESS) -> None:
        """Let them adapt to what was noted since the last optimizer step; called through `gatewright.end_step`."""
        for part in self.children():
            if isinstance(part, Router | ExpertBias):
                part.end_step(scope)

    def extra_repr(self) -> str:
        """Show the sizes when a model is printed."""
        return f"dim={self.dim}, num_experts={self.num_experts}, top_k={self.top_k}"


class ExpertBias(nn.Module):
    """A bias per expert that evens out the load without a loss: https://arxiv.org/abs/2408.15664 algorithm 1.

    It is added to scores for selection only, and has no gradient: once per optimizer step, from the assignments of all
    training forwards since the last one, ``b_i += rate * sign(mean(load) - load_i)``. It stays float32 in a model of
    any other type, because a step of 0.001 vanishes next to a bfloat16 of 0.5.

    Args:
        num_experts: How many experts there are.
        rate: Size of a step: 0.001 in the paper, where 0.0001 is slow and 0.01 swings. 0 leaves the bias as it is.

    Raises:
        ValueError: If the rate is negative or not finite.
    """

    bias: Tensor
    load: Tensor

    def __init__(self, num_experts: int, rate: float = 0.001) -> None:
        super().__init__()
        if not 0 <= rate < math.inf:
            raise ValueError(f"bias_rate is finite and at least 0; got {rate}. DeepSeek uses 0.001.")
        self.rate = rate
        self.register_buffer("bias", torch.empty(num_experts, dtype=torch.float32))
        self.register_buffer("load", torch.empty(num_experts, dtype=torch.int64), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with biases of zero, and nothing noted."""
        self.bias.zero_()
        self.load.zero_()
        self._forwards_left = FORGOTTEN_STEPS

    def forward(self, scores: Float[Tensor, "tokens experts"]) -> Float[Tensor, "tokens experts"]:
        """Return what to select by: scores and bias, without a gradient."""
        return scores.detach() + self.bias

    def record(self, sums: RoutingSums) -> None:
        """Add the assignments of a training forward to the load."""
        if not self.training or self.rate == 0:
            return
        self.load.add_(sums.tokens_per_expert.detach())
        if not torch.compiler.is_compiling() and self._forwards_left:  # A graph would be compiled anew for every count.
            self._forwards_left -= 1
            if self._forwards_left == 0:
                warnings.warn(FORGOTTEN_STEP_HINT, stacklevel=2)

    def end_step(self, scope: BatchScope) -> None:
        """Move every bias by one step, from the load of the global batch, and begin to count anew."""
        (load,) = scope.sum(self.load)
        self.bias.add_((load.sum() - len(load) * load).sign().to(self.bias.dtype), alpha=self.rate)
        self.load.zero_()
        self._forwards_left = 0

    def extra_repr(self) -> str:
        """Show the step when a model is printed."""
        return f"rate={self.rate}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move to another device, but not to another type; off the meta device, to zeros."""
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            device = getattr(self, name).device
            kept = torch.zeros_like(buffer, device=device) if buffer.is_meta else buffer.to(device)
            setattr(self, name, kept)
        return self


class Gate(nn.Linear):
    """The linear layer inside a router: it computes in at least float32, whatever autocast or its parameters say.

    float64 stays float64. A router calls it as a module, so hooks, adapters and wrappers work as on any other layer,
    and any module from ``(tokens, dim)`` to ``(tokens, experts)`` may take its place: see `gate_logits`.
    """

    def reset_parameters(self) -> None:
        """Start at zero, as https://arxiv.org/abs/1701.06538 appendix A starts its gates."""
        super().reset_parameters()  # Draws what is overwritten: a seed goes on to give the numbers it always gave.
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, input: Num[Tensor, "*batch dim"]) -> Float[Tensor, "*batch choices"]:  # noqa: A002 - torch's name
        """Return the logits."""
        dtype = torch.promote_types(torch.promote_types(input.dtype, self.weight.dtype), torch.float32)
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(input.device.type, enabled=False):
            product = wide_product(input, self.weight)
            if product is None:
                return F.linear(input.to(dtype), self.weight.to(dtype), bias)
        return product if bias is None else product + bias


class EvenGate(Gate):
    """A gate whose first logits are small, so that no expert is favoured from the start."""

    def reset_parameters(self) -> None:
        """Draw weights by Switch's initialisation scaled by 0.1, cut at two deviations.

        https://arxiv.org/abs/2101.03961 section 2.4. A bias starts at zero.
        """
        super().reset_parameters()
        std = (0.1 / self.in_features) ** 0.5
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)


def gate_logits(features: Num[Tensor, "tokens dim"], gate: nn.Module) -> Float[Tensor, "tokens experts"]:
    """Call a gate, and return logits of at least float32.

    A `Gate` computes in at least float32 by itself. Another module in its place computes in the type of its own
    parameters, also under autocast.
    """
    if not isinstance(gate, Gate):
        own = (parameter.dtype for parameter in gate.parameters() if parameter.is_floating_point())
        features = features.to(next(own, torch.float32))
    with torch.autocast(features.device.type, enabled=False):
        logits: Tensor = gate(features)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def load_probability(
    logits: Float[Tensor, "*tokens experts"],
    noisy_logits: Float[Tensor, "*tokens experts"],
    noise_std: Float[Tensor, "*tokens experts"],
    top_k: int,
) -> Float[Tensor, "*tokens experts"]:
    """Probability that each expert stays among the top k when its own noise is drawn again.

    Eqs. 8 and 9 of https://arxiv.org/abs/1701.06538: ``P(x, i) = Phi((logit_i - kth_excluding(H, k, i)) / std_i)``.
    The k-th largest noisy logit of the others is the (k+1)-th of all where i is among the top k, and the k-th
    otherwise. With top_k = experts every probability is 1.
    """
    if top_k == logits.shape[-1]:
        return torch.ones_like(logits)
    top = noisy_logits.topk(top_k + 1).values
    kth, next_after = top[..., top_k - 1 : top_k], top[..., top_k : top_k + 1]
    threshold = torch.where(noisy_logits > next_after, next_after, kth)
    probability: Tensor = torch.special.ndtr((logits - threshold) / noise_std)
    return probability


def score_logits(logits: Float[Tensor, "tokens choices"], score: Score) -> Float[Tensor, "tokens choices"]:
    """Turn logits into positive scores: below 1, but for DeepSeek-V4's ``sqrt(log(1 + exp(logit)))``."""
    if score == "sqrt_softplus":
        return F.softplus(logits).clamp(min=torch.finfo(logits.dtype).tiny).sqrt()
    return logits.softmax(-1) if score == "softmax" else logits.sigmoid()


def normalized(scores: Float[Tensor, "tokens choices"]) -> Float[Tensor, "tokens choices"]:
    """Divide each row by its sum."""
    return scores / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)


def largest(values: Float[Tensor, "*tokens choices"], count: int) -> Int[Tensor, "*tokens count"]:
    """Find the largest values of each row, in falling order; of equal ones the first come first, on every device."""
    _, order = stable_sort(values, descending=True)
    return order[..., :count]


def selected_weight(
    scores: Float[Tensor, "tokens experts"], expert_index: Int[Tensor, "tokens top_k"], *, normalize: bool, scale: float
) -> Float[Tensor, "tokens top_k"]:
    """Take the scores of chosen experts, divided by their sum where they are to add up to the scale."""
    weight = scores.gather(-1, expert_index)
    return scale * (normalized(weight) if normalize else weight)


def size_of_groups(num_experts: int, num_groups: int, top_k_groups: int) -> int:
    """Return how many experts are in each group.

    Raises:
        ValueError: If the groups are not of equal size, or fewer than are chosen.
    """
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(
            f"num_groups must divide num_experts into groups of equal size; got {num_groups} groups of {num_experts} "
            "experts. Change one of them."
        )
    if not 1 <= top_k_groups <= num_groups:
        raise ValueError(f"top_k_groups is from 1 to num_groups ({num_groups}); got {top_k_groups}.")
    return num_experts // num_groups


def check_score(score: str) -> None:
    """Raise a `ValueError` of a score that there is not."""
    if score not in get_args(Score):
        raise ValueError(f"score is 'softmax', 'sigmoid' or 'sqrt_softplus'; got {score!r}.")


def check_scale(scale: float) -> None:
    """Raise a `ValueError` of a factor on the weights that is not above 0, or not finite."""
    if not 0 < scale < math.inf:
        raise ValueError(f"scale is finite and above 0; got {scale}. DeepSeek-V3 uses 2.5, and 1 leaves weights alone.")
