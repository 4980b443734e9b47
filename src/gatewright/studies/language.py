"""Whether a mixture pays in a small language model, and what of it does."""

from gatewright.studies.study import Arm, Study, Tier

RECIPE = "python-lm"
LONG = "--epochs 10 --data.context 256 --data.batch-size 64 --data.epoch-batches 120 --precision bfloat16"
BIASED = "--model.router biased --model.router-options bias_rate 0.01 normalize true"

LANGUAGE = Study(
    name="language",
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
            "--model.router gated-hash",
        ),
        Arm(
            "gated-hash-32",
            "4 of 32 experts, by a hash of the byte, weights from a learned gate",
            RECIPE,
            "--model.router gated-hash --model.num-experts 32 --model.top-k 4",
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
            flags={RECIPE: "--epochs 2 --data.epoch-batches 5 --model.num-layers 1 --data.holdout 0.001"},
            arms=("dense", "learned", "gated-hash"),
        ),
        "cpu": Tier(
            about="two hours of two CPU cores",
            flags={RECIPE: "--epochs 6"},
            seeds=(0, 1, 2),
            arms=("dense", "learned", "hashed", "gated-hash", "hash-then-learned"),
        ),
        "cpu-time": Tier(
            about="an hour of two CPU cores, where nothing else runs",
            flags={RECIPE: "--epochs 6"},
            seeds=(0, 1),
            arms=("dense", "gated-hash"),
            alone=True,
        ),
        "gpu": Tier(
            about="eight minutes of one H200",
            flags={RECIPE: LONG},
            seeds=(0, 1, 2),
        ),
        "gpu-time": Tier(
            about="eight minutes of one H200",
            flags={RECIPE: LONG},
            arms=("dense", "learned", "gated-hash"),
            alone=True,
        ),
    },
)
