import pytest

from gatewright.extras import folder_of, require


def test_require_imports_a_module_by_its_dotted_name():
    import json.decoder

    assert require("json.decoder", "train") is json.decoder


@pytest.mark.parametrize("module", ["not_a_module", "not_a_module.inside"])
def test_require_names_the_install_line(module):
    with pytest.raises(ImportError, match=rf"{module} is not installed .* pip install 'gatewright\[train\]'"):
        require(module, "train")


def test_the_folder_of_a_package_is_found_without_importing_it(tmp_path, monkeypatch):
    (tmp_path / "there_but_broken").mkdir()
    (tmp_path / "there_but_broken" / "__init__.py").write_text("import not_a_module")
    monkeypatch.syspath_prepend(tmp_path)
    assert folder_of("there_but_broken", "train") == tmp_path / "there_but_broken"
    with pytest.raises(ImportError, match=r"not_a_module is not installed .* pip install 'gatewright\[train\]'"):
        folder_of("not_a_module", "train")


def test_require_does_not_blame_a_module_for_what_it_imports(tmp_path, monkeypatch):
    (tmp_path / "there_but_broken.py").write_text("import not_a_module")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="No module named 'not_a_module'"):
        require("there_but_broken", "train")
