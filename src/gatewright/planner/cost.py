"""The costs of communication: pure formulas, each of one line or two. Bytes, seconds, and nothing of torch.

Symbols are those of docs/plan.md: W processes in a group, on G nodes of L each; alpha seconds per message and B bytes
per second of a link.
"""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Links:
    """The links between the processes.

    Args:
        ranks_per_node: Processes of one node, whose links are the inside ones.
        inside: Bandwidth inside a node, in bytes per second that one process sends.
        between: Bandwidth between nodes, in the same unit.
        inside_latency: Seconds per message inside a node.
        between_latency: Seconds per message between nodes.
        exchange: ``"flat"``: every row travels to its expert's process, as Gatewright sends it. ``"per-node"``: one
            copy of a token travels to each node that needs it, as DeepEP sends it.
    """

    ranks_per_node: int = 8
    inside: float = 450e9
    between: float = 50e9
    inside_latency: float = 0.0
    between_latency: float = 0.0
    exchange: Literal["flat", "per-node"] = "flat"

    def __post_init__(self) -> None:
        if self.ranks_per_node < 1 or min(self.inside, self.between) <= 0:
            raise ValueError(
                f"A node has at least 1 process and a link more than 0 bytes per second; got {self.ranks_per_node}, "
                f"{self.inside} inside and {self.between} between nodes. Give `links.inside` and `links.between`."
            )
        if self.exchange not in ("flat", "per-node") or min(self.inside_latency, self.between_latency) < 0:
            raise ValueError(
                f"exchange is 'flat' or 'per-node' and latencies are not negative; got {self.exchange!r}, "
                f"{self.inside_latency} and {self.between_latency}."
            )

    def nodes(self, extent: int) -> int:
        """Return how many nodes a stretch of consecutive ranks lies on, if it begins where a node does."""
        return math.ceil(extent / self.ranks_per_node)


def copies_to_other_nodes(nodes: int, top_k: int) -> float:
    """Return how many other nodes hold an expert of a token, on average: ``(G-1)/G * G (1 - (1 - 1/G)^k)``.

    As if each of the k drew its node anew; k different experts meet a few more.
    """
    return (nodes - 1) * (1 - (1 - 1 / nodes) ** top_k)


def random_imbalance(bins: int, mean: float) -> float:
    """Return the largest load over the mean one that random routing leaves: ``1 + sqrt(2 ln bins / mean)``.

    The largest of many Gaussian deviations of a count of variance ``mean``; loose where the mean is small. Bins are
    experts, or processes that hold experts.
    """
    return 1 + math.sqrt(2 * math.log(bins) / mean) if bins > 1 else 1.0


def all_to_all_seconds(tokens: float, top_k: int, row_bytes: float, group: int, links: Links) -> float:
    """Return the time of one trip of a process's rows to the processes of its group, or back.

    Flat, ``alpha (W - 1) + V / B`` with ``V = T k d b (1 - 1/W)``, where peers inside the node and on others each count
    with their own link, one after the other. Per node, ``alpha_s (G - 1) + T D d b / B_s + alpha_f (L - 1) +
    T k d b / B_f`` with D from `copies_to_other_nodes`.

    Args:
        tokens: Tokens of one process.
        top_k: Rows per token.
        row_bytes: Bytes of a row, ``d b``.
        group: Number of processes, W.
        links: The links between them.
    """
    if group == 1:
        return 0.0
    nodes = links.nodes(group)
    near, far = math.ceil(group / nodes) - 1, group - math.ceil(group / nodes)
    if links.exchange == "per-node" and nodes > 1:
        slow = tokens * copies_to_other_nodes(nodes, top_k) * row_bytes
        fast = tokens * top_k * row_bytes if near else 0.0
        far = nodes - 1
    else:
        slow, fast = (tokens * top_k * row_bytes * peers / group for peers in (far, near))
    inside = links.inside_latency * near + fast / links.inside
    return inside + links.between_latency * far + slow / links.between


def all_reduce_bytes(payload: float, group: int) -> float:
    """Return the bytes that each process of a group sends to add up ``payload`` bytes in a ring: ``2 (W-1)/W``."""
    return 2 * (group - 1) / group * payload


def all_reduce_seconds(payload: float, group: int, links: Links, stride: int = 1) -> float:
    """Return the time of a ring all-reduce, ``2 (W-1) alpha + 2 (W-1)/W payload / B``, of the slowest link on the ring.

    Args:
        payload: Number of bytes to add up.
        group: Number of processes, W.
        links: The links between them.
        stride: Number of ranks between neighbours in the group.
    """
    if group == 1 or payload == 0:
        return 0.0
    apart = links.nodes((group - 1) * stride + 1) > 1
    latency, bandwidth = (links.between_latency, links.between) if apart else (links.inside_latency, links.inside)
    return 2 * (group - 1) * latency + all_reduce_bytes(payload, group) / bandwidth
