"""DeepSpeed's own mixture of experts in place of ours inside a ready-made model, to compare with."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from gatewright.experts.base import output_shape_of
from gatewright.extras import require
from gatewright.layers.base import RoutedLayer
from gatewright.models import MixtureConfig
from gatewright.models.options import check_options
from gatewright.routers import TopK


def build_mixture(
    config: MixtureConfig, make_expert: Callable[[], nn.Module], router_dim: int, item_shape: tuple[int, ...]
) -> "DeepSpeedMoE":
    """Build the layer that a model's settings describe, with the same capacity in evaluation as in training.

    Raises:
        ValueError: If the model's router looks at other features than the items themselves.
    """
    if router_dim != math.prod(item_shape):
        raise ValueError(
            f"DeepSpeed's gate looks at the item itself, {math.prod(item_shape)} numbers for items of shape "
            f"{item_shape}, and this model's router at {router_dim} features. Use the recipe cifar10-cnn, or "
            "model.layer 'gatewright'."
        )
    capacity = {"capacity_factor": config.capacity_factor, "eval_capacity_factor": config.capacity_factor}
    capacity |= {"min_capacity": config.min_capacity, "drop_tokens": config.dispatch == "capacity"}
    options = {**capacity, **config.router_options}
    return DeepSpeedMoE(
        make_expert, config.num_experts, config.top_k, item_shape=item_shape, losses=config.losses, options=options
    )


class DeepSpeedMoE(RoutedLayer):
    """``deepspeed.moe.layer.MoE`` as it is: its gate, its random choice of what to drop, its padded experts.

    Copies of one expert, at first equal, see batches filled up with zeros to the capacity, in evaluation too: what
    becomes of an item there depends on the rest of its batch, and on chance where experts are full. Its gate loss is
    our ``load_balance`` (https://arxiv.org/abs/2101.03961 eq. 4) for one expert per item. It needs DeepSpeed's engine
    to train.

    Args:
        make_expert: Makes the module that is copied; its output has as many numbers as its input.
        num_experts: Number of copies.
        top_k: Experts per item.
        item_shape: Shape of one item.
        losses: Coefficient per auxiliary loss; None for 0.01 times ``load_balance``.
        options: Further keyword arguments of DeepSpeed's layer, such as ``{"noisy_gate_policy": "RSample"}``.

    Raises:
        ValueError: If an expert's output has another size than its input, or DeepSpeed's layer has no such option.
        ImportError: If DeepSpeed is not installed.
    """

    router: TopK

    def __init__(
        self,
        make_expert: Callable[[], nn.Module],
        num_experts: int,
        top_k: int,
        *,
        item_shape: tuple[int, ...],
        losses: Mapping[str, float] | None,
        options: Mapping[str, Any],
    ) -> None:
        dim = math.prod(item_shape)
        super().__init__(TopK(dim, num_experts, top_k), losses, item_shape)
        expert = make_expert()
        self.output_shape = output_shape_of("the expert", expert, self.item_shape)
        if math.prod(self.output_shape) != dim:
            raise ValueError(
                f"DeepSpeed's layer gives back as many numbers per item as it takes, {dim} for items of shape "
                f"{item_shape}; its expert returns {self.output_shape}. Use model.layer 'gatewright'."
            )
        make = require("deepspeed.moe.layer", "deepspeed").MoE
        check_options(make, options, "DeepSpeed's layer", given=("hidden_size", "expert", "num_experts", "k"))
        self.theirs = make(dim, Slots(expert, self.item_shape), num_experts, k=top_k, **options)
        self.router.gate = self.theirs.deepspeed_moe.gate.wg  # What it chooses is recorded by a router that shares it.
        self.watch()

    @property
    def experts(self) -> nn.Module:
        """All copies."""
        experts: nn.Module = self.theirs.deepspeed_moe.experts
        return experts

    def forward(  # type: ignore[override]  # DeepSpeed's gate looks at the items alone, and takes no mask.
        self, x: Float[Tensor, "*batch_and_item"]
    ) -> Float[Tensor, "*batch_and_out"]:
        """Mix experts by DeepSpeed's gate, and record the choice that it makes without noise."""
        items = self.flat_items(x).flatten(1)
        output: Tensor = self.theirs(items)[0]
        output = self.like_batch(output, x)
        self.record(self.route(x), output)
        return output


class Slots(nn.Module):
    """An expert that takes what DeepSpeed hands over: ``(1, slots, numbers of an item)``, some of the slots empty."""

    def __init__(self, expert: nn.Module, item_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.expert, self.item_shape = expert, item_shape

    def forward(self, slots: Float[Tensor, "groups slots size"]) -> Float[Tensor, "groups slots size"]:
        """Apply the expert to every slot."""
        outputs: Tensor = self.expert(slots.reshape(-1, *self.item_shape))
        return outputs.reshape(*slots.shape[:2], -1)
