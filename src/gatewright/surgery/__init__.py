"""Trained models changed in place: dense modules become mixtures, and mixtures get other experts or become dense."""

from gatewright.surgery.experts import grow, prune, select
from gatewright.surgery.feed_forward import FeedForward, expose_feed_forward
from gatewright.surgery.merge import densify, merge
from gatewright.surgery.partition import partition
from gatewright.surgery.scores import expert_scores
from gatewright.surgery.split import add_noise, reinitialize
from gatewright.surgery.upcycle import upcycle, upcycled_state

__all__ = [
    "FeedForward",
    "add_noise",
    "densify",
    "expert_scores",
    "expose_feed_forward",
    "grow",
    "merge",
    "partition",
    "prune",
    "reinitialize",
    "select",
    "upcycle",
    "upcycled_state",
]
