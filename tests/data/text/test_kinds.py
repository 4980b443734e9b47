import pytest

from gatewright.data.text.kinds import CHARACTER_KINDS, PYTHON_KINDS, character_kinds, python_kinds

LETTERS = dict(zip(PYTHON_KINDS, "kn1s#o_x", strict=True))


def drawn(source):
    """Write one letter per byte for its kind."""
    return "".join(LETTERS[PYTHON_KINDS[kind]] for kind in python_kinds(source).tolist())


@pytest.mark.parametrize(
    ("source", "kinds"),
    [
        (b"if x1 >= 0x1F:  # why\n", "kk_nn_oo_1111o__#####_"),
        (b"y = \"a b\" + '''\nc'''\n", "n_o_sssss_o_ssssssss_"),
        ("naïve = 'é'\n".encode(), "nnnnnn_o_ssss_"),
        (b"def f():\r\n\treturn 1.5\r\n", "kkk_nooo___kkkkkk_111__"),
        (b"x = (1,\n", "n_o_o1o_"),
        (b"a = 1\n  b = 2\n c = 3\n", "n_o_1___n_o_1__x_x_x_"),
        (b"x = 1\n'''never closed\n", "n_o_1_xxxxxxxx_xxxxxx_"),
        (b"", ""),
    ],
)
def test_every_byte_of_a_python_source_has_its_kind_up_to_where_it_is_broken(source, kinds):
    assert drawn(source) == kinds


def test_any_bytes_have_kinds():
    everything = bytes(range(256)) * 2
    assert len(drawn(everything)) == 512
    kinds = [CHARACTER_KINDS[kind] for kind in character_kinds("a1, é".encode()).tolist()]
    assert kinds == ["letter", "digit", "punctuation", "white space", "other", "other"]
