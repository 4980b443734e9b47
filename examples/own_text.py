"""A language model of your own text, byte by byte. Run it as ``python examples/own_text.py FILE``."""

import sys
from dataclasses import replace

from gatewright.data import TextConfig
from gatewright.models import TransformerConfig
from gatewright.recipes import python_lm
from gatewright.tasks import generate
from gatewright.train import TrackingConfig, load_run, train


def main(path: str) -> str:
    """Train a small model on a text file or a folder of them, and return what it writes."""
    config = replace(
        python_lm(),
        model=TransformerConfig(num_layers=2, dim=32, num_heads=2, num_experts=4),
        data=TextConfig(name="text", path=path, context=32, batch_size=8),
        tracking=TrackingConfig(enabled=False),
        epochs=3,
    )
    result, run = train(config)
    print(f"{' '.join(result['test_headline'])} on the test text")

    trained = load_run(run)
    written = b"".join(generate(trained.model, b"line ", 60, context=32, temperature=0.5, seed=0))
    text = written.decode(errors="replace")
    print(f"line {text}")
    return text


if __name__ == "__main__":
    main(sys.argv[1])
