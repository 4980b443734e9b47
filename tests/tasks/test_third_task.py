"""A task that the package does not know, the example of docs/tasks.md: by the command line, and in a program."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from examples.regression.model import RegressorConfig
from examples.regression.task import Regression, diabetes
from gatewright.cli.main import main
from gatewright.data import DataConfig
from gatewright.parallel import expert_mesh
from gatewright.recipes import RECIPES
from gatewright.train import load_config, load_run, train
from gatewright.train.build import build_engine
from gatewright.train.strategies.ddp import DDPStrategy
from gatewright.train.strategies.single import ALONE
from gatewright.train.validate import validate
from tests.tasks.table import Weighted, weighted
from tests.train.runs import logged

RECIPE = "examples.regression.recipe:regression"


def test_the_command_line_trains_it_on_several_processes_and_answers_all_questions(tmp_path, capsys):
    run = str(tmp_path / "run")
    assert main(["train", RECIPE, "--epochs", "1", "--processes", "2", "--output", run, "--tracking.no-enabled"]) == 0
    result = json.loads(Path(run, "result.json").read_text())
    error = f"test squared error {result['test_squared_error']:.3f} of the variance"
    assert (result["item"], result["num_test_items"], result["recipe"]) == ("row", 89, RECIPE)

    capsys.readouterr()
    assert main(["evaluate", run]) == 0
    printed = capsys.readouterr().out
    assert printed.endswith(f"{error} of 89 rows\n")
    assert "Experts of mixture, by the test rows" in printed
    assert "highest quarter" in printed
    assert main(["evaluate", run, "--flip"]) == 2

    Path(run, "report.html").unlink()
    assert main(["report", run]) == 0
    assert f"{run}/report.html" in capsys.readouterr().out.splitlines()
    page = Path(run, "report.html").read_text().partition("</style>")[2]
    assert "Squared error by quarter of the target" in page
    assert "image" not in page

    names, rows = diabetes()
    with (tmp_path / "patients.csv").open("w", newline="") as file:
        csv.writer(file).writerows([names[:-1], *rows[:3, :-1].tolist()])
    assert main(["predict", run, str(tmp_path / "patients.csv"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert len(answer["progression"]) == 3
    assert list(answer["experts"]) == ["mixture"]
    assert main(["plan", RECIPE]) == 0


def test_a_program_trains_resumes_and_loads_it(tmp_path, capsys):
    config = weighted(tmp_path / "run")
    result, output = train(config, report=lambda folder: [folder / "metrics.jsonl"])
    assert "309 rows to train on, 44 held out, 89 to test on" in capsys.readouterr().out
    assert not (output / "report.html").exists()
    assert "train/rows_per_second" in logged(output)[0]["values"]
    assert logged(output)[-1]["values"]["test/squared_error"] == pytest.approx(result["test_squared_error"])
    assert load_config(output / "config.yaml") == config
    trained = load_run(output)
    columns, target, _ = Regression().load(config.data, config.model).test
    error = (trained.model(columns) - target).square().mean()
    assert float(error.detach()) == pytest.approx(result["test_squared_error"], rel=1e-5)
    longer = replace(config, epochs=3)
    with pytest.raises(ValueError, match=r"data.path was None and is 'x.csv', but it decides which data there are"):
        train(replace(longer, data=replace(config.data, path="x.csv")), resume=True)
    assert train(longer, resume=True)[0]["epochs"] == 3


def check(config):
    validate(config, 1, torch.device("cpu"))


def test_a_task_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"takes a model of RegressorConfig and data of TableConfig; got Regr.*DataC"):
        check(replace(weighted(), data=DataConfig()))
    with pytest.raises(
        ValueError, match="The task classification takes a model of CnnConfig, ConvNetConfig, DigitsConfig, ResNets"
    ):
        check(replace(RECIPES["digits"](), model=RegressorConfig()))
    with pytest.raises(ValueError, match="No task is called 'clasification'; did you mean 'classification'"):
        check(replace(RECIPES["digits"](), task="clasification"))
    with pytest.raises(ValueError, match="The task nowhere:Task cannot be imported: No module named 'nowhere'"):
        check(weighted(task="nowhere:Task"))
    with pytest.raises(ValueError, match=r"a class that is a gatewright.tasks.Task; got 'os:getcwd'"):
        check(weighted(task="os:getcwd"))


def losses(strategy):
    """Losses of a batch of which each process has other rows that count, and the weights after it."""
    torch.manual_seed(0)
    config = weighted()
    splits = Weighted().load(config.data, config.model)
    engine = build_engine(config, splits, torch.device("cpu"), strategy)
    batch = next(Weighted().training_batches(splits.train, config.data, seed=0, epoch=0, start=0))
    report = engine.step([batch])
    return float(report.task_loss), engine.model.get_parameter("first.weight").detach().tolist()


def both():
    return losses(ALONE), losses(DDPStrategy(expert_mesh(1, "cpu")))


@pytest.mark.distributed
def test_the_mean_over_rows_that_count_is_the_global_batchs(ranks):
    for alone, together in ranks(2, both):
        assert together[0] == pytest.approx(alone[0], rel=1e-6)
        assert_close(torch.tensor(together[1]), torch.tensor(alone[1]))
