from dataclasses import field, replace
from typing import Annotated, Literal

import pytest
from pydantic import Field

from gatewright.settings import from_json, settings


@settings("optim")
class Optim:
    name: Literal["adamw", "sgd"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    steps: int | None = None

    def __post_init__(self):
        if self.steps == 13:
            raise ValueError("`optim.steps` is no unlucky number; got 13.")


@settings()
class Run:
    seed: int
    optim: Optim = field(default_factory=Optim)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": -1.0}, "`optim.lr` should be greater than 0; got -1.0."),
        ({"lr": float("nan")}, "`optim.lr` should be a finite number; got nan."),
        ({"name": "adam"}, "`optim.name` should be 'adamw' or 'sgd'; got 'adam'."),
        ({"steps": 2.7}, "`optim.steps` should be a valid integer; got 2.7."),
        ({"steps": True}, "`optim.steps` should be a valid integer; got True."),
        ({"steps": 13}, "`optim.steps` is no unlucky number; got 13."),
        ({"lrr": 1.0}, "There is no setting 'optim.lrr'; did you mean 'optim.lr'?"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_value_that_does_not_fit_is_one_sentence(changes, message):
    with pytest.raises(ValueError, match=r".") as caught:
        Optim(**changes)
    assert str(caught.value) == message


def test_from_json_names_the_place_of_all_that_does_not_fit():
    with pytest.raises(ValueError, match=r".") as caught:
        from_json(Run, '{"optim": {"lr": 0, "nmae": "sgd", "betas": [0.9]}}')
    assert str(caught.value) == (
        "`seed` is required, and missing. `optim.lr` should be greater than 0; got 0. `optim.betas` is required, and "
        "missing. There is no setting 'optim.nmae'; did you mean 'optim.name'?"
    )


def test_what_fits_is_read_and_frozen():
    run = from_json(Run, '{"seed": 1, "optim": {"lr": 1, "betas": [0.5, 0.75]}}')
    assert run == Run(seed=1, optim=Optim(lr=1.0, betas=(0.5, 0.75)))
    assert type(run.optim.lr) is float
    assert replace(run, seed=2).seed == 2
    with pytest.raises(AttributeError, match="cannot assign"):
        run.seed = 3
