"""What a person sees of a command: its status, and one sentence where something is wrong."""

import signal
import sys

import pytest

from gatewright import __version__
from gatewright.cli import main
from gatewright.cli.commands import COMMANDS
from gatewright.recipes import RECIPES
from tests.train.runs import call, start


def refused(result):
    """Bad input: status 2, nothing on the output, and one sentence without a traceback."""
    status, output, errors = result
    assert (status, output, errors.count("\n")) == (2, "", 1)
    assert errors.startswith("error: ")
    return errors.strip()


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_help_names_every_command(gatewright, words):
    status, output, errors = gatewright(*words)
    assert (status, errors) == (0, "")
    assert all(f"gatewright {command} " in output or f"gatewright {command}\n" in output for command in COMMANDS)


def test_the_version(gatewright):
    assert gatewright("--version") == (0, f"{__version__}\n", "")


def test_help_of_a_recipe_lists_every_setting_with_its_value(gatewright):
    status, output, _ = gatewright("train", "digits", "--help")
    assert status == 0
    flags = (
        "--data.path --seed --epochs --output --resume --precision --model.num-experts --optim.lr --data.augment.flip"
    )
    assert all(f" {flag} " in output.replace("|", " ").replace(",", " ") for flag in flags.split())
    assert "Passes over the training data. (default: 30)" in " ".join(output.replace("│", " ").split())


def test_help_of_the_commands(gatewright):
    status, output, _ = gatewright("train", "--help")
    assert status == 0
    assert all(name in output for name in RECIPES)
    assert "gatewright train RECIPE --help lists them all" in output


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("lst", "No command is called 'lst'; did you mean 'list'? Known: compare, completion, densify"),
        ("train digit", "No recipe is called 'digit'; did you mean 'digits'? Known: cifar10-cnn,"),
        ("train --epochs 3", "train needs a recipe: gatewright train RECIPE. Known: cifar10-cnn,"),
        (
            "train cifar10-cnn --epochs 2 --model.upcycle-epoch 8",
            "Use --epochs 9 or more, a --model.upcycle-epoch below",
        ),
        ("train digits --model.router top-k --model.router-options normalize 0", "is true or false; got 0."),
        (
            "train digits --model.router-options jitter",
            "names and values alternate (NAME VALUE NAME VALUE); got jitter.",
        ),
        ("train digits --resume", "There is no run to resume at runs: name its folder"),
        (
            "evaluate nowhere",
            "No run at nowhere: it has no config.yaml, and no model.safetensors as a pretrained model has.",
        ),
        ("predict nowhere", "predict needs at least one file or folder: gatewright predict RUN FILE."),
        ("list recipes", "list takes no arguments; got recipes."),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input_gets_a_sentence(gatewright, words, sentence):
    assert sentence in refused(gatewright(*words.split()))


@pytest.mark.parametrize(
    ("words", "offers"),
    [
        ("train digits --epoch 3", ["no flag --epoch; did you mean --epochs?"]),
        ("train digits --model.num_expert=3", ["no flag --model.num-expert; did you mean --model.num-experts?"]),
        ("train digits --learning-rate 3", ["no flag --learning-rate; did you mean --optim.lr?"]),
        ("train digits --tracking.enabled False", ["Give --tracking.enabled alone, or --tracking.no-enabled."]),
        ("train cifar10-cnn --model.stem-depth 2", ["There is no flag --model.stem-depth. --help lists all."]),
        ("train digits --precision fp16", ["invalid choice 'fp16'", "'float32', 'bfloat16', 'float16'"]),
        ("train digits --optim.betas 2 0", ["error: --optim.betas should be less than 1; got 2.0."]),
        ("train digits --model.num-experts 1.5", ["error: --model.num-experts: ", "'1.5'"]),
        ("train digits --data.path nowhere", ["The digits are embedded", "take neither --data.path nor", "nowhere"]),
        ("train digits --model.losses load nan", ["`model.losses.load` should be a finite number; got nan."]),
        ("train digits --model.losses load much", ["--model.losses: the value of load is a number; got 'much'."]),
        ("evaluate", ["Missing from gatewright evaluate: RUN The run's folder. See gatewright evaluate --help."]),
    ],
)
def test_unknown_flags_and_values_get_the_nearest(gatewright, words, offers):
    message = refused(gatewright(*words.split()))
    assert [offer for offer in offers if offer not in message] == []


@pytest.mark.usefixtures("read_only_folder")
@pytest.mark.parametrize(
    "words", ["train digits --processes 2 --output folder/run", "train digits --dry-run --output folder/a/b"]
)
def test_a_folder_that_cannot_be_written_to_is_said_before_any_work(gatewright, words):
    message = refused(gatewright(*words.split(), "--tracking.no-enabled"))
    assert "error: folder cannot be written to, and the run's folder is to be folder/" in message


def test_a_dry_run_says_what_would_be_trained_and_writes_nothing(gatewright, tmp_path):
    status, output, errors = gatewright("train", "digits", "--dry-run", "--seed", "7", "--output", "run")
    assert (status, errors) == (0, "")
    assert "seed: 7\n" in output
    assert "digits on cpu: 30 epochs of 21 steps; 1,294 images to train on" in output
    assert "The run's folder: run\nThe network: 80,776 parameters, 4 experts" in output
    assert list(tmp_path.iterdir()) == []
    refused(gatewright("train", "digits", "--dry-run", "--model.upcycle-epoch", "30"))


def test_what_is_our_fault_keeps_its_traceback(monkeypatch):
    def broken(words):
        raise RuntimeError("a bug")

    monkeypatch.setattr("gatewright.cli.commands.COMMANDS", {"list": broken})
    with pytest.raises(RuntimeError, match="a bug"):
        main(["list"])


def test_ctrl_c_before_the_training_is_no_traceback(monkeypatch, capsys):
    def interrupted(words):
        raise KeyboardInterrupt

    monkeypatch.setattr("gatewright.cli.commands.COMMANDS", {"list": interrupted})
    assert main(["list"]) == 130
    assert capsys.readouterr().err == "stopped\n"


# Gets Ctrl-C while the package is being imported, and is the program that is installed.
INTERRUPTED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # A shell has its background jobs ignore it.
class Interrupter:
    def find_spec(self, name, path=None, target=None):
        if name == "gatewright.routing":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupter())
import runpy
runpy.run_module("gatewright_command", run_name="__main__")
"""


def test_ctrl_c_during_the_imports_is_no_traceback(tmp_path):
    assert call("list", folder=tmp_path, program=("-c", INTERRUPTED)) == (-signal.SIGINT, "", "")


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    process = start("list", folder=tmp_path)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() in (1, 128 + signal.SIGPIPE)  # rich's, or ours
    process.stderr.close()


def test_a_missing_extra_is_the_line_that_installs_it(gatewright, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn", None)  # as where it cannot be imported
    message = refused(gatewright(*["train", "digits", "--output", "run", "--tracking.no-enabled"]))
    assert message.startswith("error: sklearn is not installed")
    assert message.endswith("pip install 'gatewright[train]'")
    assert not (tmp_path / "run" / "config.yaml").exists()


# Makes modules impossible to import, as where no extra is installed, and then is the command line.
BLOCKED = """
import sys
extras = "tyro,rich,yaml,pydantic,mlflow,datasets,sklearn,matplotlib,PIL,safetensors"
sys.modules |= dict.fromkeys(extras.split(","))
from gatewright.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_help_needs_no_extra(tmp_path):
    status, output, errors = call("--help", folder=tmp_path, program=("-c", BLOCKED))
    assert (status, errors) == (0, "")
    assert "gatewright train RECIPE" in output
