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
