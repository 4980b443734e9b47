import pytest

from gatewright.names import imported, known


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="No loss is called 'laod'; did you mean 'load'\\? Known: importance, load\\."):
        known("laod", ["importance", "load"], "loss")


def test_where_nothing_is_known_nothing_is_offered():
    with pytest.raises(ValueError, match="No option is called 'x'\\. Known: none\\."):
        known("x", [], "option")


def test_what_is_like_no_name_gets_no_offer():
    with pytest.raises(ValueError, match="No recipe is called 'xyz'\\. Known: digits, top\\."):
        known("xyz", ["digits", "top"], "recipe")


@pytest.mark.parametrize(
    ("name", "reason"), [("nowhere:f", "No module named 'nowhere'"), ("json:f", "no attribute 'f'")]
)
def test_what_cannot_be_imported_is_said_with_what_to_do(name, reason):
    with pytest.raises(
        ValueError, match=rf"The task {name} cannot be imported: .*{reason}.*Put the folder .* on PYTHONPATH"
    ):
        imported(name, "task")
