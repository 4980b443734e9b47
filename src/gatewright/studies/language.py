"""Whether a mixture pays in a small language model, and what of it does."""

from gatewright.studies.study import Arm, Study, Tier

RECIPE = "python-lm"
GLANCE = "--epochs 2 --data.epoch-batches 5 --model.num-layers 1 --data.holdout 0.001"
"""What makes runs of the recipe so short that one sees it work."""
SMALL = "--epochs 3 --model.num-layers 2 --model.dim 96 --model.num-heads 3"
"""What makes runs of the recipe so short that a CPU makes many."""
LONG = "--epochs 12 --precision bfloat16"
SLOW, QUICK = "--optim.lr 0.02", "--optim.lr 0.04"
TUNED = {
    "dense": SLOW,
    "dense-wide": SLOW,
    "learned": SLOW,
    "gated-hash": QUICK,
    "gated-hash-2": SLOW,
    "fine-gated-hash-2": SLOW,
}
"""The better of two rates, by the held-out text with seed 0 (`answer` has all of them)."""
BIASED = "--model.router biased --model.router-options bias_rate 0.01 normalize true"

ANSWER = """\
At equal operations a mixture wins. On the H200, with Muon and two rates tried for every arm, the learned router's test
figure is 5 % below the dense twin's, and its held-out figure reaches the twin's after 0.71 of the twin's operations. A
dense network whose feed-forward layers do twice the operations stays between them. Three seeds are few: the test
figures of one arm spread by 2 %, and no difference of test figures has a p-value below 0.05.

The H200's runs were made by worker processes with the settings below, and the CPU's by `gatewright train`, beside other
work.

On the CPU, after 8 epochs and with one rate for both, the recipe is 3.6 % below its twin with each of two seeds.

No choice of experts beats a hash of the byte whose experts a learned gate weighs: in the seeds that both have, the
learned router is 2 % above it in the test figure, and 0.5 % in the held-out one. Keys of two bytes help with AdamW, and
with Muon they are worse than keys of one.

Held-out bits per byte of each trial with seed 0, by the rate of Muon:

| arm | 0.02 | 0.04 | 0.08 |
| --- | --- | --- | --- |
| `dense` | 1.416 | 1.439 | 1.444 |
| `dense-wide` | 1.391 | 1.403 | |
| `learned` | 1.342 | 1.343 | |
| `gated-hash` | 1.355 | 1.340 | |
| `gated-hash-2` | 1.376 | 1.385 | |
| `fine-gated-hash-2` | 1.340 | 1.347 | |

With AdamW in float32, for all of the same length, `dense` reached 1.702, 1.601, 1.570 and 1.680 at the rates 0.001,
0.002, 0.004 and 0.008, `learned` 1.533, 1.552 and 1.697 from 0.002 on, `gated-hash` 1.546 and 1.515, and `gated-hash-2`
1.469 at 0.004. So Muon is worth more than any of these mixtures."""

LANGUAGE = Study(
    name="language",
    answer=ANSWER,
    question=(
        "A language model of Python's sources, byte by byte: is a mixture of experts better than its dense twin of the "
        "same operations, and after the same time? Does it matter which experts a byte goes to, or would a hash of the "
        "byte do? All arms but dense-wide do the same arithmetic for a byte."
    ),
    twin="dense",
    arms=(
        Arm("dense", "one feed-forward in each layer", RECIPE, "--model.num-experts 1"),
        Arm(
            "dense-wide",
            "dense, twice the operations of a feed-forward",
            RECIPE,
            "--model.num-experts 1 --model.ffn 1536",
        ),
        Arm("learned-4", "2 of 4 experts, top-k", RECIPE, "--model.num-experts 4"),
        Arm("learned", "2 of 8 experts, top-k: the recipe", RECIPE),
        Arm("learned-top-1", "1 of 8 experts, top-k", RECIPE, "--model.top-k 1 --model.router-options"),
        Arm("learned-16", "2 of 16 experts, top-k", RECIPE, "--model.num-experts 16"),
        Arm("fine-32", "4 of 32 experts of half the size, top-k", RECIPE, "--model.num-experts 32 --model.top-k 4"),
        Arm(
            "fine-64",
            "8 of 64 experts of a quarter of the size, top-k",
            RECIPE,
            "--model.num-experts 64 --model.top-k 8",
        ),
        Arm("low-balance", "2 of 8 experts, a balance loss of 0.001", RECIPE, "--model.losses load_balance 0.001"),
        Arm("biased", "2 of 8 experts, the loss-free bias", RECIPE, BIASED),
        Arm(
            "biased-32",
            "4 of 32 experts, the loss-free bias",
            RECIPE,
            f"--model.num-experts 32 --model.top-k 4 {BIASED}",
        ),
        Arm(
            "shared",
            "2 of 8 experts, and one for every byte: half as much again of a layer's operations",
            RECIPE,
            "--model.shared",
        ),
        Arm("hashed", "2 of 8 experts, by a hash of the byte, equal weights", RECIPE, "--model.router hashed"),
        Arm(
            "gated-hash",
            "2 of 8 experts, by a hash of the byte, weights from a learned gate",
            RECIPE,
            "--model.hashed-layers 4",
        ),
        Arm(
            "gated-hash-32",
            "4 of 32 experts, by a hash of the byte, weights from a learned gate",
            RECIPE,
            "--model.hashed-layers 4 --model.num-experts 32 --model.top-k 4",
        ),
        Arm(
            "fine-gated-hash-2",
            "4 of 32 experts, by a hash of the byte and the one before, weights from a learned gate",
            RECIPE,
            "--model.hashed-layers 4 --model.num-experts 32 --model.top-k 4 --model.key-length 2",
        ),
        Arm(
            "gated-hash-2",
            "2 of 8 experts, by a hash of the byte and the one before, weights from a learned gate",
            RECIPE,
            "--model.hashed-layers 4 --model.key-length 2",
        ),
        Arm(
            "token-gate",
            "2 of 8 experts, learned, from logits of the byte that begin as a hash",
            RECIPE,
            "--model.token-gate --model.hash-start 2 --model.losses load_balance 0.001",
        ),
        Arm(
            "fine-token-gate",
            "4 of 32 experts, learned, from logits of the byte that begin as a hash",
            RECIPE,
            "--model.token-gate --model.hash-start 2 --model.losses load_balance 0.001 --model.num-experts 32 "
            "--model.top-k 4",
        ),
        Arm(
            "hash-then-learned",
            "the first two layers as gated-hash, the others as biased",
            RECIPE,
            f"--model.hashed-layers 2 {BIASED}",
        ),
    ),
    tiers={
        "try": Tier(
            about="a minute of a CPU, to see it work",
            flags={RECIPE: "--epochs 2 --data.epoch-batches 5 --data.holdout 0.001"},
            arms=("dense", "learned", "gated-hash"),
        ),
        "cpu": Tier(
            about="two hours of two CPU cores",
            seeds=(0, 1, 2),
            arms=("dense", "learned"),
        ),
        "cpu-time": Tier(
            about="half an hour of two CPU cores",
            arms=("dense", "learned", "gated-hash"),
            alone=True,
        ),
        "gpu": Tier(
            about="eight minutes of one H200, with --jobs 15",
            flags={RECIPE: LONG},
            tuned=TUNED,
            seeds=(0, 1, 2),
            arms=tuple(TUNED),
        ),
        "gpu-all": Tier(
            about="half an hour of one H200, with --jobs 15",
            flags={RECIPE: LONG},
            seeds=(0, 1, 2),
        ),
        "gpu-time": Tier(
            about="eight minutes of one H200",
            flags={RECIPE: LONG},
            tuned=TUNED,
            arms=("dense", "learned", "gated-hash"),
            alone=True,
        ),
    },
)
