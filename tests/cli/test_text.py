"""What the commands make of a language model."""

import json
import shutil

import pytest

from tests.train.runs import write_text


def test_predict_says_how_well_files_are_predicted(gatewright, text_run, tmp_path):
    result, output = text_run
    shutil.copytree(output / "examples", tmp_path / "texts")
    (tmp_path / "texts" / "empty").touch()
    example, empty = tmp_path / "texts" / "test.txt", tmp_path / "texts" / "empty"
    status, printed, errors = gatewright("predict", output, tmp_path / "texts")
    assert (status, errors) == (0, "")
    bits = f"{result['test_bits_per_byte']:.4f}"
    assert example.stat().st_size == result["data"][-1]["num_items"]
    assert printed.splitlines() == [
        f"{empty}: 0.0000 bits per byte, 0 bytes",
        f"{example}: {bits} bits per byte, {example.stat().st_size} bytes",
    ]
    status, printed, errors = gatewright("predict", output, example, "nowhere.txt", "--json")
    assert (status, errors) == (2, "error: nowhere.txt: No such file or directory.\n")
    found = json.loads(printed)
    assert found.pop("bits_per_byte") == pytest.approx(result["test_bits_per_byte"])
    assert (found["file"], found["bytes"]) == (str(example), example.stat().st_size)


def test_evaluate_prints_the_figure_and_the_experts(gatewright, text_run):
    result, output = text_run
    status, printed, errors = gatewright("evaluate", output)
    assert (status, errors) == (0, "")
    assert printed.endswith(
        f"test bits per byte {result['test_bits_per_byte']:.4f} of {result['data'][-1]['num_items']} bytes\n"
    )
    assert "Experts of blocks.0.ffn, by the test bytes" in printed
    status, _, errors = gatewright("evaluate", output, "--flip")
    assert (status, errors) == (2, "error: --flip mirrors images, and the run at hand is one of bytes: leave it out.\n")


def test_generate_writes_on(gatewright, text_run, trained):
    output = text_run[1]
    first = gatewright("generate", output, "--prompt", "line é", "--length", 9)
    assert first == gatewright("generate", output, "--prompt", "line é", "--length", 9)
    assert (first[0], first[2]) == (0, "")
    assert first[1].startswith("line é")
    assert gatewright("generate", output, "--length", 0) == (0, "\n", "")
    assert gatewright("generate", output, "--temperature", -1)[::2] == (
        2,
        "error: length and temperature are not negative; got 400 and -1.0.\n",
    )
    assert gatewright("generate", trained)[::2] == (
        2,
        "error: generate takes the run of a language model; got one of the task classification.\n",
    )


def test_flags_and_a_dry_run_reach_the_text(gatewright, tmp_path):
    text = write_text(tmp_path)
    sizes = {"num-layers": 1, "dim": 12, "num-heads": 2, "router": "hashed"}
    words = [word for name, value in sizes.items() for word in (f"--model.{name}", value)]
    status, printed, errors = gatewright(
        "train", "python-lm", "--data.name", "text", "--data.path", text, *words, "--dry-run"
    )
    assert status == 0, errors
    assert "bytes to train on" in printed
    status, _, errors = gatewright("train", "python-lm", "--data.name", "text", "--dry-run")
    assert (status, errors.count("\n")) == (2, 1)
    assert "--data.path names the file or folder of --data.name text" in errors
