"""Hugging Face's hub: trained models as folders with weights, settings and a model card."""

from gatewright.integrations.hub.pretrained import PretrainedModel

__all__ = ["PretrainedModel"]
