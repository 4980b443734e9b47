"""A whole run on a CUDA device, in each precision."""

from dataclasses import replace

import pytest

from gatewright.recipes import RECIPES
from gatewright.train import TrackingConfig, load_run, train


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_digits_trains_on_the_device(tmp_path, precision):
    config = replace(RECIPES["digits"](), device="cuda", precision=precision, epochs=8, output=str(tmp_path / "run"))
    config = replace(config, model=replace(config.model, upcycle_epoch=0), tracking=TrackingConfig(enabled=False))
    result, output = train(config)
    assert result["test_accuracy"] > 0.9
    assert load_run(output).config.precision == precision


def trained_both_ways(output):
    """Test bits per byte of a short run by launches, and of the same by replayed CUDA graphs."""
    found = []
    for graphs in (False, True):
        config = replace(
            RECIPES["python-lm"](), device="cuda", precision="bfloat16", epochs=1, output=f"{output}/{graphs}"
        )
        config = replace(config, tracking=TrackingConfig(enabled=False), compile=graphs, cuda_graphs=graphs)
        found.append(train(config)[0]["test_bits_per_byte"])
    return found


def test_cuda_graphs_train_to_what_launches_do(tmp_path, run_unhooked):
    launched, replayed = run_unhooked(trained_both_ways, str(tmp_path))
    assert replayed == pytest.approx(launched, rel=0.02)
