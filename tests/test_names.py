import pytest

from gatewright.names import known


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="No loss is called 'laod'; did you mean 'load'\\? Known: importance, load\\."):
        known("laod", ["importance", "load"], "loss")


def test_where_nothing_is_known_nothing_is_offered():
    with pytest.raises(ValueError, match="No option is called 'x'\\. Known: none\\."):
        known("x", [], "option")


def test_what_is_like_no_name_gets_no_offer():
    with pytest.raises(ValueError, match="No recipe is called 'xyz'\\. Known: digits, top\\."):
        known("xyz", ["digits", "top"], "recipe")
