"""Shazeer's Table 6 on text of ours: what the balance losses do to the load, and to the quality."""

from gatewright.studies.language import GLANCE, SMALL
from gatewright.studies.study import Arm, Study, Tier

RECIPE = "python-lm"
NOISY = "--model.router noisy-top-k --model.losses"
STRENGTHS = ("0.01", "0.1", "1.0")

ANSWER = """\
The paper's ordering comes out. Without a loss the busiest expert has 1.8 and 3.2 times the mean load in the two layers,
and the model is worse than with any loss of 0.01 or 0.1, by up to 2 %. Which of these it is matters little, as in
the paper. With these coefficients the load loss balances better than the importance loss, and both together hardly
better than it alone.

Two things the paper does not say: with a coefficient of 1.0 the losses are 5 to 9 % worse than no loss at all, and
balance worse than with 0.1. And the bias without a loss balances as well as the load loss, at about the same quality.
One seed was run."""

BALANCE = Study(
    name="balance",
    answer=ANSWER,
    question=(
        "Shazeer et al. 2017 (arXiv 1701.06538, Table 6) trained a language model with their noisy "
        "top-k gate and several coefficients of the importance and the load loss. Without a loss the load was uneven "
        "and the model worse; with any of them the quality was about the same. Does that hold here, and where does the "
        "bias without a loss stand?"
    ),
    twin="no-loss",
    arms=(
        Arm("no-loss", "no balance loss", RECIPE, NOISY),
        *(Arm(f"importance-{each}", f"importance {each}", RECIPE, f"{NOISY} importance {each}") for each in STRENGTHS),
        *(Arm(f"load-{each}", f"load {each}", RECIPE, f"{NOISY} load {each}") for each in STRENGTHS),
        *(
            Arm(f"both-{each}", f"importance and load {each}", RECIPE, f"{NOISY} importance {each} load {each}")
            for each in STRENGTHS
        ),
        Arm(
            "biased",
            "the router biased: no loss, a bias",
            RECIPE,
            "--model.router biased --model.router-options bias_rate 0.01",
        ),
    ),
    tiers={
        "try": Tier(
            about="a minute of a CPU, to see it work",
            flags={RECIPE: GLANCE},
            arms=("no-loss", "both-0.1"),
        ),
        "cpu": Tier(
            about="half an hour of two CPU cores",
            flags={RECIPE: SMALL},
            seeds=(0, 1, 2),
        ),
        "gpu": Tier(
            about="eight minutes of one H200",
            flags={RECIPE: "--epochs 8 --data.context 256 --data.batch-size 64 --precision bfloat16"},
            seeds=(0, 1, 2),
        ),
    },
)
