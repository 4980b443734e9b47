"""What an operation makes of a finished run: its weights, its optimizers, its settings, and what it can go on to."""

import torch
from torch.testing import assert_close

from gatewright.train import load_config, load_run, train
from gatewright.train.change import change_run
from gatewright.train.checkpoint.format import load_checkpoint, newest_checkpoint
from gatewright.train.operations import Densify, Grow, Prune
from tests.train.runs import FIVE_STEPS, digits_config, text_config, write_text

KEPT = [3, 0]


def state_of(run):
    return load_checkpoint(newest_checkpoint(run / "checkpoints"))


def origin(name, tensors):
    """The tensor of the old run that one of the new run is to be: that of the expert kept, or the kept rows."""
    for place, expert in enumerate(KEPT):
        name = name.replace(f"experts.experts.{place}.", f"experts.{expert}.")
    value = tensors[name.replace("mixture.experts.", "mixture.experts.experts.")]
    return value[KEPT] if "router" in name and value.dim() else value


def test_the_new_run_goes_on_from_the_evaluated_weights_with_its_part_of_every_optimizers_state(tmp_path):
    """Of Muon with AdamW beside it, and of averaged weights."""
    optim = {"name": "muon", "ema_decay": 0.5}
    _, run = train(digits_config(tmp_path / "run", data=FIVE_STEPS, optim=optim))
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    change = change_run(run, Prune(keep=tuple(KEPT)), tmp_path / "new", test=True)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == files
    assert list(change.figures) == ["held-out", "test"]
    before, after = state_of(run)["engine"], state_of(tmp_path / "new")["engine"]
    for name in ("step_count", "averaged", "settings"):
        assert after[name] == before[name]
    assert torch.equal(after["random_state"], before["random_state"])
    for name, value in after["model"].items():
        assert torch.equal(value, origin(name, before["average"]))
        assert torch.equal(after["average"][name], value)
    for saved, kept in zip(before["optimizers"], after["optimizers"], strict=True):
        assert len(saved) > len(kept) > 0
        for name, value in kept.items():
            assert torch.equal(value, origin(name, saved))
    result, _ = train(load_config(tmp_path / "new" / "config.yaml"), resume=True)
    said = f"Prune of {run}: every mixture: kept 3, 0."
    assert result["resumed_with"] == [said]


def test_a_language_models_experts_keep_their_width_and_its_dense_twin_gets_their_mean(tmp_path):
    (tmp_path / "data").mkdir()
    _, run = train(text_config(tmp_path / "run", write_text(tmp_path / "data"), data={"holdout": 0.2}))
    tokens = torch.randint(256, (3, 16))
    change_run(run, Grow(num_experts=8, top_k=4), tmp_path / "grown")
    trained, grown = load_run(run), load_run(tmp_path / "grown")
    assert (grown.config.model.ffn, grown.config.model.num_experts, grown.config.model.top_k) == (128, 8, 4)
    assert_close(grown.model(tokens), trained.model(tokens))
    change_run(run, Densify(by="load"), tmp_path / "dense")
    dense = load_run(tmp_path / "dense")
    assert (dense.config.model.ffn, dense.config.model.num_experts) == (32, 1)
    kept = {name for name in state_of(run)["engine"]["optimizers"][0] if "ffn." not in name}
    assert set(state_of(tmp_path / "dense")["engine"]["optimizers"][0]) == kept
    result, _ = train(load_config(tmp_path / "dense" / "config.yaml"), resume=True)
    assert result["layers"] == {}
