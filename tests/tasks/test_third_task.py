"""A task that the package does not know: trained, resumed, loaded, and the same on several processes."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from gatewright.data import DataConfig
from gatewright.parallel import expert_mesh
from gatewright.recipes import RECIPES
from gatewright.tasks import TASKS
from gatewright.train import load_config, load_run, train
from gatewright.train.build import build_engine
from gatewright.train.strategies.ddp import DDPStrategy
from gatewright.train.strategies.single import ALONE
from tests.tasks.table import Regression, RegressorConfig, regression
from tests.train.runs import logged


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(TASKS, "regression", Regression())


def test_a_program_trains_resumes_and_loads_a_task_of_its_own(tmp_path, capsys):
    config = regression(tmp_path / "run", epochs=3)
    result, output = train(config)
    printed = capsys.readouterr().out
    assert "60 rows to train on, 10 held out, 10 to test on" in printed
    assert "held-out squared error " in printed
    first, last = (logged(output)[place]["values"] for place in (0, -1))
    assert "train/rows_per_second" in first
    assert last == pytest.approx(
        {key: last[key] for key in last} | {"test/squared_error": result["test_squared_error"]}
    )
    assert result["active_flops_per_row"] > 0
    assert (output / "report.html").is_file()
    assert load_config(output / "config.yaml") == config
    trained = load_run(output)
    assert trained.fingerprint == {"num_rows": 60, "columns": 3}
    features, numbers, weights = Regression()._batch(Regression().load(config.data, None).test)
    error = ((trained.model(features) - numbers).square() * weights).sum() / weights.sum()
    assert float(error.detach()) == pytest.approx(result["test_squared_error"], rel=1e-5)

    half = replace(config, epochs=1, output=str(tmp_path / "half"))
    train(half)
    with pytest.raises(ValueError, match=r"data.rows was 60 and is 80, but it decides which data there are"):
        train(replace(half, data=replace(half.data, rows=80)), resume=True)


def test_a_model_of_another_task_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="The task regression takes a model of RegressorConfig and data of TableConfig"
    ):
        replace(regression(tmp_path), data=DataConfig())
    with pytest.raises(ValueError, match="The task classification takes a model of CnnConfig, DigitsConfig, ResNets"):
        replace(RECIPES["digits"](), model=RegressorConfig())
    with pytest.raises(ValueError, match="No task is called 'regresion'; did you mean 'regression'"):
        replace(regression(tmp_path), task="regresion")


def losses(strategy):
    """Losses of a batch of which each process has other real rows, and the weights after it."""
    TASKS["regression"] = Regression()
    torch.manual_seed(0)
    config = regression("unused")
    engine = build_engine(config, Regression().load(config.data, None), torch.device("cpu"), strategy)
    batch = next(
        Regression().training_batches(Regression().load(config.data, None).train, config.data, seed=0, epoch=0, start=0)
    )
    report = engine.step([batch])
    weight = engine.model.get_parameter("0.weight").detach()
    return report.task_loss, weight.tolist()


def both():
    return losses(ALONE), losses(DDPStrategy(expert_mesh(1, "cpu")))


@pytest.mark.distributed
def test_the_mean_over_real_rows_is_the_global_batchs(ranks):
    for alone, together in ranks(2, both):
        assert together[0] == pytest.approx(alone[0], rel=1e-6)
        assert_close(torch.tensor(together[1]), torch.tensor(alone[1]))
