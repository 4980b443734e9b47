"""Time whole training steps, the optimizer's included, beside those of dense twins: ``python -m benchmarks.steps``.

On a CPU these are steps of the recipes python-lm and cifar10-resnets (on random images), and on a GPU those of a larger
language model, compiled too. Data are made beforehand.
"""

import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.arms import go_by
from benchmarks.command import chosen, parser
from benchmarks.compare import say
from benchmarks.results import record
from benchmarks.scaling import milliseconds
from benchmarks.timing import interleave, quartiles
from gatewright import aux_loss
from gatewright.models import TransformerConfig

Step = Callable[[], object]
MIXTURE = TransformerConfig(num_experts=8, top_k=2, num_layers=6, dim=384, num_heads=6, router="top-k")
BATCH, LENGTH, VOCABULARY, WARM_UP = 64, 512, 257, 2


def transformer_step(config: TransformerConfig, way: str | None, mode: str | None = None) -> Step:
    """Return a training step in bfloat16 on a GPU: loss, backward, clipping and AdamW; a mode is `torch.compile`'s."""
    torch.manual_seed(0)
    tokens = torch.randint(0, 256, (BATCH, LENGTH + 1), device="cuda")
    tokens[:, 0] = 256
    model = config.build(VOCABULARY, 256, 256).cuda().train()
    go_by(model, way)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    forward = torch.compile(model, mode=mode) if mode else model

    def step() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            logits = forward(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss = loss + aux_loss(model) if config.num_experts > 1 else loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def transformer_steps() -> dict[str, Callable[[], Step]]:
    """Return what makes the steps on a GPU."""
    dense, hashed = replace(MIXTURE, num_experts=1), replace(MIXTURE, router="hashed")
    make = partial(partial, transformer_step)
    return {
        "dense": make(dense, None),
        "dense, compiled": make(dense, None, "default"),
        "dense, CUDA graphs": make(dense, None, "reduce-overhead"),
        "mixture, rows": make(MIXTURE, "rows"),
        "mixture, torch": make(MIXTURE, "torch"),
        "mixture, triton": make(MIXTURE, "triton"),
        "mixture, triton, compiled": make(MIXTURE, "triton", "default"),
        "mixture, triton, CUDA graphs": make(MIXTURE, "triton", "reduce-overhead"),
        "hashed, triton": make(hashed, "triton"),
        "hashed, triton, CUDA graphs": make(hashed, "triton", "reduce-overhead"),
    }


def cases_of(device: str) -> list[tuple[str, Callable[[], dict[str, Callable[[], Step]]]]]:
    """Return what makes the steps of every case."""
    if device == "cuda":
        return [("transformer", transformer_steps)]
    from benchmarks.recipes import recipe_steps  # Their packages may be missing beside a GPU.

    return [(name, partial(recipe_steps, name)) for name in ("python-lm", "cifar10-resnets")]


def warmed(name: str, make: Callable[[], Step]) -> Step | None:
    """Return the step after some have run, or None where it failed, which is printed."""
    try:
        step = make()
        for _ in range(WARM_UP):
            step()
    except Exception:
        say(name, "failed:")
        traceback.print_exc()
        return None
    return step


def main() -> None:
    """Warm every arm, time all in turn, and print quartiles."""
    asked = parser("benchmarks.steps", __doc__, seconds=25.0).parse_args()
    cases, device = cases_of(asked.device), torch.device(asked.device)
    for case, arms in chosen(asked, cases, cases[0]):
        steps = {name: step for name, make in arms().items() if (step := warmed(name, make))}
        timed = {name: (lambda step=step: milliseconds(step, device)) for name, step in steps.items()}
        found = {name: quartiles(times) for name, times in interleave(timed, asked.seconds).items()}
        for name, (low, middle, high) in found.items():
            say(f"{case}, {name:<28} {middle:8.2f} ms ({low:.2f} to {high:.2f})")
        record("steps", case, asked.device, {"model": case, "ms": found}, asked.output)


if __name__ == "__main__":
    main()
