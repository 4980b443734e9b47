"""BatchNorm over a batch that is spread over processes. Torch's own refuses CPU, and counts no rows."""

from collections.abc import Collection

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gatewright.experts import ModuleExperts
from gatewright.experts.base import Shape, output_for_zeros
from gatewright.scope import BatchScope


class SyncBatchNorm(_BatchNorm):
    """BatchNorm with the mean and variance of all processes' rows, however many each of them has.

    https://arxiv.org/abs/1502.03167 algorithm 1, with sums instead of means, so that a process may have no rows at all.
    A single value per channel on all of them together has no variance: running statistics serve for that call, and
    neither then nor without any rows do they change. Parameters and buffers have the names that they have in torch's.
    It computes in at least float32, whatever the types of input, parameters and statistics, of which torch's takes no
    two on the CPU.
    """

    scope: BatchScope
    """The processes whose rows count."""

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 - torch's name
        """Take any number of dimensions: the module that this one replaces has been there before."""

    def forward(
        self,
        input: Float[Tensor, "batch channels *space"],  # noqa: A002 - torch's name
    ) -> Float[Tensor, "batch channels *space"]:
        """Normalise each channel."""
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        if not self.training and self.running_mean is not None:
            return self._by_running_statistics(wide).to(input.dtype)
        dims = [0, *range(2, input.dim())]
        shape = [1, -1, *[1] * (input.dim() - 2)]
        rows = wide.new_tensor(wide.numel() / wide.shape[1])
        total, count = self.scope.sum(wide.sum(dims), rows)
        mean = total / count.clamp(min=1)
        centred = wide - mean.view(shape)
        (squares,) = self.scope.sum(centred.square().sum(dims))
        variance = squares / count.clamp(min=1)
        shift = torch.zeros_like(mean)
        if self.training and self.running_mean is not None and self.running_var is not None:
            shift = torch.where(count == 1, mean - self.running_mean.to(mean), shift)
            variance = torch.where(count == 1, self.running_var.to(mean), variance)
            self._track(mean, squares / (count - 1).clamp(min=1), count)
        scale = (variance + self.eps).rsqrt()
        if self.affine:
            scale, shift = scale * self.weight, shift * scale * self.weight + self.bias
        else:
            shift = shift * scale
        return torch.addcmul(shift.view(shape), centred, scale.view(shape)).to(input.dtype)

    def _by_running_statistics(self, wide: Tensor) -> Tensor:
        found = (self.running_mean, self.running_var, self.weight, self.bias)
        mean, variance, weight, bias = (None if tensor is None else tensor.to(wide.dtype) for tensor in found)
        return F.batch_norm(wide, mean, variance, weight, bias, eps=self.eps)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        assert self.num_batches_tracked is not None
        tracked = count > 1
        self.num_batches_tracked += tracked
        for running, found in ((self.running_mean, mean), (self.running_var, variance)):
            assert running is not None
            batches = self.num_batches_tracked.clamp(min=1).to(running)
            factor = 1 / batches if self.momentum is None else self.momentum
            running.lerp_(found.to(running), tracked.to(running) * factor)


def synchronize_batch_norm(module: nn.Module, scope: BatchScope, *, leave: Collection[nn.Module] = ()) -> None:
    """Replace every BatchNorm of torch's below a module; parameters, buffers and hooks stay the same objects.

    Args:
        module: The module in which they are replaced, in place.
        scope: The processes whose rows count.
        leave: Modules below it that stay as they are, with all that is in them.
    """
    for name, child in list(module.named_children()):
        if isinstance(child, _BatchNorm) and not isinstance(child, SyncBatchNorm):
            synchronized = SyncBatchNorm.__new__(SyncBatchNorm)
            synchronized.__dict__.update(child.__dict__, scope=scope)
            setattr(module, name, synchronized)
        elif child not in leave:
            synchronize_batch_norm(child, scope, leave=leave)


def synchronize_experts(experts: ModuleExperts, item_shape: Shape, scope: BatchScope) -> None:
    """Replace every BatchNorm inside experts that other processes hold copies of.

    From now on an expert without rows is called too, because its copies elsewhere wait for its sums.

    Args:
        experts: The experts whose norms are replaced in place; without a BatchNorm they stay as they are.
        item_shape: Shape of one item.
        scope: The processes that hold copies.

    Raises:
        ValueError: If an expert cannot be called on none.
    """
    if not any(isinstance(module, _BatchNorm) for module in experts.modules()):
        return
    for index, expert in enumerate(experts.experts):
        try:
            output_for_zeros(expert, item_shape, rows=0)
        except Exception as error:
            raise ValueError(
                f"Expert {index} ({type(expert).__name__}) has a BatchNorm that is synchronised over processes, so it "
                f"is called where it has no rows too, which fails: {error}. Make it take a batch of none, such as by "
                "x.flatten(1) in place of x.view(len(x), -1), or leave its statistics unsynchronised "
                "(ParallelConfig.batch_norm='local')."
            ) from error
    experts.call_idle = True
    synchronize_batch_norm(experts, scope)
