"""What a model is trained for: the one place of a run that knows what an item of the data is."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gatewright.data import BatchConfig
from gatewright.models import MixtureConfig
from gatewright.tasks.decision import Rule
from gatewright.tasks.evaluation import Evaluation, LayerUse

Batch = tuple[Tensor, ...]
"""The tensors of a batch, whose first dimension is the items; the model is called with the first tensor."""


Forward = Callable[[nn.Module, Tensor], Tensor]
"""Calls a model on the first tensor of a batch."""


@runtime_checkable
class Splits(Protocol):
    """The three parts of a data set: of any type that the task knows and that has a length."""

    @property
    def train(self) -> Any:
        """The part to learn from."""

    @property
    def holdout(self) -> Any:
        """The part to choose by, which may be empty."""

    @property
    def test(self) -> Any:
        """The part for the final figure."""


@dataclass(frozen=True, kw_only=True)
class DataSplit:
    """One part of the data set that a run used.

    Args:
        name: The data set's name.
        source: Origin of the data set: a folder, the Hugging Face hub, or the library that embeds it.
        split: ``"training"``, ``"held-out"`` or ``"test"``.
        num_items: Number of items of the part.
        digest: A hash of its content. Two runs that saw the same data have the same digest.
    """

    name: str
    source: str
    split: str
    num_items: int
    digest: str


class Task(ABC):
    """What a model is trained for.

    A task keeps nothing between calls: settings and data are handed to its methods. A run names its task, by a name in
    `gatewright.tasks.TASKS` or as ``"module:Class"``, which every process of the run imports by itself.
    """

    item: ClassVar[str]
    """What the data consist of, in the singular: ``"image"``."""
    models: ClassVar[tuple[type[MixtureConfig], ...]]
    """The settings of every model that the task can train."""
    data: ClassVar[type[BatchConfig]]
    """The settings of its data."""
    decisions: ClassVar[Mapping[str, Rule]] = MappingProxyType({})
    """What becomes of the task's own settings where a run goes on, by names such as ``"data.path"``; a setting that is
    not named may not change."""
    views: ClassVar[Mapping[str, Forward]] = MappingProxyType({})
    """Other ways to call a model in evaluation than the plain one, by name: test-time augmentation, for one."""

    # The data.

    def check_data(self, data: Any) -> None:  # noqa: B027 most data have nothing to check
        """Refuse data that are not where the settings say, before anything is loaded; by default nothing is checked.

        Raises:
            FileNotFoundError: The sentence says what is missing.
        """

    @abstractmethod
    def load(self, data: Any, model: Any) -> Splits:
        """Load the data, and refuse at the earliest moment what the model cannot take."""

    def describe_data(self, data: Any, splits: Any) -> list[DataSplit]:
        """Say where each part that has items comes from, and what is in it.

        By default that is the ``name`` and the ``source`` of the settings, and the ``digest`` of each part.
        """
        parts = {"training": splits.train, "held-out": splits.holdout, "test": splits.test}
        sizes = {split: self.size(part) for split, part in parts.items()}
        return [
            DataSplit(name=data.name, source=data.source, split=split, num_items=sizes[split], digest=part.digest)
            for split, part in parts.items()
            if sizes[split]
        ]

    def warnings(self, data: Any, splits: Any) -> list[str]:
        """Return a sentence for everything about the data that is likely to disappoint; by default none."""
        return []

    def size(self, part: Any) -> int:
        """Count the items of a part."""
        return len(part)

    @abstractmethod
    def num_batches(self, part: Any, data: Any) -> int:
        """Count the training batches of one epoch."""

    @abstractmethod
    def training_batches(self, part: Any, data: Any, *, seed: int, epoch: int, start: int) -> Iterator[Batch]:
        """Iterate over the batches of one epoch from the one numbered `start` on, a function of seed and epoch."""

    def on_device(self, part: Any, device: torch.device) -> Any:
        """Return a part of which training batches are made on a device; by default they are moved there one by one."""
        return part

    @abstractmethod
    def evaluation_batches(self, part: Any, batch_size: int) -> Iterator[Batch]:
        """Iterate over every item exactly once, in order."""

    # The model.

    @abstractmethod
    def fingerprint(self, part: Any) -> dict[str, Any]:
        """Say in JSON's types what a model has to know of its training data, and what a resumed run must find again."""

    def check_fit(self, found: Mapping[str, Any], saved: Mapping[str, Any]) -> None:  # noqa: B027 most models take all
        """Refuse data that a trained model cannot be evaluated on; by default nothing is refused.

        Args:
            found: The fingerprint of the data.
            saved: The fingerprint of the data that the model was trained on.

        Raises:
            ValueError: The sentence holds what differs.
        """

    def check(self, found: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
        """Refuse to go on with other training data than a run began with.

        Args:
            found: The fingerprint of the data that are here.
            saved: The fingerprint of the data that the run was trained on.

        Raises:
            ValueError: The sentence holds what differs.
        """
        differ = [
            f"{key} was {saved[key]!r} and is {found.get(key)!r}" for key in saved if saved[key] != found.get(key)
        ]
        if differ:
            raise ValueError(
                f"The run was trained on other data: {'; '.join(differ)}. Bring back the data that it began with, or "
                "begin another run."
            )

    @abstractmethod
    def build(self, model: Any, fingerprint: Mapping[str, Any]) -> nn.Module:
        """Make the model for data of this fingerprint; a checkpoint's weights and buffers are loaded into it."""

    def prepare(self, model: nn.Module, part: Any) -> None:  # noqa: B027 most models measure nothing
        """Let a new model keep in its buffers what it measures of its training data; by default nothing."""

    # Training and evaluation.

    def count(self, batch: Batch) -> int:
        """Count the items of a batch over which the loss is a mean, such as all bytes that are no padding."""
        return len(batch[0])

    @abstractmethod
    def loss(self, output: Tensor, batch: Batch, *, label_smoothing: float = 0.0) -> Float[Tensor, ""]:
        """Return the sum of the loss over what `count` counts.

        Each of several processes has a part of the global batch. The sum of their sums over the count of the global
        batch is the mean that is trained on, however unequal the parts are.
        """

    @abstractmethod
    def measure(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return sums over a batch in evaluation, which are added up over batches and processes.

        A process may have no item of a batch: names, shapes and types of the sums are the same then.
        """

    @abstractmethod
    def evaluation(self, part: Any, sums: Mapping[str, Tensor], layers: Mapping[str, LayerUse]) -> Evaluation:
        """Make the evaluation of a part from the sums of all its batches; there are none where it has no items."""

    def class_names(self, part: Any) -> tuple[str, ...]:
        """Name the classes by which the work of experts is told apart; by default there is one."""
        return ("all",)

    def classes(self, batch: Batch) -> Int[Tensor, " items"]:
        """Return the class of each item of a batch, or of each of its tokens, in the order of the tokens."""
        return torch.zeros(len(batch[0]), dtype=torch.int64, device=batch[0].device)

    # What people ask of a trained model.

    def sketch(self, data: Any, model: Any) -> tuple[Mapping[str, Any], Callable[[int], Tensor]]:
        """Return the fingerprint of the data, and what makes any number of inputs like theirs.

        By default the data are loaded for it. A task that knows beforehand what its data look like spares that.

        Args:
            data: The settings of the data.
            model: The settings of the model.
        """
        part = self.load(data, model).train
        return self.fingerprint(part), lambda count: next(self.evaluation_batches(part, count))[0]

    def find_files(self, folder: Path) -> list[Path]:
        """Return the files of a folder and of those in it that the model can be asked about; by default all."""
        return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))

    def predict(self, model: nn.Module, file: Path, fingerprint: Mapping[str, Any], *, top: int) -> dict[str, Any]:
        """Return in JSON's types what the model says of a file.

        Args:
            model: The trained model, in evaluation mode.
            file: A file, which is read as the data of training were.
            fingerprint: The fingerprint of the data that the model was trained on.
            top: The number of answers, where there are several.

        Raises:
            OSError: If the file is not there.
            ValueError: If it cannot be read.
        """
        raise ValueError(f"{type(self).__name__} does not say what a model makes of a file. Use its model in Python.")

    def sentence(self, prediction: Mapping[str, Any]) -> str:
        """Say a prediction in words."""
        return ", ".join(f"{name} {value}" for name, value in prediction.items())

    def inspect(self, model: nn.Module, part: Any) -> dict[str, dict[str, Any]]:
        """Say more of what each layer does with a part than sums can, in JSON's types; by default nothing.

        All processes call this at the same time, each with the whole part.

        Returns:
            What is to say of a layer, by the layer's name in the model.
        """
        return {}

    def write_examples(self, data: Any, part: Any, folder: Path) -> Sequence[Path]:
        """Write a few items into files to try the trained model on, where there is something to write."""
        return ()
