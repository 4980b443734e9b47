"""Any `nn.Module` as an expert: equal or different ones, on items of any shape."""

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gatewright.experts.base import Experts, Shape, make_modules, output_shape_of
from gatewright.internals import is_batched, is_exporting
from gatewright.ops import expert_of_rows, in_memory_format, split_rows

_RESUME = "_gatewright_resume_batch_statistics"


class ModuleExperts(Experts):
    """Experts that are modules of your own.

    A BatchNorm inside an expert sees that expert's real rows and nothing else. Where that is a single value per channel
    (one row, no spatial extent), of which there is no variance and torch's forward refuses it, it uses its running
    statistics for that call. A BatchNorm with a forward of its own has a rule of its own.

    Args:
        experts: A factory, called once per expert so that each has its own initialisation, or the modules themselves,
            which may differ in everything but the shapes they take and return.
        num_experts: How many to make; with modules, leave it out.

    Raises:
        ValueError: If there is no expert, or one module in place of several; if the factory returns the same module
            twice; or if num_experts is missing or disagrees with the modules given.
    """

    call_idle = False
    """Whether an expert without rows is called too, on a batch of none, as where something in it waits for others."""

    def __init__(self, experts: Callable[[], nn.Module] | Iterable[nn.Module], num_experts: int | None = None) -> None:
        super().__init__()
        self.experts = nn.ModuleList(make_modules(experts, num_experts))
        self.num_experts = len(self.experts)
        for module in self.experts.modules():
            if isinstance(module, _BatchNorm):
                module.register_forward_pre_hook(_use_running_statistics_for_one_value)
                module.register_forward_hook(_resume_batch_statistics, always_call=True)

    def output_shape(self, item_shape: Shape) -> Shape:
        """Run every expert's copy on the meta device with two items, and compare what comes out."""
        shapes = [output_shape_of(f"expert {index}", expert, item_shape) for index, expert in enumerate(self.experts)]
        for index, shape in enumerate(shapes):
            if shape != shapes[0]:
                raise ValueError(
                    f"Experts of one layer return one shape, because their outputs are added; for items of shape "
                    f"{item_shape} expert 0 returns {shapes[0]} and expert {index} returns {shape}. Make them agree."
                )
        return shapes[0]

    def forward(
        self, rows: Float[Tensor, "assignments *item"], tokens_per_expert: Int[Tensor, " experts"]
    ) -> Float[Tensor, "assignments *out"]:
        """Call each expert that has rows once, on its rows.

        Where it cannot be read how many these are, under `torch.func.vmap` and in an exported program, each expert is
        called on every row, and what others' rows make of it is left out.

        Raises:
            RuntimeError: If it cannot be read, and a BatchNorm would take the statistics of rows that are others'.
        """
        if is_exporting() or is_batched(tokens_per_expert):
            return self._on_every_row(rows, tokens_per_expert)
        counts = tokens_per_expert.tolist()
        groups = split_rows(rows, [*counts, rows.shape[0] - sum(counts)])
        pairs = zip(self.experts, groups, strict=False)
        outputs = [expert(group) for expert, group in pairs if group.shape[0] or self.call_idle]
        idle = [p for expert, n in zip(self.experts, counts, strict=True) if n == 0 for p in expert.parameters()]
        return self._join(outputs, groups[-1], [groups[-1], *idle])

    def _on_every_row(self, rows: Tensor, tokens_per_expert: Tensor) -> Tensor:
        if self.training and any(isinstance(module, _BatchNorm) for module in self.experts.modules()):
            raise RuntimeError(
                "A BatchNorm inside an expert takes the statistics of its expert's rows, and in training under "
                "torch.func.vmap or torch.export it cannot be read which these are. Call model.eval() first, or use "
                "GroupNorm or LayerNorm."
            )
        index = expert_of_rows(tokens_per_expert.cumsum(0), rows.shape[0])
        outputs = [expert(rows) for expert in self.experts]
        joined = torch.zeros_like(outputs[0])
        for expert, output in enumerate(outputs):
            own = (index == expert).view(-1, *[1] * (output.dim() - 1))
            joined = torch.where(own, output, joined)
        return joined

    def keep(self, start: int, stop: int) -> None:
        """Keep a run of the experts, each under the name it had."""
        kept = nn.ModuleList()
        for index, expert in enumerate(self.experts):
            if start <= index < stop:
                kept.add_module(str(index), expert)
        self.experts, self.num_experts = kept, len(kept)

    def _join(self, outputs: list[Tensor], dropped: Tensor, unused: list[Tensor]) -> Tensor:
        """Concatenate the outputs, with zeros for rows that no expert saw; unused tensors get a gradient of zero."""
        shape = outputs[0].shape[1:] if outputs else self.output_shape(tuple(dropped.shape[1:]))
        like = outputs[0] if outputs else dropped
        parts = [*outputs, like.new_zeros(dropped.shape[0], *shape)]
        if trained := [tensor for tensor in unused if tensor.requires_grad]:
            nothing = torch.cat([tensor.reshape(-1)[:0].to(like.dtype) for tensor in trained])
            parts.append(nothing.reshape(0, *shape))  # No rows, but a way for a gradient.
        return in_memory_format(lambda *parts: torch.cat(parts), *parts)


def _use_running_statistics_for_one_value(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
    refuses_one = type(norm).forward is _BatchNorm.forward
    if norm.training and refuses_one and args[0].numel() == args[0].shape[1]:
        norm.training = False
        norm.__dict__[_RESUME] = True


def _resume_batch_statistics(norm: nn.Module, args: tuple[Tensor, ...], output: Tensor | None) -> None:
    if norm.__dict__.pop(_RESUME, False):
        norm.training = True
