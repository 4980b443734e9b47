from typing import Literal, Optional

import pytest

from gatewright.models.options import check_options


class Made:
    def __init__(
        self,
        dim: int,
        *,
        count: int = 1,
        rate: float = 0.0,
        whole: bool = False,
        score: Literal["high", "low"] = "low",
        group: int | None = None,
        policy: Optional[str] = None,  # noqa: UP045 as others' code has it
        anything=None,
    ) -> None: ...


def test_values_of_the_annotated_types_pass():
    check_options(Made, {"count": 2, "rate": 1, "whole": True, "score": "high"}, "it", given=["dim"])
    check_options(Made, {"rate": 0.5, "group": None, "policy": "x", "anything": "at all"}, "it", given=["dim"])
    check_options(Made, {"group": 3, "policy": None}, "it", given=["dim"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"counts": 2}, "No option of it is called 'counts'; did you mean 'count'?"),
        ({"count": True}, "The option count of it is an integer; got True."),
        ({"rate": "fast"}, "rate of it is a number; got 'fast'."),
        ({"whole": 1}, "whole of it is true or false; got 1."),
        ({"score": "hi"}, "score of it is 'high' or 'low'; got 'hi'."),
        ({"group": "None"}, "group of it is an integer or None; got 'None'."),
        ({"policy": 3}, "policy of it is a word or None; got 3."),
    ],
)
def test_other_names_and_values_are_refused(options, message):
    with pytest.raises(ValueError, match=r"\w") as caught:
        check_options(Made, options, "it", given=["dim"])
    assert message in str(caught.value)
