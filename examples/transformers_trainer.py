"""The Trainer of transformers: aux_loss belongs into compute_loss, and end_step into a callback."""

import tempfile
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import gatewright as gw
from gatewright import surgery


class MixtureTrainer(Trainer):
    """A Trainer of models with mixtures."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **options: Any) -> Any:
        """Add the auxiliary losses, divided as the Trainer divides its own where gradients are accumulated."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **options)
        if model.training:
            loss = loss + gw.aux_loss(model) / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss


class EndStep(TrainerCallback):
    """Lets routers adapt after each step of the optimizer."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **options: Any) -> None:
        """Do so; the Trainer calls this right behind the step."""
        gw.end_step(model)


def main() -> float:
    """Upcycle a small Llama, train it to count, and return the loss."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes))
    surgery.upcycle(model, "*.mlp", num_experts=4, item_shape=32)
    surgery.add_noise(model, 0.1)
    rows = [(torch.arange(12) + start) % 16 for start in range(256)]
    data = [{"input_ids": row, "labels": row} for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=6, per_device_train_batch_size=16, gradient_accumulation_steps=2,
            learning_rate=1e-2, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        loss: float = MixtureTrainer(model, arguments, train_dataset=data, callbacks=[EndStep()]).train().training_loss
    print(f"loss {loss:.3f}")
    return loss


if __name__ == "__main__":
    main()
