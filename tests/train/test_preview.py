import pytest

from gatewright.train.preview import preview
from tests.train.runs import digits_config


def test_a_run_to_go_on_with_is_described_and_left_as_it_is(finished):
    config, output, _ = finished
    before = sorted((path, path.stat().st_mtime_ns) for path in output.rglob("*"))
    said = preview(config, resume=True)
    assert "digits on cpu: 2 epochs of 21 steps, going on after step 42; 1,294 images" in said
    assert f"The run's folder: {output}\n" in said
    assert sorted((path, path.stat().st_mtime_ns) for path in output.rglob("*")) == before


def test_what_training_would_refuse_is_refused(tmp_path):
    with pytest.raises(ValueError, match="leaves some of 3 processes without any"):
        preview(digits_config(tmp_path / "run", processes=3, data={"batch_size": 2}))
    with pytest.raises(ValueError, match="This network has BatchNorm"):
        preview(digits_config(tmp_path / "run", data={"batch_size": 1}))
    assert not (tmp_path / "run").exists()
