import pytest

from gatewright.cli.errors import in_flags


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("`optim.clip_norm` should be greater than 0", "--optim.clip-norm should be greater than 0"),
        ("Set `model.top_k=2` or `epochs=3`.", "Set --model.top-k 2 or --epochs 3."),
        ("Set `model.router='top-k'`.", "Set --model.router top-k."),
        ("`tracking.enabled=False`, `resume=True`, `compile=False`", "--tracking.no-enabled, --resume, --no-compile"),
        ("Give `links.inside`.", "Give --links.inside."),
        ("`optim.betas.1` and `run` are fields of no flag", "`optim.betas.1` and `run` are fields of no flag"),
    ],
)
def test_fields_in_an_error_are_flags(said, shown):
    assert in_flags(said) == shown
