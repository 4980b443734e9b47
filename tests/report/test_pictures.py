import json

import pytest

from gatewright.report import write_pictures

pytest.importorskip("matplotlib")


def test_every_picture_of_a_run_and_none_of_layers_that_are_not_there(run_folder, result):
    pictures, layer = write_pictures(run_folder), "net_moe___co.png"
    assert {path.name for path in pictures} == {"curves.png", "confusion.png", f"load-{layer}", f"classes-{layer}"}
    assert all(path.parent == run_folder and path.stat().st_size > 1000 for path in pictures)
    (run_folder / "result.json").write_text(json.dumps(result | {"layers": {}}))
    assert {path.name for path in write_pictures(run_folder)} == {"curves.png", "confusion.png"}
