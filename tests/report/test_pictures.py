import json

import pytest

from gatewright.report import write_pictures

pytest.importorskip("matplotlib")


def test_every_picture_of_a_run(run_folder):
    names = {path.name for path in write_pictures(run_folder)}
    layer = "net_moe___co.png"
    assert names == {"curves.png", "confusion.png", f"load-{layer}", f"classes-{layer}"}
    assert all((run_folder / name).stat().st_size > 1000 for name in names)


def test_a_dense_run_has_no_pictures_of_layers(run_folder, result):
    (run_folder / "result.json").write_text(json.dumps(result | {"layers": {}}))
    assert {path.name for path in write_pictures(run_folder)} == {"curves.png", "confusion.png"}
