import pytest

from gatewright.data import DataConfig
from gatewright.models import CnnConfig
from gatewright.train import OptimConfig, RunConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": float("inf")}, "`optim.lr` should be a finite number; got inf."),
        ({"betas": (0.9, 1.5)}, "`optim.betas` should be less than 1; got 1.5."),
        ({"schedule": "cos"}, "`optim.schedule` should be 'cosine', 'linear' or 'constant'; got 'cos'."),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_an_optimizer_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=r".") as caught:
        OptimConfig(**changes)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "`epochs` should be greater than 0; got 0."),
        ({"seed": 2**63}, "`seed` should be less than 9223372036854775808; got 9223372036854775808."),
        ({"epoch": 3}, "There is no setting 'epoch'; did you mean 'epochs'?"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_run_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=r".") as caught:
        RunConfig(recipe="mine", model=CnnConfig(), data=DataConfig(), **changes)
    assert str(caught.value) == message
