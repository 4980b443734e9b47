"""Checkpoints of the engine at another number of processes, sharded or not: the trajectory goes on as it was."""

import pytest

from gatewright.parallel import whole_state
from gatewright.train.checkpoint.format import load_checkpoint, newest_checkpoint
from gatewright.train.checkpoint.writer import Saver
from gatewright.train.strategies.single import ALONE
from tests.train.spread import FURTHER, SAVED, engine_of, largest_difference, several, train

pytestmark = pytest.mark.distributed


def resharded(folder, ep_size, options, shard="none"):
    """Go on from a checkpoint, and return the state at the end."""
    engine = engine_of(several(ep_size, shard) if ep_size else ALONE, **options)
    engine.load_state_dict(load_checkpoint(newest_checkpoint(folder))["engine"])
    train(engine, SAVED, SAVED + FURTHER)
    return engine.state_dict()["model"]


def save_midway(folder, ep_size, options, shard="none", in_background=False):
    """Train for a few steps, save, and where training need not wait, go on."""
    engine = engine_of(several(ep_size, shard, background=in_background) if ep_size else ALONE, **options)
    train(engine, 0, SAVED)
    with Saver(folder, engine.strategy, in_background=in_background) as saver:
        saver.save({"engine": engine.state_dict(part=True)}, engine.model, engine.step_count)
        if in_background:
            train(engine, SAVED)


def uninterrupted(options):
    engine = engine_of(ALONE, **options)
    train(engine, 0, SAVED + FURTHER)
    return engine.state_dict()["model"]


def test_a_checkpoint_of_four_processes_goes_on_at_one_two_and_three(ranks, tmp_path):
    options = {"experts": "grouped-relu-bias", "ema_decay": 0.9}
    ranks(4, save_midway, tmp_path, 4, options)
    parts = [f"part-{number}-of-4-step-00000010.safetensors" for number in (1, 2, 3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*parts, "step-00000010.safetensors"]
    expected = uninterrupted(options)
    assert largest_difference(resharded(tmp_path, None, options), expected) < 1e-8
    for world in (2, 3):
        assert largest_difference(ranks(world, resharded, tmp_path, world, options)[0], expected) < 1e-8


@pytest.mark.slow
def test_a_checkpoint_of_four_processes_goes_on_at_eight(ranks, tmp_path):
    options = {"experts": "grouped-relu-bias"}
    ranks(4, save_midway, tmp_path, 4, options)
    assert largest_difference(ranks(8, resharded, tmp_path, 4, options)[0], uninterrupted(options)) < 1e-8


def test_a_sharded_checkpoint_goes_on_unsharded_and_back(ranks, tmp_path):
    options, expected = {}, uninterrupted({})
    ranks(4, save_midway, tmp_path / "sharded", 2, options, "fsdp")
    assert largest_difference(resharded(tmp_path / "sharded", None, options), expected) < 1e-8
    ranks(2, save_midway, tmp_path / "not", 2, options)
    assert largest_difference(ranks(4, resharded, tmp_path / "not", 2, options, "fsdp")[0], expected) < 1e-8


def test_a_checkpoint_written_beside_the_training_holds_the_state_of_its_step(ranks, tmp_path):
    options = {"experts": "grouped-relu-bias"}
    ranks(2, save_midway, tmp_path / "beside", 2, options, "none", True)
    ranks(2, save_midway, tmp_path / "between", 2, options)
    beside, between = (load_checkpoint(newest_checkpoint(folder))["engine"] for folder in sorted(tmp_path.iterdir()))
    for kind in ("model", "average"):
        if between[kind]:
            assert largest_difference(whole_state(beside[kind]), whole_state(between[kind])) == 0
    assert beside["step_count"] == between["step_count"] == SAVED
