# %% [markdown]
# # A mixture of residual networks
#
# This notebook follows the second part of *Mixture of Experts, Outrageously Large Neural Networks in PyTorch* (Paul
# Bruffett, 2022). There each expert is a whole residual network, and the router sends each image to some of them. Most
# of the model's parameters are then in experts, where the first notebook had only one layer in them.
#
# The notebook first builds such a mixture in plain PyTorch and shows what went wrong in the article's version. It then
# trains the recipe `cifar10-resnets`, which is the same mixture with settings that were measured.
#
# The notebook runs as it is on handwritten digits. `GATEWRIGHT_CIFAR10` names a folder with the parquet files of
# CIFAR-10, or is the word `hub` to download them. `GATEWRIGHT_EPOCHS` is the number of epochs, 2 or more.

# %%
import os
from dataclasses import replace

import torch
from IPython.display import Image, display
from torch import nn

import gatewright as gw
from gatewright.data import as_floats, load_images
from gatewright.models import RESNETS
from gatewright.recipes import cifar10_resnets
from gatewright.report import write_all
from gatewright.train import RunConfig, load_run, train

DATA = os.environ.get("GATEWRIGHT_CIFAR10")
EPOCHS = int(os.environ.get("GATEWRIGHT_EPOCHS", "5"))

# %% [markdown]
# ## The settings of a run
#
# A recipe is a function that returns the settings of a whole run, as frozen dataclasses. `dataclasses.replace` changes
# some of them. Nothing is parsed from flags that a notebook does not have, where the article's script parses an empty
# string and so ignores every flag that it is given.
#
# In this recipe one network learns from every image first, and the experts then begin as its copies.
# Experts that are separate from the start see only their share of the images, which is little for a whole network.
# Here they separate half-way.


# %%
def settings(num_experts: int) -> RunConfig:
    config = cifar10_resnets()
    if DATA is None:  # A digit that is mirrored is no longer the same digit; and an epoch has only 22 steps.
        augment = replace(config.data.augment, flip=False, translate=1)
        data = replace(config.data, name="digits", batch_size=64, augment=augment)
        config = replace(config, tracking=replace(config.tracking, log_interval=5))
    else:
        data = replace(config.data, path=None if DATA == "hub" else DATA)
    model = replace(config.model, num_experts=num_experts, upcycle_epoch=EPOCHS // 2 if num_experts > 1 else 0)
    return replace(config, model=model, data=data, epochs=EPOCHS)


splits = load_images(settings(4).data)
images = as_floats(splits.train.images[:64])
channels, height, width = images.shape[1:]
print(f"{len(splits.train)} training images of shape {(channels, height, width)}, {len(splits.test)} test images")

# %% [markdown]
# ## The mixture, in plain PyTorch
#
# The article's layer takes vectors, so its images are flattened to 3,072 numbers on the way in, reshaped inside every
# expert, and each expert has to return 3,072 numbers again. Here an item may have any shape, and experts may return
# another shape than they receive. An image goes in, and 128 features come out.
#
# The router of the article looks at raw pixels, which say little about where an image belongs. Here the router looks at
# features of its own, which a small convolutional network computes. They are the second argument of the layer. The last
# module standardises them, so that no expert is the largest for every image from the start.

# %%
torch.manual_seed(0)


def residual_network() -> nn.Module:
    return nn.Sequential(*RESNETS["small"].parts(channels), nn.AdaptiveAvgPool2d(1), nn.Flatten())


router_network = nn.Sequential(
    nn.Conv2d(channels, 32, 3, stride=2, padding=1),
    nn.ReLU(),
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    nn.BatchNorm1d(32, affine=False),
)
layer = gw.MoE(
    router=gw.TopK(dim=32, num_experts=4, top_k=2, score_after_top_k=True),
    experts=gw.ModuleExperts(residual_network, num_experts=4),
    item_shape=(channels, height, width),
)
features = layer(images, router_network(images))
print(f"images {tuple(images.shape)} -> features {tuple(features.shape)}")
print(f"images per expert: {layer.routing.sums.tokens_per_expert.int().tolist()}")

# %% [markdown]
# ## What the article got wrong
#
# **All experts start as the same network.** The article's library copies one expert, so all copies begin with the same
# weights. It also registers a second residual network that nothing uses and that the optimizer nevertheless holds.
# `ModuleExperts` calls the function once per expert, so each one has weights of its own.

# %%
first, second = (next(expert.parameters()) for expert in list(layer.experts.experts)[:2])
print(f"the first two experts have equal weights: {torch.equal(first, second)}")

# %% [markdown]
# **BatchNorm inside an expert sees rows of zeros.** The article's library gives each expert the same number of rows,
# its capacity, and fills up with zeros where the router sent fewer. BatchNorm takes these zeros for images. The same
# two images then have other features, depending on how many rows are empty. Here an expert receives its own images
# alone.

# %%
norm = nn.BatchNorm1d(3, affine=False)
rows = torch.tensor([[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]])
padded = torch.cat([rows, torch.zeros(6, 3)])
print(f"two rows alone:\n{norm(rows)}\nthe same two rows, with six rows of zeros:\n{norm(padded)[:2]}")

# %% [markdown]
# **Outputs are put together along the wrong dimension.** The library concatenates what its experts return along
# dimension 1, which is right for outputs of three dimensions. The article's experts return two. With more than one row
# per expert the rows are then mixed up, and no error says so. Below, the first number of a row is its expert.

# %%
outputs = [torch.tensor([[expert, row] for row in range(2)]) for expert in range(2)]  # two experts, two rows each
print("as the article's experts return them:", torch.cat(outputs, dim=1).reshape(-1, 2).tolist())
print("as they should be:                   ", torch.cat(outputs, dim=0).tolist())

# %% [markdown]
# ## Training
#
# `train` is the loop of the first notebook with everything that a long run needs: checkpoints, MLflow, the accuracy on
# images held out from training after each epoch, and the test set once, at the end. The article's loop has no such
# images, and its test accuracy is measured with the model in training mode.

# %%
result, folder = train(settings(num_experts=4), report=write_all)

# %%
twin_result, _ = train(settings(num_experts=1))

# %%
for name, found in (("mixture of ResNets", result), ("dense twin", twin_result)):
    print(f"{name}: test accuracy {found['test_accuracy']:.2%}, {EPOCHS} epochs in {found['train_seconds']:.0f} s")
    print(f"  {found['num_parameters']:,} parameters, of which {found['num_active_parameters']:,} work on an image")

# %% [markdown]
# ## Accuracy per class
#
# Every test image counts. The run's folder has the same figures in `result.json`, and everything in `report.html`.

# %%
for name, accuracy in result["test_accuracy_per_class"].items():
    print(f"  {name:<12}{accuracy:.1%}")

# %% [markdown]
# ## How it trained
#
# The curves show the losses, the accuracy on held-out images and the learning rate. The second picture shows which
# experts each class goes to. Every image goes to two experts, so a row adds up to 200 %.

# %%
display(Image(folder / "curves.png"))
for picture in sorted(folder.glob("classes-*.png")):
    display(Image(picture))

# %% [markdown]
# ## Loading the model
#
# A run's folder is all that is needed to use its model. Checkpoints are safetensors files, which hold numbers and no
# code. After a forward, each mixture says where the images went.

# %%
trained = load_run(folder)
with torch.inference_mode():
    logits = trained.model(as_floats(splits.test.images[:8]))
((_, layer),) = gw.moe_layers(trained.model)
order = layer.routing.token_index.argsort(stable=True)
experts = layer.routing.expert_index[order].view(8, -1).tolist()
names = trained.fingerprint["class_names"]
for label, guess, chosen in zip(splits.test.labels[:8], logits.argmax(-1), experts, strict=True):
    print(f"{names[label]:<12} taken for {names[guess]:<12} by experts {chosen}")

# %% [markdown]
# The next notebook, `parallel_networks`, has forty such networks on four processes.
