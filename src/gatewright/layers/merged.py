"""Merged experts: parameters are mixed for each item, and one expert runs with the mixture."""

from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vmap

from gatewright.experts.base import make_modules, output_shape_of
from gatewright.layers.base import RoutedLayer
from gatewright.layers.checks import check_num_experts
from gatewright.losses import Coefficients
from gatewright.routers import Router
from gatewright.routing import Routing


class MergedMoE(RoutedLayer):
    """Experts merged per item: ``y = f(x; theta(x))`` with ``theta(x) = sum_i G(x)_i theta_i``.

    CondConv (https://arxiv.org/abs/1904.04971 section 3) is ``TopK(channels, E, top_k=E, score="sigmoid")`` over
    convolutions, with ``features=x.mean((-2, -1))``; SMEAR (https://arxiv.org/abs/2306.03745 section 3) is
    ``TopK(dim, E, top_k=E)``. Any router does: experts that were not chosen have weight 0.

    Every item is a batch of one row, and all items run at once (`torch.func.vmap`), so an expert cannot branch on
    values. Memory grows with items x parameters of one expert. Under autocast the mixture is made in at least float32
    and the expert then runs in autocast's type throughout.

    Args:
        router: The router, whose weights mix the experts.
        experts: A factory, called once per expert so that each has its own initialisation, or modules of one
            architecture, without buffers; the code that runs is the first one's.
        num_experts: Number of experts to make; with modules, leave it out.
        item_shape: Shape of one item; an int stands for one dimension. By default ``(router.dim,)``.
        losses: Coefficient per auxiliary loss, as in `MoE`. Nothing can starve where every expert is chosen: pass an
            empty mapping.

    Raises:
        ValueError: If router and experts disagree on their number, experts differ in architecture, have buffers or no
            parameters, do not take the items, a loss is unknown, or the router is none.
    """

    def __init__(
        self,
        router: Router,
        experts: Callable[[], nn.Module] | Iterable[nn.Module],
        num_experts: int | None = None,
        *,
        item_shape: int | Sequence[int] | None = None,
        losses: Coefficients | None = None,
    ) -> None:
        super().__init__(router, losses, item_shape)
        modules = make_modules(experts, num_experts)
        check_num_experts(router.num_experts, len(modules))
        for index, module in enumerate(modules):
            _check_mergeable(index, module, modules[0])
        self.experts = nn.ModuleList(modules)
        self.output_shape = output_shape_of("expert 0", modules[0], self.item_shape)
        self.watch()

    def mix(
        self, items: Float[Tensor, "tokens *item"], routed: Routing
    ) -> tuple[Float[Tensor, "tokens *out"], Routing]:
        """Mix the experts' parameters for each item, and run one expert with them."""
        return self._run(items, self.mixed_parameters(routed, items.shape[0])), routed

    def mixed_parameters(self, routing: Routing, num_tokens: int) -> dict[str, Float[Tensor, "tokens *shape"]]:
        """Return ``theta(x)`` of each token, by parameter; mixed in at least float32."""
        weights = _dense_weights(routing, num_tokens)
        names = (name for name, _ in self.experts[0].named_parameters())
        alike = zip(*(expert.parameters() for expert in self.experts), strict=True)
        with torch.autocast(weights.device.type, enabled=False):
            return {name: _mix(weights, torch.stack(each)) for name, each in zip(names, alike, strict=True)}

    def _run(self, items: Tensor, parameters: dict[str, Tensor]) -> Float[Tensor, "tokens *out"]:
        """Call the first expert once for each item, with the parameters of that item, all in one go."""
        items, parameters = _autocast(items), {name: _autocast(values) for name, values in parameters.items()}
        if items.shape[0] == 0:  # A convolution of no items is refused by vmap. The sums keep gradients zero, not None.
            unused = (tensor.sum() for tensor in (items, *parameters.values()))
            return sum(unused, items.new_zeros(0, *self.output_shape))
        # Autocast does not reach through vmap to every operation, a convolution among them.
        with torch.autocast(items.device.type, enabled=False):
            output: Tensor = vmap(self._run_one, randomness="different")(items, parameters)
        return output

    def _run_one(self, item: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        output: Tensor = functional_call(self.experts[0], parameters, (item[None],))
        return output[0]


def _dense_weights(routing: Routing, num_tokens: int) -> Float[Tensor, "tokens experts"]:
    """The routing as a matrix, with 0 where an expert was not chosen."""
    weights = routing.weight.new_zeros(num_tokens, routing.num_experts + 1)
    places = (routing.token_index, routing.expert_index)
    return weights.index_put(places, routing.weight, accumulate=True)[:, :-1]


def _mix(
    weights: Float[Tensor, "tokens experts"], stacked: Float[Tensor, "experts *shape"]
) -> Float[Tensor, "tokens *shape"]:
    dtype = torch.promote_types(weights.dtype, stacked.dtype)
    return torch.einsum("te,e...->t...", weights.to(dtype), stacked.to(dtype)).to(stacked.dtype)


def _autocast(tensor: Tensor) -> Tensor:
    """Convert to autocast's type where it is on, as autocast would: float64 stays."""
    kind = tensor.device.type
    if not torch.is_autocast_enabled(kind) or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(kind))


def _check_mergeable(index: int, module: nn.Module, first: nn.Module) -> None:
    """Refuse an expert of which there is nothing to mix, or whose parts have no like in the first."""
    name = f"expert {index} ({type(module).__name__})"
    if not any(True for _ in module.parameters()):
        raise ValueError(f"What is merged of experts is their parameters; {name} has none.")
    if buffers := [buffer for buffer, _ in module.named_buffers()]:
        raise ValueError(
            "Merged experts have no buffers, such as BatchNorm's statistics: each item has parameters of its own, and "
            f"so nobody's statistics; {name} has {', '.join(buffers)}. Use GroupNorm or LayerNorm, or keep the experts "
            "apart: MoE with ModuleExperts."
        )
    for describe in (_shapes, _settings):
        expected, found = describe(first), describe(module)
        for part in {**expected, **found}:
            if expected.get(part) != found.get(part):
                raise ValueError(
                    f"Merged experts are of one architecture, so that each parameter has its like in every expert; "
                    f"expert 0 has {expected.get(part)} and {name} has {found.get(part)} at {part!r}. Make them agree, "
                    "or keep them apart: MoE with ModuleExperts."
                )


def _shapes(module: nn.Module) -> dict[str, str]:
    """Shapes of parameters by name."""
    return {name: str(tuple(parameter.shape)) for name, parameter in module.named_parameters()}


def _settings(module: nn.Module) -> dict[str, str]:
    """Classes with their settings, such as strides, by name."""
    return {name: f"{type(part).__name__}({part.extra_repr()})" for name, part in module.named_modules()}
