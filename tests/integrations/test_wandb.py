import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from gatewright.report import write_all
from gatewright.train import TrackingConfig, load_config, train
from tests.train.runs import FIVE_STEPS, digits_config, logged

pytest.importorskip("wandb", reason="wandb is missing: pip install 'gatewright[wandb]'")


def records_of(file):
    """What a run logged, in order, from the file that ``wandb sync`` uploads: a log as LevelDB's, behind 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, record = file.read_bytes(), 7, b""
    while place < len(content):
        size, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        record += content[place + 7 : place + 7 + size]
        if kind in (1, 4):  # whole, or the last part of it
            yield Record.FromString(record)
            record = b""
        place += 7 + size
        left = -place % 32768
        place += left if left < 7 else 0  # no header fits into the rest of a block


def test_an_offline_run_holds_its_curves_its_settings_and_its_files(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracking = TrackingConfig(name="wandb", experiment="digits", log_interval=1)
    config = replace(digits_config(tmp_path / "run", data=FIVE_STEPS), tracking=tracking)
    result, output = train(config, report=write_all)

    sync = result["tracking"].removeprefix("Weights & Biases: offline, upload it with: wandb sync ")
    records = list(records_of(*Path(sync).glob("*.wandb")))
    (run,) = (record.run for record in records if record.HasField("run"))
    assert (run.project, run.display_name) == ("digits", "digits-seed0")
    items = [record.history.item for record in records if record.HasField("history")]
    points = [{"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in line} for line in items]
    curves = [{name: value for name, value in point.items() if not name.startswith("_")} for point in points]
    expected = [{"step": line["step"], **line["values"]} for line in logged(output)]
    assert curves[: len(expected)] == expected  # and then the pictures
    assert any("classes-network.mixture" in name for point in points for name in point)
    kept = Path(sync) / "files/run"
    assert {"report.html", "result.json", "config.yaml"} <= {path.name for path in kept.iterdir()}
    assert (kept / "config.yaml").read_text() == (output / "config.yaml").read_text()
    assert load_config(output / "config.yaml") == config


def test_a_run_goes_on_under_its_id(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracking = TrackingConfig(name="wandb")
    config = replace(digits_config(tmp_path / "run", data=FIVE_STEPS), tracking=tracking)
    (one, output), (two, _) = train(config), train(replace(config, epochs=2), resume=True)
    assert one["tracking"] != two["tracking"]
    ids = {path.stem for path in (output / "wandb").glob("offline-run-*/*.wandb")}
    assert len(ids) == 1
