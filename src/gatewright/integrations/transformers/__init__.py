"""Hugging Face transformers: Gatewright's feed-forward as the back-end of its mixtures of experts."""

from gatewright.integrations.transformers.experts import experts_forward, register

__all__ = ["experts_forward", "register"]
