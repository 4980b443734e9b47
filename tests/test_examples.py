"""Every example runs, is short, and does what it says. The task of one's own has its tests in tests/tasks."""

import runpy
from pathlib import Path

import pytest

from tests.data.samples import write_class_folders
from tests.train.runs import write_text

EXAMPLES = Path(__file__).parent.parent / "examples"
FILES = sorted(path.stem for path in EXAMPLES.glob("*.py"))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run an example's main with arguments in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GATEWRIGHT_CACHE", str(tmp_path / "cache"))
    return lambda name, *words: runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](*words)


def test_every_example_is_short_listed_and_tested():
    index, tests = (EXAMPLES / "README.md").read_text(), Path(__file__).read_text()
    for name in FILES:
        assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 60, name
        assert f"[{name}.py]({name}.py)" in index
        assert f'"{name}"' in tests


def test_plain_loop(run):
    assert run("plain_loop") > 0.85


def test_transformer_block(run):
    assert sum(run("transformer_block")) == 2 * (10 + 7 + 3)


def test_different_experts(run):
    counts = run("different_experts")
    assert sum(counts.values()) == 1000
    assert min(counts.values()) > 0


def test_own_router(run):
    counts = run("own_router")
    assert sum(counts) == 200
    assert min(counts) > 0


def test_upcycling(run):
    dense, change, mixture = run("upcycling")
    assert change < 1e-5
    assert mixture < dense


@pytest.mark.filterwarnings("ignore")  # Lightning warns of its own use of torch, and of data without workers
def test_lightning_module(run):
    assert run("lightning_module") > 0.9


def test_transformers_trainer(run):
    assert run("transformers_trainer") < 2  # of log 16 = 2.77, in the mean over training


def test_own_images(run, tmp_path):
    page = run("own_images", str(write_class_folders(tmp_path / "pets", per_class=20)))
    assert page.is_file()


def test_own_text(run, tmp_path):
    assert run("own_text", str(write_text(tmp_path)))
