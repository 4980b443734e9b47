"""The script that ``gatewright completion bash`` prints, in a real shell."""

import shutil
import subprocess

import pytest

ASK = """
source ./script
for line in c "train di" "train digits --model.rou" "plan digits --links.ins" "evaluate --f" "train digits --engine d"
do
    COMP_WORDS=(gatewright $line)
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    _tyro_gatewright
    echo "${COMPREPLY[@]}"
done
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_recipes_flags_and_values(gatewright, tmp_path):
    status, script, errors = gatewright("completion", "bash")
    assert (status or 0, errors) == (0, "")
    (tmp_path / "script").write_text(script)
    shell = subprocess.run(["bash", "-c", ASK], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert shell.stdout.splitlines() == [
        "compare completion",
        "digits digits-dense",
        "--model.router --model.router-options",
        "--links.inside --links.inside-latency",
        "--flip",
        "deepspeed",
    ]
