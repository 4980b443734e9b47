"""Time whole training steps of a language model: ``python3 -m benchmarks.steps``; figures go to ``$OUT/steps.json``.

The mixture's steps, the optimizer's included, stand beside those of its dense twin, which has one expert per layer.
"""

import json
import os
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatewright import aux_loss, moe_layers
from gatewright.models import TransformerConfig

BATCH, LENGTH, STEPS, ROUNDS, WARM_UP = 64, 512, 6, 5, 3
VOCABULARY = 257
MIXTURE = TransformerConfig(num_experts=8, top_k=2, num_layers=6, dim=384, num_heads=6, router="top-k")
Step = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Arm:
    """A model, and how it runs.

    Args:
        config: The model.
        backend: Of its experts; ``"rows"`` makes layers dispatch rows, as they do where nothing is fused.
        compiled: Whether torch.compile makes a program of it.
    """

    config: TransformerConfig
    backend: str | None = None
    compiled: bool = False


DENSE = replace(MIXTURE, num_experts=1)
ARMS = {
    "dense": Arm(DENSE),
    "dense compiled": Arm(DENSE, compiled=True),
    "mixture rows": Arm(MIXTURE, "rows"),
    "mixture torch": Arm(MIXTURE, "torch"),
    "mixture triton": Arm(MIXTURE, "triton"),
    "mixture compiled": Arm(MIXTURE, "triton", compiled=True),
    "hashed triton": Arm(replace(MIXTURE, router="hashed"), "triton"),
}


def build(arm: Arm) -> nn.Module:
    """Make an arm's model; every arm draws from the same seed."""
    torch.manual_seed(0)
    model = arm.config.build(VOCABULARY, 256, 256).cuda().train()
    for _, layer in moe_layers(model):
        if arm.backend == "rows":
            layer.experts.register_forward_hook(lambda *_: None)
        else:
            layer.experts.backend = arm.backend
    return model


def make_step(arm: Arm) -> Step:
    """Return a training step in bfloat16: loss, backward, clipping and AdamW."""
    model = build(arm)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    forward = torch.compile(model) if arm.compiled else model

    def step(tokens: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            logits = forward(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        if arm.backend is not None:
            loss = loss + aux_loss(model)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def warmed(name: str, arm: Arm, tokens: Tensor) -> Step | None:
    """Return the step after some have run, or None where it failed, which is printed."""
    try:
        step = make_step(arm)
        losses = [step(tokens) for _ in range(WARM_UP)]
        print(f"{name}: loss {losses[-1].item():.4f}", flush=True)
    except Exception:
        print(f"{name} failed:", flush=True)
        traceback.print_exc()
        return None
    return step


def milliseconds(step: Step, tokens: Tensor) -> float:
    """Time some steps, from an idle device to an idle device."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(STEPS):
        step(tokens)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / STEPS * 1e3


def main() -> None:
    """Warm every arm, time all in turn, and print medians."""
    tokens = torch.randint(0, 256, (BATCH, LENGTH + 1), device="cuda")
    tokens[:, 0] = 256
    steps = {name: step for name, arm in ARMS.items() if (step := warmed(name, arm, tokens))}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            times[name].append(milliseconds(step, tokens))
    Path(os.environ.get("OUT", "."), "steps.json").write_text(json.dumps(times, indent=1))
    medians = {name: statistics.median(each) for name, each in times.items()}
    for name, median in medians.items():
        ratios = ", ".join(f"{median / medians[twin]:.2f} of {twin}" for twin in list(ARMS)[:2] if twin in medians)
        spread = f"{min(times[name]):.2f} to {max(times[name]):.2f}"
        print(
            f"{name}: {median:.2f} ms ({spread}), {BATCH * LENGTH / median / 1e3:.2f} M tokens/s, {ratios}", flush=True
        )


if __name__ == "__main__":
    main()
