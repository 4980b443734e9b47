"""A mixture in a Lightning module: aux_loss belongs into training_step, and end_step behind the optimizer's step."""

from typing import Any

import pytorch_lightning as lightning
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gatewright as gw


class Classifier(lightning.LightningModule):
    """Classify handwritten digits by a mixture that balances its experts without a loss."""

    def __init__(self) -> None:
        super().__init__()
        mixture = gw.MoE(gw.Biased(64, 4, top_k=2), gw.GroupedFeedForward(4, 64, 64))
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), mixture, nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the loss of a batch, with the auxiliary losses of all mixtures."""
        rows, labels = batch
        return F.cross_entropy(self.layers(rows), labels) + gw.aux_loss(self)

    def optimizer_step(self, *args: Any, **options: Any) -> None:
        """Take a step, which is one also where gradients are accumulated, and let the router adapt."""
        super().optimizer_step(*args, **options)
        gw.end_step(self)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Use AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main() -> float:
    """Train five epochs, and return the accuracy on the training images."""
    lightning.seed_everything(0, verbose=False)
    digits = load_digits()
    rows, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    model = Classifier()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = lightning.Trainer(max_epochs=5, accelerator="cpu", accumulate_grad_batches=2, **quiet)
    trainer.fit(model, DataLoader(TensorDataset(rows, labels), batch_size=32, shuffle=True))
    accuracy = (model.eval().layers(rows).argmax(-1) == labels).float().mean().item()
    print(f"accuracy {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    main()
