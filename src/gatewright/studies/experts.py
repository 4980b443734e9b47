"""1 to 256 experts, of which each byte has two."""

from gatewright.studies.language import GLANCE, SMALL
from gatewright.studies.study import Arm, Study, Tier

RECIPE = "python-lm"
NUMBERS = (4, 8, 16, 32, 64, 128, 256)

ANSWER = """\
More experts are better, for the same work of experts on a byte: the test figure falls from 2.25 bits per byte to 2.13
with 8 experts (-5.2 %), 2.05 with 32 (-9.0 %) and 2.02 with 256 (-10.5 %). The gates' own operations grow, so that at
equal operations 64 experts are best (held out -11.3 %), which reach the twin's quality after 0.64 of its operations.

Load is less even the more experts there are: with 32 the busiest has up to 4 times the mean, with 256 up to 33 times,
and the balance loss of 0.01 is too weak for so many. Two seeds were run, of a small model (two layers, 96 wide) for
three epochs; seconds were not compared."""

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
            flags={RECIPE: GLANCE},
            arms=("1", "8"),
        ),
        "cpu": Tier(
            about="three quarters of an hour of two CPU cores",
            flags={RECIPE: SMALL},
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
