"""The ready files start what they say: their commands are ours, and the Slurm script runs."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from gatewright.cli.train import parse_train
from gatewright.recipes import RECIPES
from gatewright.train.validate import validate
from tests.integrations.deepspeed.runs import installed
from tests.train.runs import environment, steps_of

DEPLOY = Path(__file__).parent.parent / "deploy"
# A cluster of two tasks on this machine: each is started as srun starts it, and the first that fails ends the others.
SRUN = """#!/usr/bin/env bash
[[ $1 == --kill-on-bad-exit=1 ]] && shift
tasks=()
for number in 0 1; do
    SLURM_PROCID=$number SLURM_LOCALID=$number SLURM_NTASKS=2 "$@" & tasks+=($!)
done
for task in "${tasks[@]}"; do wait "$task" || exit $?; done
"""
QUIET = ("--tracking.no-enabled", "--tracking.log-interval", "1", "--no-report")
GATEWRIGHT = f'#!/usr/bin/env bash\nexec {shlex.quote(sys.executable)} -m gatewright "$@"\n'


def commented(name):
    """The words of the ``gatewright train`` that a file's comment says."""
    text = (DEPLOY / name).read_text(encoding="utf-8").replace("\\\n#", "")
    (line,) = re.findall(r"^#   (?:deepspeed .*gatewright train|sbatch deploy/slurm.sh \S+) (.*)$", text, re.MULTILINE)
    return shlex.split(line)


def job():
    return yaml.safe_load((DEPLOY / "azure-ml.yml").read_text(encoding="utf-8"))


def job_words():
    return shlex.split(job()["command"].partition("gatewright train ")[2])


@pytest.mark.parametrize(
    ("words", "world"),
    [(job_words(), 4), (commented("slurm.sh"), 8), (commented("hostfile"), 8)],
    ids=["azure", "slurm", "hostfile"],
)
def test_the_commands_are_runs_that_fit_their_processes(words, world):
    config = parse_train(RECIPES[words[0]](), words[1:]).run
    assert (config.model.num_experts, config.parallel.ep_size) == (40, 4)
    assert config.processes in (1, world)
    validate(config, world, torch.device("cuda"))


def test_the_environment_of_the_azure_job_is_there_and_has_what_its_tracking_needs():
    packages = yaml.safe_load((DEPLOY / job()["environment"]["conda_file"]).read_text(encoding="utf-8"))["dependencies"]
    assert "azureml-mlflow" in packages[-1]["pip"]
    assert (DEPLOY / job()["code"] / "pyproject.toml").is_file()


def test_azure_takes_the_job():
    python = Path(sys.prefix) / "azure" / "bin" / "python"
    if not python.exists():
        pytest.skip("Azure's own package, azure-ai-ml, checks the job: make azure")
    code = (
        "import sys, json; from azure.ai.ml import load_job; job = load_job(sys.argv[1]); "
        "print(json.dumps([job.command, job.compute, list(job.outputs)]))"
    )
    run = subprocess.run([python, "-c", code, DEPLOY / "azure-ml.yml"], capture_output=True, text=True, check=True)
    command, *others = json.loads(run.stdout.splitlines()[-1])
    assert "gatewright train cifar10-resnets" in command
    assert others == ["four-gpus", ["run"]]


def hosts():
    from deepspeed.launcher.runner import fetch_hostfile

    return dict(fetch_hostfile(DEPLOY / "hostfile"))


@installed
def test_deepspeed_reads_the_hostfile(run_unhooked):
    assert run_unhooked(hosts) == {"worker-0": 4, "worker-1": 4}


def test_the_slurm_script_is_a_script():
    subprocess.run(["bash", "-n", DEPLOY / "slurm.sh"], check=True)
    assert os.access(DEPLOY / "slurm.sh", os.X_OK)


@pytest.mark.slow
@pytest.mark.distributed
def test_the_slurm_script_runs_and_goes_on_when_it_is_submitted_again(tmp_path):
    for name, text in (
        ("srun", SRUN),
        ("scontrol", "#!/usr/bin/env bash\necho localhost\n"),
        ("gatewright", GATEWRIGHT),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_ID": str(os.getpid()), "SLURM_CPUS_PER_TASK": "1"}
    variables = environment(tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}", **slurm)
    for epochs in (1, 2):
        flags = ["--epochs", str(epochs), "--parallel.ep-size", "2", *QUIET]
        run = subprocess.run(
            [DEPLOY / "slurm.sh", "run", "digits", *flags], cwd=tmp_path, env=variables, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        assert f"epoch {epochs}/{epochs}" in run.stdout
    assert steps_of(tmp_path / "run") == list(range(1, 43))
