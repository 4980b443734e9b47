"""Every router with the same experts and the same budget, on text and on images."""

from gatewright.studies.language import GLANCE, SMALL
from gatewright.studies.study import Arm, Study, Tier

TEXT, IMAGES = "python-lm", "cifar10-cnn"
GROUPS = "--model.router-options num_groups 4 top_k_groups 2"
CAUSAL = {
    "top-k": "",
    "noisy-top-k": "",
    "biased": "",
    "group-limited": GROUPS,
    "hierarchical": f"{GROUPS} --model.top-k 4",
    "product-key": "",
    "hashed": "",
    "gated-hash": "",
}
OF_IMAGES = {name: flags for name, flags in CAUSAL.items() if "hash" not in name} | {
    "expert-choice": "",
    "sinkhorn": "",
    "soft": "",
}


def _arms(what: str, recipe: str, routers: dict[str, str]) -> tuple[Arm, ...]:
    """Return the dense twin on some data, and an arm for every router."""
    twin = f"{what}-dense"
    return (
        Arm(twin, f"the dense twin on {what}", recipe, "--model.num-experts 1", twin),
        *(
            Arm(f"{what}-{name}", f"{name} on {what}", recipe, f"--model.router {name} {flags}".strip(), twin)
            for name, flags in routers.items()
        ),
    )


ANSWER = """\
On text every router beats the dense twin, by 2 to 6 %, and the order is that of the choice: fixed by a hash of the byte
(2.12 and 2.13 bits per byte), plain top-k (2.13), product keys (2.15), the bias (2.16), noise (2.17), groups (2.18 and
2.21). A hash is the least even of them, with 1.8 times the mean load for the busiest expert. Hierarchical has four
experts of half the size for each byte, and so half the experts' parameters.

On these images no router beats the dense twin's 60.0 %: Shazeer's noisy top-k (59.8 %), Soft MoE (59.6 %) and product
keys (59.6 %) come near it. Expert choice and Sinkhorn, which compare the images of a batch with each other in training
and choose image by image in evaluation, are 5 points below. One seed was run for three and four epochs, so differences
of 1 % on text, and of a point on images, say nothing."""

ROUTERS = Study(
    name="routers",
    answer=ANSWER,
    question=(
        "How do all routers do with the same eight experts and the same budget: quality, balance, drops, and the time "
        "of a step? On text are those that do not look at later bytes. Images have a mixture from the first step on, "
        "and so the routing alone decides who learns what."
    ),
    twin="text-dense",
    arms=(*_arms("text", TEXT, CAUSAL), *_arms("images", IMAGES, OF_IMAGES)),
    tiers={
        "try": Tier(
            about="some minutes of a CPU, to see it work",
            flags={
                TEXT: GLANCE,
                IMAGES: "--epochs 1 --model.upcycle-epoch 0",
            },
            arms=("text-dense", "text-hashed"),
        ),
        "cpu": Tier(
            about="three quarters of an hour of two CPU cores",
            flags={
                TEXT: SMALL,
                IMAGES: "--epochs 4 --model.upcycle-epoch 0",
            },
            seeds=(0, 1, 2),
        ),
        "gpu": Tier(
            about="eight minutes of one H200",
            flags={
                TEXT: "--epochs 6 --data.context 256 --data.batch-size 64 --precision bfloat16",
                IMAGES: "--epochs 8 --model.upcycle-epoch 0",
            },
            seeds=(0, 1, 2),
        ),
    },
)
