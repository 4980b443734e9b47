"""What ``gatewright study`` does: real runs of two small networks, stopped, taken up again, and one that fails."""

import json
import signal

import pytest
import torch

from gatewright.cli.study import StudyArguments, planned_runs
from gatewright.studies import STUDIES
from tests.train.runs import finish, start, wait_until

MINE = '''
from dataclasses import replace
from gatewright.studies import Arm, Study, Tier

def study():
    """Two networks, and one whose learning rate is far too high."""
    arms = (
        Arm("mixture", "four experts", "digits"),
        Arm("dense", "one expert", "digits-dense"),
        Arm("diverging", "far too fast", "digits-dense", "--optim.lr 1e30"),
    )
    long = {"digits": "--epochs 12", "digits-dense": "--epochs 2"}
    tiers = {"cpu": Tier(about="seconds", flags=long), "time": Tier(about="seconds", flags=long, alone=True)}
    return Study(name="mine", question="Does it pay?", twin="dense", arms=arms, tiers=tiers, answer="It does.")

def changed():
    """The same with another mixture."""
    first, *others = study().arms
    return replace(study(), arms=(replace(first, flags="--model.top-k 3"), *others))
'''


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path


@pytest.mark.slow
def test_a_study_is_stopped_taken_up_again_and_says_what_failed(gatewright, mine):
    words = ("study", "mine:study", "--output", mine / "elsewhere")
    process = start(*words, folder=mine)
    wait_until(lambda: list(mine.glob("elsewhere/mine/cpu/mixture-0/checkpoints/*")) or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    status, printed, errors = finish(process)
    assert (status, errors) == (128 + signal.SIGTERM, "stopped; the same command goes on where this one was\n")
    assert "1 of 3: mixture, seed 0\n" in printed
    assert not (mine / "studies").exists()

    status, printed, errors = gatewright(*words, "--jobs", "2")
    assert (status, errors) == (1, "1 failed: diverging, seed 0\n")
    assert "1 of 3: mixture, seed 0 goes on\n" in printed
    assert "mixture, seed 0: accuracy" in printed
    assert "diverging, seed 0 failed; the end of" in printed
    assert "error: " in printed  # which the run's log ends with
    kept = sorted((mine / "studies/results/mine/cpu").iterdir())
    assert [file.name for file in kept] == ["dense-0.json", "mixture-0.json"]
    assert not any(str(mine) in file.read_text() for file in kept)
    assert json.loads(kept[1].read_text())["study"] == {"name": "mine", "tier": "cpu", "arm": "mixture", "jobs": 2}
    page = (mine / "docs/results/mine.md").read_text()
    assert "**Answer.** It does." in page
    assert "| `mixture` | four experts |" in page

    finished = [*words, "--arms", "dense", "mixture"]
    assert gatewright(*finished)[:2] == (
        0,
        "mine: 2 runs, of which 2 are kept in studies/results\ndocs/results/mine.md\n",
    )
    finished[1] = "mine:changed"
    status, _, errors = gatewright(*finished)
    assert status == 2
    assert "1 run of 2 began with other settings than their arms have now" in errors
    assert "mixture-0.json: model.top_k was 2 and is 3" in errors
    assert gatewright("compare", kept[1], "--to", kept[0])[0] == 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("langage", "did you mean 'language'?"),
        ("language --budget gup", "did you mean 'gpu'?"),
        ("language --arms dens", "did you mean 'dense'?"),
        ("language --page", "No run of language is kept"),
        ("mine:study --budget time --jobs 2", "one at a time; got --jobs 2"),
        ("mine:study --jobs 0", "--jobs and --threads are 1 or more"),
        ("mine:nothing", "cannot be imported"),
        ("repair --data-path nowhere", "nowhere"),
    ],
)
@pytest.mark.usefixtures("mine")
def test_what_cannot_be_run_is_said_first(gatewright, words, sentence):
    status, printed, errors = gatewright("study", *words.split())
    assert (status, printed) == (2, "")
    assert sentence in errors


def test_studies_are_listed(gatewright):
    status, printed, errors = gatewright("study")
    assert (status, errors) == (0, "")
    assert all(name in printed for name in STUDIES)


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_every_arm_and_every_tier_can_be_trained(name):
    """All arms in the tier that has most, and one arm of each recipe in every other."""
    study = STUDIES[name]
    widest = max(study.tiers, key=lambda budget: len(study.arms_of(study.tiers[budget])))
    assert len(study.arms_of(study.tiers[widest])) == len(study.arms)
    for budget, tier in study.tiers.items():
        if "--cuda-graphs" in str(tier.flags) and not torch.cuda.is_available():
            continue  # which is refused without a GPU
        every = study.arms_of(tier)
        first = {arm.recipe: arm for arm in reversed(every)}.values()
        arms = tuple(arm.name for arm in (every if budget == widest else first))
        runs = planned_runs(study, tier, StudyArguments(budget=budget, arms=arms))
        assert [run.arm.name for run in runs] == list(arms) * len(tier.seeds)
