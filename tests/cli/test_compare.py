"""What ``gatewright compare`` does."""


def test_a_run_is_as_good_as_itself(gatewright, trained, tmp_path):
    status, printed, errors = gatewright("compare", trained, "--to", trained, "--picture", tmp_path / "both.png")
    assert (status, errors) == (0, "")
    assert printed.splitlines()[-1] == str(tmp_path / "both.png")
    rows = {cells[1].strip(): cells[4].strip() for line in printed.splitlines() if len(cells := line.split("│")) > 4}
    assert rows["test accuracy"] == "+0"
    assert rows["operations per image"] == rows["training seconds"] == "1 times"
    assert (tmp_path / "both.png").stat().st_size > 10_000


def test_both_groups_are_needed(gatewright, trained):
    status, _, errors = gatewright("compare", trained)
    assert status == 2
    assert "--to" in errors
