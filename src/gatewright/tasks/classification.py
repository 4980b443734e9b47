"""Image classification: whatever maps an image to logits, trained by cross-entropy."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from gatewright.data import (
    DataConfig,
    ImageSet,
    ImageSplits,
    as_floats,
    channel_statistics,
    decode_image,
    evaluation_batches,
    find_images,
    load_images,
    local_files,
    num_batches,
    resident,
    training_batches,
    write_examples,
)
from gatewright.models import (
    CnnConfig,
    ConvNetConfig,
    DigitsConfig,
    ImageClassifier,
    ModelConfig,
    ResNetsConfig,
    VitConfig,
)
from gatewright.tasks.base import Batch, Task
from gatewright.tasks.decision import EXACT, FROM_HERE, refused
from gatewright.tasks.evaluation import Evaluation, LayerUse, Table
from gatewright.tasks.profiles import expert_profiles


@dataclass(frozen=True)
class ClassificationEvaluation(Evaluation):
    """What a model makes of a set of images.

    Args:
        layers: The use of each MoE layer, by its name in the model.
        confusion: Images by true class (rows) and predicted class (columns).
        loss: Mean cross-entropy of the images, without label smoothing; 0 where there are none.
        class_names: The names of the classes, in the order of the labels.
    """

    confusion: Int[Tensor, "classes classes"]
    loss: float
    class_names: tuple[str, ...]
    higher_is_better = True

    @property
    def accuracy(self) -> float:
        """Share of images classified right, in [0, 1]."""
        return float(self.confusion.diagonal().sum() / self.confusion.sum().clamp(min=1))

    @property
    def accuracy_per_class(self) -> Float[Tensor, " classes"]:
        """Share of each class's images classified right; 0 for a class without images."""
        return self.confusion.diagonal() / self.confusion.sum(1).clamp(min=1)

    @property
    def metrics(self) -> dict[str, float]:
        """Accuracy and loss."""
        return {"accuracy": self.accuracy, "loss": self.loss}

    @property
    def headline(self) -> tuple[str, str]:
        """The accuracy."""
        return "accuracy", f"{self.accuracy:.2%}"

    def tables(self) -> Sequence[Table]:
        """Return the accuracy of each class, and who was taken for whom."""
        names, right = self.class_names, self.accuracy_per_class.tolist()
        counts = ([name, *map(str, row)] for name, row in zip(names, self.confusion.tolist(), strict=True))
        return (
            Table(
                "", ("class", "accuracy"), [(name, f"{share:.2%}") for name, share in zip(names, right, strict=True)]
            ),
            Table("Images by class, and what they were taken for", ("", *names), list(counts)),
        )

    def describe(self) -> dict[str, Any]:
        """Return the same in numbers, of which the page has pictures of its own."""
        return {
            "test_accuracy": self.accuracy,
            "test_loss": self.loss,
            "test_accuracy_per_class": dict(zip(self.class_names, self.accuracy_per_class.tolist(), strict=True)),
            "confusion": self.confusion.tolist(),
        }


def mirrored_too(
    model: nn.Module, images: Float[Tensor, "batch channels height width"]
) -> Float[Tensor, "batch classes"]:
    """Average the probabilities of each image and its mirror image (test-time augmentation), and return logarithms.

    The routing that the model's layers keep is that of the images themselves.
    """
    mirrored = model(images.flip(-1)).float().log_softmax(-1)
    log_probs = model(images).float().log_softmax(-1)
    return torch.logaddexp(log_probs, mirrored) - math.log(2)


class Classification(Task):
    """Images of one size, each of one class."""

    item: ClassVar[str] = "image"
    models = (CnnConfig, ConvNetConfig, DigitsConfig, ResNetsConfig, VitConfig)
    data = DataConfig
    views = MappingProxyType({"flip": mirrored_too})
    decisions = MappingProxyType(
        {
            "data.name": refused("it decides which images there are"),
            "data.path": EXACT,  # The same images in another place: their number, classes and shape are compared.
            "data.image_size": refused("it decides what the images look like"),
            "data.holdout": refused("images that were trained on would be held out, or held-out ones trained on"),
            "data.cache": EXACT,
            "data.rotate": refused("it decides what the images look like"),
            "data.augment.flip": FROM_HERE,
            "data.augment.alternate_flip": FROM_HERE,
            "data.augment.rotate": FROM_HERE,
            "data.augment.translate": FROM_HERE,
            "data.augment.crop": FROM_HERE,
        }
    )

    def check_data(self, data: DataConfig) -> None:
        """Refuse a folder that is not there, or whose images are not sorted as they must be."""
        local_files(data)

    def load(self, data: DataConfig, model: ModelConfig) -> ImageSplits:
        """Load the images, and refuse those that are too small for the model before all of them are decoded."""
        return load_images(data, check=partial(_check_image_shape, model))

    def warnings(self, data: DataConfig, splits: ImageSplits) -> list[str]:
        """Say where there are too few images for what the settings ask for."""
        number, found = len(splits.train), []
        if number < data.batch_size:
            found.append(
                f"{number} training images are fewer than one batch (data.batch_size is {data.batch_size}), so an "
                "epoch is a single step and experts may stay without images: set it to "
                f"{max(2, number // 8)} or so, and use few experts."
            )
        if data.holdout and not len(splits.holdout):
            found.append(
                f"data.holdout ({data.holdout}) of {number} training images is no image, so nothing is evaluated "
                "between epochs: raise it, or add images."
            )
        return found

    def num_batches(self, part: ImageSet, data: DataConfig) -> int:
        """Count the training batches of one epoch."""
        return num_batches(len(part), data.batch_size)

    def training_batches(
        self, part: ImageSet, data: DataConfig, *, seed: int, epoch: int, start: int
    ) -> Iterator[Batch]:
        """Iterate over the shuffled, augmented batches of one epoch."""
        return training_batches(part, data, seed=seed, epoch=epoch, start=start)

    def on_device(self, part: ImageSet, device: torch.device) -> ImageSet:
        """Keep the part on a GPU where it fits."""
        return resident(part, device)

    def evaluation_batches(self, part: ImageSet, batch_size: int) -> Iterator[Batch]:
        """Iterate over every image exactly once, in order."""
        return evaluation_batches(part, batch_size)

    def fingerprint(self, part: ImageSet) -> dict[str, Any]:
        """Return number and shape of the images, and the names of their classes."""
        shape = list(part.images.shape[1:])
        return {"num_images": len(part), "class_names": list(part.class_names), "image_shape": shape}

    def check_fit(self, found: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
        """Refuse images of other classes or of another shape."""
        names, shape = tuple(found["class_names"]), tuple(found["image_shape"])
        if names != tuple(saved["class_names"]):
            raise ValueError(
                f"The run was trained on the classes {_few(saved['class_names'])}; data.path has {_few(names)}."
            )
        if shape != tuple(saved["image_shape"]):
            raise ValueError(
                f"The run was trained on images of shape {tuple(saved['image_shape'])} (channels, height, width); "
                f"data.path has {shape}. Set data.image_size, or use the images that it was trained on."
            )

    def check(self, found: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
        """Refuse images of other classes, of another shape, or in another number than a run began with."""
        self.check_fit(found, saved)
        if found["num_images"] != saved.get("num_images", found["num_images"]):  # Version 0.1.0 did not keep it.
            raise ValueError(
                f"The run was trained on {saved['num_images']} images, and now there are {found['num_images']}: some "
                "would be seen twice in an epoch, or never. Bring back the images that it began with, or begin another "
                "run."
            )

    def build(self, model: ModelConfig, fingerprint: Mapping[str, Any]) -> ImageClassifier:
        """Make the classifier for images of this shape and these classes."""
        channels, height, width = fingerprint["image_shape"]
        network = model.build((channels, height, width), len(fingerprint["class_names"]))
        return ImageClassifier(network, [0.0] * channels, [1.0] * channels)

    def prepare(self, model: nn.Module, part: ImageSet) -> None:
        """Have the classifier standardise images by the training images' channels."""
        assert isinstance(model, ImageClassifier)
        for buffer, values in zip((model.mean, model.std), channel_statistics(part), strict=True):
            buffer.copy_(values.view_as(buffer))

    def loss(
        self, output: Float[Tensor, "batch classes"], batch: Batch, *, label_smoothing: float = 0.0
    ) -> Float[Tensor, ""]:
        """Add up the cross-entropy of a batch's images."""
        logits = output.to(torch.promote_types(output.dtype, torch.float32))
        return F.cross_entropy(logits, batch[1], label_smoothing=label_smoothing, reduction="sum")

    def measure(self, output: Float[Tensor, "batch classes"], batch: Batch) -> dict[str, Tensor]:
        """Count images by true and predicted class, and add up their cross-entropy."""
        log_probs, labels, num_classes = output.float().log_softmax(-1).cpu(), batch[1].cpu(), output.shape[-1]
        cells = torch.bincount(labels * num_classes + log_probs.argmax(-1), minlength=num_classes**2)
        return {
            "confusion": cells.view(num_classes, num_classes),
            "loss": F.nll_loss(log_probs.double(), labels, reduction="sum"),
        }

    def evaluation(
        self, part: ImageSet, sums: Mapping[str, Tensor], layers: Mapping[str, LayerUse]
    ) -> ClassificationEvaluation:
        """Turn counts into accuracies."""
        names = part.class_names
        confusion = sums.get("confusion", torch.zeros(len(names), len(names), dtype=torch.int64))
        loss = float(sums.get("loss", torch.zeros(())) / confusion.sum().clamp(min=1))
        return ClassificationEvaluation(layers, confusion, loss, names)

    def class_names(self, part: ImageSet) -> tuple[str, ...]:
        """Name the classes of the images."""
        return part.class_names

    def classes(self, batch: Batch) -> Int[Tensor, " images"]:
        """Return the labels."""
        return batch[1]

    def inspect(self, model: nn.Module, part: ImageSet) -> dict[str, dict[str, Any]]:
        """Find each expert's own images, its mistakes, and what is lost without it."""
        return expert_profiles(model, part)

    def write_examples(self, data: DataConfig, part: ImageSet, folder: Path) -> Sequence[Path]:
        """Write an image of each of the first classes, where there are no image files to try the model on yet."""
        return write_examples(part, folder) if data.name != "folder" else ()

    def sketch(self, data: DataConfig, model: ModelConfig) -> tuple[Mapping[str, Any], Callable[[int], Tensor]]:
        """Know shape and classes of a built-in data set without loading any images."""
        if data.known_shape is None:
            return super().sketch(data, model)
        shape, classes = data.known_shape
        fingerprint = {"image_shape": shape, "class_names": [str(label) for label in range(classes)]}
        return fingerprint, lambda count: torch.rand(count, *shape)

    def find_files(self, folder: Path) -> list[Path]:
        """Return the image files of a folder."""
        return find_images(folder)

    def predict(self, model: nn.Module, file: Path, fingerprint: Mapping[str, Any], *, top: int) -> dict[str, Any]:
        """Return the likeliest classes of an image file."""
        channels, height, width = fingerprint["image_shape"]
        image, names = decode_image(file, channels=channels, size=(height, width)), fingerprint["class_names"]
        likeliest = model(as_floats(image[None]))[0].float().softmax(-1).topk(min(top, len(names)))
        classes = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
        return {"classes": [{"class": names[index], "probability": share} for index, share in classes]}

    def sentence(self, prediction: Mapping[str, Any]) -> str:
        """Say the classes with their probabilities."""
        return ", ".join(f"{each['class']} {each['probability']:.1%}" for each in prediction["classes"])


def _few(names: Sequence[str]) -> str:
    return ", ".join([*names[:12], *(["..."] if len(names) > 12 else [])]) + f" ({len(names)})"


def _check_image_shape(model: ModelConfig, image_shape: tuple[int, int, int]) -> None:
    """Build the model without memory, to refuse images that are too small for it before all of them are decoded."""
    if model.needs_engine:
        return
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model.build(image_shape, 2)
