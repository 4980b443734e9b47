"""1 to 256 experts, of which each byte has two."""

from gatewright.studies.study import Arm, Study, Tier

RECIPE = "python-lm"
NUMBERS = (4, 8, 16, 32, 64, 128, 256)

EXPERTS = Study(
    name="experts",
    question=(
        "What do more experts bring, and what do they cost, where the operations for a byte stay the same? Two experts "
        "work on a byte in each layer, each half as wide as the feed-forward of the dense twin."
    ),
    twin="1",
    arms=(
        Arm("1", "the dense twin", RECIPE, "--model.num-experts 1"),
        Arm("2", "both experts for every byte", RECIPE, "--model.num-experts 2"),
        *(Arm(str(number), f"2 of {number} experts", RECIPE, f"--model.num-experts {number}") for number in NUMBERS),
    ),
    tiers={
        "try": Tier(
            about="a minute of a CPU, to see it work",
            flags={RECIPE: "--epochs 2 --data.epoch-batches 5 --model.num-layers 1 --data.holdout 0.001"},
            arms=("1", "8"),
        ),
        "cpu": Tier(
            about="three quarters of an hour of two CPU cores",
            flags={RECIPE: "--epochs 3 --model.num-layers 2 --model.dim 96 --model.num-heads 3"},
            seeds=(0, 1, 2),
        ),
        "gpu": Tier(
            about="eight minutes of one H200",
            flags={RECIPE: "--epochs 8 --data.context 256 --data.batch-size 64 --precision bfloat16"},
            seeds=(0, 1, 2),
        ),
        "gpu-time": Tier(
            about="eight minutes of one H200",
            flags={RECIPE: "--epochs 2 --data.context 256 --data.batch-size 64 --precision bfloat16"},
            alone=True,
        ),
    },
)
