"""What every kind of experts is: a module that turns an `ExpertBatch` into one output row per row."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gatewright.reset import reset_parts
from gatewright.routing import Routing

Shape = tuple[int, ...]
_FORMS = (
    "Pass a factory and how many it makes, such as (lambda: nn.Linear(84, 84), num_experts=8), or the modules "
    "themselves, such as ([nn.Linear(84, 84), nn.Linear(84, 84)])."
)


class Experts(nn.Module, ABC):
    """A number of experts, each mapping items of one shape to outputs of one shape."""

    num_experts: int
    stacked: ClassVar[bool] = False
    """Whether parameters hold all experts along their first dimension, instead of being one expert's each.

    What is left is a vector, a matrix ``(inputs, outputs)`` as a grouped product takes it, or a convolution's filter.
    """

    @abstractmethod
    def output_shape(self, item_shape: Shape) -> Shape:
        """Return the shape of one output for items of a shape, without computing anything.

        Raises:
            ValueError: If the experts do not take such items, or their output shapes differ.
        """

    @abstractmethod
    def forward(
        self, rows: Float[Tensor, "assignments *item"], tokens_per_expert: Int[Tensor, " experts"]
    ) -> Float[Tensor, "assignments *out"]:
        """Run each expert on its group of rows; rows past the last group give zeros.

        An expert without rows has a gradient of zero, never None, and its buffers do not change.
        """

    def forward_routed(
        self, x: Float[Tensor, "tokens *item"], routing: Routing
    ) -> tuple[Float[Tensor, "tokens *out"], Routing] | None:
        """Go the whole way from tokens to weighted sums at once, where that takes fewer passes over memory.

        A layer asks for this first. None stands for no such way: it then dispatches rows, calls the experts and
        combines, which computes the same.

        Args:
            x: Items.
            routing: None of its assignments is dropped.

        Returns:
            One output per token, and the routing grouped by expert; or None.
        """
        return None

    def reset_parameters(self) -> None:
        """Initialise every expert as construction does, each of its modules by its own ``reset_parameters``.

        Raises:
            ValueError: If a tensor belongs to a module without that method.
        """
        reset_parts(self)

    @abstractmethod
    def keep(self, start: int, stop: int) -> None:
        """Keep the experts from `start` to before `stop`, and forget the others.

        Parameters of single experts keep their names, those of stacked experts become shorter.
        """


def check_experts(experts: object) -> None:
    """Refuse what is not a layer's experts.

    Raises:
        ValueError: If they are not `Experts`.
    """
    if not isinstance(experts, Experts):
        raise ValueError(
            f"A layer's experts are a gatewright.Experts, which gives each its own rows; got {type(experts).__name__}. "
            f"Use gatewright.GroupedFeedForward, or wrap modules in gatewright.ModuleExperts. {_FORMS}"
        )


def make_modules(experts: Callable[[], nn.Module] | Iterable[nn.Module], num_experts: int | None) -> list[nn.Module]:
    """Call a factory once per expert, or take the modules given.

    Raises:
        ValueError: If there is no expert, or one module in place of several; if the factory returns the same module
            twice; or if num_experts is missing or disagrees with the modules given.
    """
    if isinstance(experts, Iterable):
        modules = list(experts)
        if num_experts not in (None, len(modules)):
            raise ValueError(
                f"num_experts ({num_experts}) is not the number of modules given ({len(modules)}). {_FORMS}"
            )
    elif isinstance(experts, nn.Module):
        raise ValueError(f"One {type(experts).__name__} cannot be every expert: each is a module of its own. {_FORMS}")
    elif num_experts is None:
        raise ValueError("A factory of experts needs num_experts: pass how many to make, such as num_experts=8.")
    else:
        modules = [experts() for _ in range(num_experts)]
    if not modules:
        raise ValueError("A layer needs at least one expert; got none.")
    if len({id(module) for module in modules}) < len(modules):
        raise ValueError(
            "Each expert is a module of its own; the same one was given twice. Pass a factory that makes a new module "
            "on each call, such as lambda: nn.Linear(84, 84)."
        )
    return modules


def output_shape_of(name: str, module: nn.Module, item_shape: Shape) -> Shape:
    """Shape of one output row.

    Raises:
        ValueError: If the module does not take such items, or does not return one row per row.
    """
    kind = type(module).__name__
    try:
        output = output_for_zeros(module, item_shape, rows=2)
    except Exception as error:
        raise ValueError(
            f"{name[0].upper()}{name[1:]} ({kind}) does not take items of shape {item_shape}: {error}"
        ) from error
    if not isinstance(output, Tensor) or output.dim() < 1 or output.shape[0] != 2:
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"An expert returns one tensor with one row per row it gets; for 2 rows of shape {item_shape}, {name} "
            f"({kind}) returns {found}. Wrap it in a module that does."
        )
    return tuple(output.shape[1:])


def output_for_zeros(module: nn.Module, item_shape: Shape, rows: int) -> Any:
    """Run a copy of a module in evaluation mode, so that no buffer changes.

    It runs on the meta device; a module that looks at values, such as a mixture, runs once more where it is.
    """
    try:
        return _run(copy.deepcopy(module).to("meta"), item_shape, rows)
    except Exception:
        return _run(copy.deepcopy(module), item_shape, rows)


@torch.no_grad()
def _run(module: nn.Module, item_shape: Shape, rows: int) -> Any:
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    return module.eval()(torch.zeros(rows, *item_shape, device=like.device, dtype=like.dtype))


def check_output_shape(name: str, module: nn.Module, item_shape: Shape, expected: Shape) -> None:
    """Refuse a module whose output cannot be added to a mixture's.

    Raises:
        ValueError: If it does not return outputs of the expected shape.
    """
    shape = output_shape_of(name, module, item_shape)
    if shape != expected:
        raise ValueError(
            f"The outputs of the experts and of {name} are added; for items of shape {item_shape} the experts return "
            f"{expected} and {name} ({type(module).__name__}) returns {shape}. Make them agree."
        )
