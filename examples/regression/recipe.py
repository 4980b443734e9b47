"""The recipe: ``gatewright train examples.regression.recipe:regression``, from the folder that examples lies in."""

from examples.regression.model import RegressorConfig
from examples.regression.task import TableConfig
from gatewright.train import OptimConfig, RunConfig


def regression() -> RunConfig:
    """Four experts, of which each row goes to two. It takes seconds."""
    return RunConfig(
        recipe="regression",
        task="examples.regression.task:Regression",
        model=RegressorConfig(num_experts=4, top_k=2),
        data=TableConfig(batch_size=32),
        optim=OptimConfig(lr=3e-3, weight_decay=0.1),
        epochs=8,
    )
