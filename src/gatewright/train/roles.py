"""The role of each parameter of a model, by the module that holds it and not by how many dimensions it has."""

from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from gatewright.experts import Experts
from gatewright.routers import Router, Soft
from gatewright.routers.gate import Gate

Role = Literal["matrix", "filter", "stacked matrix", "stacked filter", "gate", "embedding", "norm", "bias", "other"]

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
ROUTERS = (Router, Soft)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def parameter_roles(model: nn.Module) -> dict[nn.Parameter, Role]:
    """Return the role of every parameter of a model, in the order of its parameters.

    A parameter that several modules share is a gate or an embedding if it is one in any of them: the output layer of a
    language model that is tied to its embedding has the embedding's role.
    """
    roles: dict[nn.Parameter, Role] = {}
    # Some modules claim their parameters whoever else has them, so they come before the others.
    claiming = [module for module in model.modules() if isinstance(module, (*ROUTERS, *EMBEDDINGS))]
    for module in (*claiming, *model.modules()):
        whole = isinstance(module, ROUTERS) or (isinstance(module, Experts) and module.stacked)
        for parameter in module.parameters(recurse=whole):
            roles.setdefault(parameter, _role(module, parameter))
    return {parameter: roles[parameter] for parameter in model.parameters()}


def _role(module: nn.Module, parameter: nn.Parameter) -> Role:
    stacked = isinstance(module, Experts) and module.stacked
    dimensions = parameter.dim() - stacked  # of one expert's part
    if isinstance(module, NORMS):
        return "norm"
    if dimensions <= 1:
        return "bias"
    if isinstance(module, (*ROUTERS, Gate)):
        return "gate"
    if isinstance(module, EMBEDDINGS):
        return "embedding"
    if dimensions == 2:
        return "stacked matrix" if stacked else "matrix"
    if stacked:
        return "stacked filter"
    return "filter" if isinstance(module, _ConvNd) else "other"
