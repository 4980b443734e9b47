"""Mixtures against dense twins on CIFAR-10, upright and turned by quarters."""

from gatewright.studies.study import Arm, Study, Tier

ROUTED = (
    "--model.experts modules --model.top-k 1 --model.router-options --model.losses load_balance 0.01 "
    "--model.upcycle-epoch 3"
)
HALVED = "--model.experts modules --model.top-k 2 --model.losses load_balance 0.01 --model.upcycle-epoch 3"
FAST, ROTATE, VIT = "cifar10-fast", "cifar10-rotate", "cifar10-vit"

IMAGES = Study(
    name="images",
    question=(
        "Images of ten classes, upright or each turned by 0, 90, 180 or 270 degrees: is a mixture better than its "
        "dense twin at equal active operations? Merged kernels are mixed for each image and are not sparse. One of "
        "four whole blocks works as much as the dense one, and two of four work twice as much."
    ),
    twin="dense",
    arms=(
        Arm("dense", "one filter for all images", f"{FAST}-dense"),
        Arm("merged", "four filters, mixed for each image in the last two blocks", FAST),
        Arm("merged-last", "the same in the last block alone", FAST, "--model.mixture-blocks 1"),
        Arm(
            "routed-last",
            "one of four last blocks, copied from a dense one",
            FAST,
            f"{ROUTED} --model.mixture-blocks 1",
        ),
        Arm("routed", "one of four in each of the last two blocks, copied from dense ones", FAST, ROUTED),
        Arm("routed-two", "two of four in each of the last two blocks: twice the operations there", FAST, HALVED),
        Arm("rotate-dense", "turned images: one filter for all", f"{ROTATE}-dense", twin="rotate-dense"),
        Arm("rotate-merged", "turned images: four filters, mixed for each image", ROTATE, twin="rotate-dense"),
        Arm("rotate-routed", "turned images: one of four in the last two blocks", ROTATE, ROUTED, "rotate-dense"),
        Arm("vit-dense", "a vision transformer", f"{VIT}-dense", twin="vit-dense"),
        Arm("vit", "2 of 8 experts for each patch", VIT, twin="vit-dense"),
        Arm("vit-hashed", "2 of 8 experts by the patch's place", VIT, "--model.router hashed", "vit-dense"),
    ),
    tiers={
        "try": Tier(
            about="minutes of a CPU, to see it work",
            flags={FAST: "--epochs 1", f"{FAST}-dense": "--epochs 1"},
            arms=("dense", "merged-last"),
        ),
        "cpu": Tier(
            about="two hours of two CPU cores",
            seeds=(0, 1, 2),
            arms=("dense", "merged", "rotate-dense", "rotate-merged"),
        ),
        "gpu": Tier(about="eight minutes of one H200, with --jobs 10", seeds=(0, 1, 2)),
    },
)
