"""Hugging Face transformers: Gatewright's feed-forward in its mixtures of experts, and these as Gatewright's layers."""

from gatewright.integrations.transformers.blocks import MixtureBlock, from_transformers, to_transformers
from gatewright.integrations.transformers.experts import experts_forward, register

__all__ = ["MixtureBlock", "experts_forward", "from_transformers", "register", "to_transformers"]
