"""Accuracy against seconds on CIFAR-10: a mixture, its dense twin, and the network of the dense record.

The record is https://github.com/KellerJordan/cifar10-airbench.
"""

from gatewright.studies.study import Arm, Study, Tier

RECIPE = "cifar10-fast"
ROUTED = (
    "--model.experts modules --model.top-k 1 --model.router-options --model.losses load_balance 0.01 "
    "--model.upcycle-epoch 3 --model.mixture-blocks 1"
)
RECORD = "--model.widths 64 256 256"

SPEEDRUN = Study(
    name="speedrun",
    question=(
        "How many seconds does CIFAR-10 take to an accuracy? The dense record is airbench94 by Keller Jordan; `record` "
        "has its widths, and the recipe cifar10-fast a quarter to a half of them, in training of the same kind. Runs "
        "are made one at a time."
    ),
    twin="dense",
    arms=(
        Arm("record", "dense, with the widths of the record's network", f"{RECIPE}-dense", RECORD),
        Arm("dense", "the dense twin", f"{RECIPE}-dense"),
        Arm("routed", "one of four last blocks, copied from a dense one", RECIPE, ROUTED),
        Arm("merged", "four filters, mixed for each image in the last two blocks: the recipe", RECIPE),
    ),
    tiers={
        "try": Tier(
            about="minutes of a CPU, to see it work",
            flags={RECIPE: "--epochs 1", f"{RECIPE}-dense": "--epochs 1"},
            arms=("dense",),
        ),
        "cpu": Tier(about="two hours of two CPU cores", alone=True, arms=("record", "dense", "routed")),
        "gpu": Tier(about="eight minutes of one H200", alone=True, seeds=(0, 1, 2)),
    },
)
