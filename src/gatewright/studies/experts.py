"""1 to 256 experts, of which each byte has two."""

from gatewright.studies.study import Arm, Study, Tier

RECIPE = "python-lm"
NUMBERS = (4, 8, 16, 32, 64, 128, 256)

ANSWER = """\
At equal operations more experts are better up to 128 of them: the test figure falls from 2.25 bits per byte to 2.01, by
10.6 %, and the held-out figure by more than 11 %. With 256 the gates and their operations cost more than the experts
bring. Even two experts that both work on every byte, weighed by the gate, are 1.3 % better than one of their size
together.

Load is less even the more experts there are: with 32 the busiest has 4 times the mean, with 256 up to 30 times, and the
balance loss of 0.01 is too weak for so many. One seed was run, of a small model (two layers, 96 wide) for three epochs;
seconds were not compared."""

EXPERTS = Study(
    name="experts",
    answer=ANSWER,
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
