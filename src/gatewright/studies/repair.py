"""From the article's program to ours, one mend at a time."""

from gatewright.studies.study import Arm, Study, Tier

RECIPE = "cifar10-cnn"
PLAIN_IMAGES = "--model.upcycle-epoch 0 --data.augment.no-flip --data.augment.translate 0"
PROGRAM = (
    f"{PLAIN_IMAGES} --data.batch-size 16 --optim.lr 1e-3 --optim.betas 0.8 0.999 --optim.weight-decay 0 "
    "--optim.schedule constant --optim.clip-norm 1"
)
TIGHT = "--model.dispatch capacity --model.capacity-factor 1 --model.min-capacity 1"
NO_LOSS = "--model.router top-k --model.losses"
LOSS = f"{NO_LOSS} load_balance 0.01"

ANSWER = """\
The article's program reaches 44 % in four epochs, and six or seven of its eight experts are dead. Two mends bring
most: the balance loss (53 %), and room for every image in place of a tight capacity (58 %). Several experts stay dead
until the gate has Shazeer's learned noise and losses, and then none does. A second expert, larger batches with a
schedule, and augmentation bring two points together (60 %).

That is where the dense twin is as well (59.9 %, and 59.6 % the mixture with all mends): mended, this mixture does not
lose to its twin, and does not beat it. Two seeds were run, and in single arms they are up to four points apart, so
differences of a point between neighbours say nothing."""

REPAIR = Study(
    name="repair",
    answer=ANSWER,
    question=(
        "The article's CNN with eight experts has half of them dead after its first epoch, and is far below its dense "
        "twin (docs/article.md). What does each mend bring? Each arm is the one above it with one thing more."
    ),
    twin="program",
    arms=(
        Arm(
            "program",
            "the article's program: top-1, no noise, a tight capacity, no balance loss",
            RECIPE,
            f"{PROGRAM} --model.top-k 1 {TIGHT} {NO_LOSS}",
        ),
        Arm("loss", "its balance loss is added", RECIPE, f"{PROGRAM} --model.top-k 1 {TIGHT} {LOSS}"),
        Arm("dropless", "nothing is dropped", RECIPE, f"{PROGRAM} --model.top-k 1 {LOSS}"),
        Arm("top-2", "two experts for each image", RECIPE, f"{PROGRAM} {LOSS}"),
        Arm("noise", "Shazeer's gate with learned noise, and its two losses", RECIPE, PROGRAM),
        Arm(
            "batches",
            "batches of 256, and a learning rate of 0.005 with warm-up, cosine and weight decay",
            RECIPE,
            PLAIN_IMAGES,
        ),
        Arm("augmented", "images are flipped, and moved by a pixel", RECIPE, "--model.upcycle-epoch 0"),
        Arm(
            "upcycled",
            "experts begin as copies of one that was trained for an epoch: the recipe's way",
            RECIPE,
            "--model.upcycle-epoch 1",
        ),
        Arm("dense", "the dense twin of the recipe", RECIPE, "--model.num-experts 1"),
    ),
    tiers={
        "try": Tier(
            about="some minutes of a CPU, to see it work", flags={RECIPE: "--epochs 1"}, arms=("batches", "dense")
        ),
        "cpu": Tier(about="half an hour of two CPU cores", flags={RECIPE: "--epochs 4"}, seeds=(0, 1, 2)),
        "gpu": Tier(about="eight minutes of one H200", flags={RECIPE: "--epochs 10"}, seeds=(0, 1, 2)),
    },
)
