# %% [markdown]
# # Parallel networks
#
# This notebook follows the third part of *Mixture of Experts, Outrageously Large Neural Networks in PyTorch* (Paul
# Bruffett, 2022). There the mixture of residual networks becomes a script that a launcher starts on four GPUs, with
# forty experts, ten on each. Here four processes do the same. They run on the CPU where there is no GPU, so the
# notebook runs on a laptop too, only more slowly.
#
# The notebook runs as it is on handwritten digits. `GATEWRIGHT_CIFAR10` names a folder with the parquet files of
# CIFAR-10, or is the word `hub` to download them. `GATEWRIGHT_EPOCHS` is the number of epochs, 2 or more.

# %%
import json
import os
import shlex
import subprocess
import sys
from datetime import datetime
from pathlib import Path

from IPython.display import Image, display

from gatewright.data import load_images
from gatewright.train import evaluate, load_run

DATA = os.environ.get("GATEWRIGHT_CIFAR10")
EPOCHS = int(os.environ.get("GATEWRIGHT_EPOCHS", "5"))
OUTPUT = Path("runs") / f"forty-{datetime.now():%Y%m%d-%H%M%S}"
OUTPUT.parent.mkdir(exist_ok=True)

# %% [markdown]
# A command line is started as a program of its own, and its output appears here line by line. If it fails, the cell
# fails, unless another status is expected. `python -m gatewright` is the command `gatewright`, in the environment that
# this notebook runs in. Jupyter tells programs to print in colour, as on a terminal; here plain lines are easier to
# read.


# %%
def run(command: str, expected: int = 0) -> None:
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    plain = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "CLICOLOR_FORCE")}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(words, env={**plain, "COLUMNS": "120"}, **streams) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
    if process.returncode != expected:
        raise RuntimeError(f"{command} ended with status {process.returncode}, not {expected}")


# %% [markdown]
# ## How much is it?
#
# Each of the article's experts has 13.1 million parameters. Forty of them are 524 million, which is more than 8 GB with
# gradients and the two numbers per parameter that Adam keeps. The article says that a single GPU runs out of memory.
# `gatewright plan` predicts what each process needs before anything is started, first with all forty experts on one
# process, then with ten on each of four.

# %%
ARTICLE = (
    "cifar10-resnets-article --model.num-experts 40 --model.top-k 1 --model.router biased "
    "--model.router-options normalize False --optim.name adamw"
)
run(f"python -m gatewright plan {ARTICLE}")

# %%
run(f"python -m gatewright plan {ARTICLE} --processes 4 --parallel.ep-size 4")

# %% [markdown]
# ## What the article got wrong
#
# `ep-world-size` is the number of processes that share the experts out among them. The article sets it to 10 on 4 GPUs,
# meaning ten experts on each, and never passes it to the layer, so nothing complains. `ep-size` is the same number
# here, and a value that cannot work is refused before the run begins.

# %%
run("python -m gatewright train digits --model.num-experts 40 --processes 4 --parallel.ep-size 10", expected=2)

# %% [markdown]
# The article's script also parses an empty string in place of its command line, so that all flags have their defaults
# whatever the reader types. Here an unknown flag is an error.

# %%
run("python -m gatewright train digits --model.num-expert 40", expected=2)

# %% [markdown]
# ## Training on four processes
#
# The article activates its environment and types `deepspeed cifar_distributed_resnet.py`. Here no script is needed:
# every setting of a recipe is a flag. The recipe's own small residual network takes the place of the article's, so that
# this ends in minutes. `--processes 4` starts the four processes on this machine. On several machines `torchrun`,
# Slurm, Azure ML or the `deepspeed` launcher start the same command; `docs/launch.md` has the lines.
#
# Each process works on its part of every batch, and sends each image to the process that holds its expert. Nothing is
# dropped: in the article an expert has room for one image per batch, and an image that does not fit becomes a constant.
#
# Forty experts need a firmer hand than four. The router `biased` evens out their load without a loss: it raises a bias
# for experts that got too few images, and lowers it for those that got too many. The digits have few batches, so each
# step of the bias is larger there.

# %%
if DATA is None:  # A digit that is mirrored is no longer the same digit; and an epoch has only 22 steps.
    data_flags = "--data.name digits --data.batch-size 64 --data.augment.no-flip --data.augment.translate 1 "
    data_flags += "--tracking.log-interval 5"
else:
    data_flags = "" if DATA == "hub" else f"--data.path {shlex.quote(DATA)}"
bias_rate = 0.02 if DATA is None else 0.003

run(
    "python -m gatewright train cifar10-resnets --model.num-experts 40 --processes 4 --parallel.ep-size 4 "
    f"--model.router biased --model.router-options bias_rate {bias_rate} --model.losses "
    f"--epochs {EPOCHS} --model.upcycle-epoch {EPOCHS // 2} {data_flags} --output {OUTPUT}"
)

# %% [markdown]
# ## What the processes did
#
# Only the first process writes files and logs to MLflow; in the article every process logs the parameters. The result
# has the accuracy, and for each process the mean time of a step and the bytes that it sent in one. Rows are images and
# features on their way to experts and back. Gradients are those of the parameters that all processes have: the router,
# its features and the classifier. The forty networks are not in it. That is the article's claim: sparse experts leave
# few parameters to synchronise.

# %%
result = json.loads((OUTPUT / "result.json").read_text())
print(f"forty networks on four processes: test accuracy {result['test_accuracy']:.2%}, {EPOCHS} epochs")
(layer,) = result["layers"].values()
print(f"{result['num_parameters']:,} parameters, of which {result['num_active_parameters']:,} work on an image")
print(
    f"{len(layer['dead_experts'])} dead experts; the busiest has {layer['max_over_mean_load']:.1f} times the mean load"
)
for rank, process in enumerate(result["processes"]):
    rows, gradients = process["all_to_all_bytes"] / 1e6, process["reduced_bytes"] / 1e6
    print(f"process {rank}: {process['step_seconds']:.2f} s, {rows:.3f} MB of rows, {gradients:.3f} MB of gradients")

# %% [markdown]
# ## What the experts do
#
# The strip shows each expert's share of the test images, and the cells which classes it sees.

# %%
display(Image(OUTPUT / "curves.png"))
for picture in sorted(OUTPUT.glob("classes-*.png")):
    display(Image(picture))

# %% [markdown]
# ## One process again
#
# A checkpoint does not remember how many processes wrote it. This notebook is a single process. It loads all forty
# networks and classifies the test set once more, to the same accuracy.

# %%
trained = load_run(OUTPUT)
images = load_images(trained.config.data).test
evaluation = evaluate(trained.task, trained.model, images, batch_size=500, precision=trained.config.precision)
print(f"the same networks on one process: test accuracy {evaluation.accuracy:.2%}")
for name, accuracy in zip(trained.fingerprint["class_names"], evaluation.accuracy_per_class.tolist(), strict=True):
    print(f"  {name:<12}{accuracy:.1%}")

# %% [markdown]
# `docs/article.md` has the article's own network, forty times on four processes, with bytes, memory and accuracy as
# measured.
