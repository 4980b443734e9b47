import os
import sys
from pathlib import Path

import pytest

from gatewright.cli import main
from gatewright.train import train
from tests.train.runs import text_config, write_text


@pytest.fixture(autouse=True)
def _own_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GATEWRIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)  # where gatewright is
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="package")
def trained(tmp_path_factory):
    """The folder of a run that the command line trained."""
    folder = tmp_path_factory.mktemp("trained") / "[bold] run"  # with what shells and rich take for their own
    flags = "--epochs 2 --tracking.no-enabled --tracking.log-interval 1"
    assert main(["train", "digits", "--output", str(folder), *flags.split()]) == 0
    return folder


@pytest.fixture(scope="package")
def text_run(tmp_path_factory):
    """The result and the folder of a language model's run."""
    folder = tmp_path_factory.mktemp("text")
    for split in ("train", "test"):
        (folder / "data" / split).mkdir(parents=True)
        write_text(folder / "data" / split)
    (folder / "data" / "test" / "text.txt").write_bytes(b"line 1 is 11\nline 2 is 13\n" * 9)
    return train(text_config(folder / "run", folder / "data"))


@pytest.fixture
def gatewright(capsys):
    """Run a command in this process, and return its status, output and errors."""

    def call(*words):
        capsys.readouterr()
        try:
            status = main([str(word) for word in words])
        except SystemExit as stop:  # how the parser of flags ends a command
            status = stop.code
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def read_only_folder(tmp_path):
    """A folder named ``folder`` here that may not be written to, also where tests run as the superuser."""
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o555)
    tmp_path.chmod(0o555)
    mine = os.geteuid()
    if mine == 0:
        os.seteuid(65534)
    yield folder
    os.seteuid(mine)
    tmp_path.chmod(0o755)
