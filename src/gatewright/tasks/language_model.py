"""Language modelling: a model that predicts each byte of a text from those before it."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from gatewright.data import (
    BEGIN,
    NUM_INPUTS,
    NUM_OUTPUTS,
    TextConfig,
    TextSet,
    TextSplits,
    evaluation_windows,
    files_below,
    load_text,
    local_text_files,
    num_text_batches,
    resident,
    text_batches,
)
from gatewright.layers.base import moe_layers
from gatewright.models import TransformerConfig
from gatewright.tasks.base import Batch, Task
from gatewright.tasks.evaluation import Evaluation, LayerUse
from gatewright.tasks.spans import expert_spans

EXAMPLE_BYTES = 4096
NUM_WINDOWS = 64  # of a file at a time


@dataclass(frozen=True)
class LanguageModelEvaluation(Evaluation):
    """How well a model predicts a text.

    Args:
        layers: The use of each MoE layer, by its name in the model.
        loss: Mean cross-entropy per byte, in nats; 0 where there is no text.
    """

    loss: float

    @property
    def bits_per_byte(self) -> float:
        """Bits that a byte takes when it is coded by the model's predictions: 8 for a model that knows nothing."""
        return self.loss / math.log(2)

    @property
    def metrics(self) -> dict[str, float]:
        """Bits per byte, and the loss."""
        return {"bits_per_byte": self.bits_per_byte, "loss": self.loss}

    @property
    def headline(self) -> tuple[str, str]:
        """The bits per byte."""
        return "bits per byte", f"{self.bits_per_byte:.4f}"


class LanguageModel(Task):
    """Documents of bytes, of which each is predicted from those before it in the same document."""

    item: ClassVar[str] = "byte"
    models = (TransformerConfig,)
    data = TextConfig

    def check_data(self, data: TextConfig) -> None:
        """Refuse a file or folder that is not there."""
        local_text_files(data)

    def load(self, data: TextConfig, model: TransformerConfig) -> TextSplits:
        """Load the text; every model reads any text."""
        return load_text(data)

    def warnings(self, data: TextConfig, splits: TextSplits) -> list[str]:
        """Say where there is too little text for what the settings ask for."""
        found, size = [], data.batch_size * data.context
        if len(splits.train) < size:
            found.append(
                f"{len(splits.train)} training bytes are fewer than one batch, which has {data.batch_size} windows of "
                f"{data.context}: set data.batch_size or data.context to less, or add text."
            )
        if data.holdout and not len(splits.holdout):
            found.append("no document is held out, so nothing is evaluated between epochs: raise data.holdout.")
        return found

    def num_batches(self, part: TextSet, data: TextConfig) -> int:
        """Count the training batches of one epoch."""
        return num_text_batches(part, data)

    def training_batches(
        self, part: TextSet, data: TextConfig, *, seed: int, epoch: int, start: int
    ) -> Iterator[Batch]:
        """Iterate over the batches of one epoch: inputs and targets."""
        return text_batches(part, data, seed=seed, epoch=epoch, start=start)

    def on_device(self, part: TextSet, device: torch.device) -> TextSet:
        """Keep the part on a GPU where it fits."""
        return resident(part, device)

    def evaluation_batches(self, part: TextSet, batch_size: int) -> Iterator[Batch]:
        """Iterate over the whole text once: inputs, targets and the kinds of the inputs."""
        return evaluation_windows(part, batch_size)

    def fingerprint(self, part: TextSet) -> dict[str, Any]:
        """Return the size and the digest of the text, and in which windows it is read."""
        return {"num_bytes": len(part), "digest": part.digest, "context": part.context}

    def build(self, model: TransformerConfig, fingerprint: Mapping[str, Any]) -> nn.Module:
        """Make the model, which is the same for any text."""
        return model.build(NUM_INPUTS, NUM_OUTPUTS, BEGIN)

    def count(self, batch: Batch) -> int:
        """Count the bytes to predict."""
        return batch[1].numel()

    def loss(
        self, output: Float[Tensor, "batch context bytes"], batch: Batch, *, label_smoothing: float = 0.0
    ) -> Float[Tensor, ""]:
        """Add up the cross-entropy of a batch's bytes."""
        logits = output.to(torch.promote_types(output.dtype, torch.float32))
        return F.cross_entropy(
            logits.flatten(0, 1), batch[1].flatten(), label_smoothing=label_smoothing, reduction="sum"
        )

    def measure(self, output: Float[Tensor, "batch context bytes"], batch: Batch) -> dict[str, Tensor]:
        """Add up the cross-entropy of a batch's bytes, and count them."""
        return {"loss": self.loss(output, batch).double(), "bytes": torch.tensor(self.count(batch))}

    def evaluation(
        self, part: TextSet, sums: Mapping[str, Tensor], layers: Mapping[str, LayerUse]
    ) -> LanguageModelEvaluation:
        """Turn the sum into a mean per byte."""
        return LanguageModelEvaluation(layers, float(sums["loss"] / sums["bytes"]) if sums else 0.0)

    def class_names(self, part: TextSet) -> tuple[str, ...]:
        """Name the kinds of bytes."""
        return part.kind_names

    def classes(self, batch: Batch) -> Int[Tensor, " tokens"]:
        """Return the kind of each byte that the model reads."""
        return batch[2].flatten()

    def inspect(self, model: nn.Module, part: TextSet) -> dict[str, dict[str, Any]]:
        """Find the spans of text that each expert is asked for most."""
        return {name: {"spans": spans} for name, spans in expert_spans(model, part).items()}

    def sketch(self, data: TextConfig, model: TransformerConfig) -> tuple[Mapping[str, Any], Callable[[int], Tensor]]:
        """Make windows of random bytes, since the model is the same for any text."""
        return {}, lambda count: torch.randint(NUM_INPUTS, (count, data.context))

    def find_files(self, folder: Path) -> list[Path]:
        """Return all files of a folder, hidden ones left out."""
        return files_below(folder)

    def predict(self, model: nn.Module, file: Path, fingerprint: Mapping[str, Any], *, top: int) -> dict[str, Any]:
        """Return the bits per byte of a file."""
        text = TextSet.pack([file.read_bytes()], fingerprint["context"])
        sums = [self.measure(model(batch[0]), batch)["loss"] for batch in self.evaluation_batches(text, NUM_WINDOWS)]
        for _, layer in moe_layers(model):
            layer.routing = None  # It is that of the last windows alone.
        return {"bits_per_byte": float(sum(sums)) / max(len(text), 1) / math.log(2), "bytes": len(text)}

    def sentence(self, prediction: Mapping[str, Any]) -> str:
        """Say the bits per byte, and of how many bytes."""
        return f"{prediction['bits_per_byte']:.4f} bits per byte, {prediction['bytes']:,} bytes"

    def write_examples(self, data: TextConfig, part: TextSet, folder: Path) -> Sequence[Path]:
        """Write the beginning of the first document into a file to try the model on."""
        folder.mkdir(parents=True, exist_ok=True)
        file, end = folder / ("test.py" if part.python else "test.txt"), [*part.starts.tolist(), len(part)][1]
        file.write_bytes(part.content[: min(end, EXAMPLE_BYTES)].numpy().tobytes())
        return [file]


@torch.inference_mode()
def generate(
    model: nn.Module, prompt: bytes, length: int, *, context: int, temperature: float = 1.0, seed: int = 0
) -> Iterator[bytes]:
    """Yield one byte after the other that goes on with a prompt.

    Args:
        model: A model that reads bytes behind `BEGIN` and returns the logits of each next byte, in evaluation mode.
        prompt: The beginning of the document; it may be empty.
        length: Number of bytes to generate.
        context: Number of last tokens that the model looks back at.
        temperature: Number that logits are divided by; 0 takes the likeliest byte always.
        seed: The seed of the draws.
    """
    generator, device = torch.Generator().manual_seed(seed), next(model.parameters()).device
    tokens = [BEGIN, *prompt]
    for _ in range(length):
        logits = model(torch.tensor([tokens[-context:]], device=device))[0, -1].float().cpu()
        scaled = (logits / temperature).softmax(-1) if temperature > 0 else F.one_hot(logits.argmax(), len(logits))
        tokens.append(int(scaled.float().multinomial(1, generator=generator)))
        yield bytes(tokens[-1:])
