import io

import pytest
from rich.console import Console

from gatewright.train.progress import Progress


def test_without_a_terminal_there_are_lines_and_no_bar(capsys):
    with Progress(10) as progress:
        progress.advance(1.25)
        progress.line("epoch 1/2  held-out accuracy 50.00% [bracketed]")
    assert capsys.readouterr().out == "epoch 1/2  held-out accuracy 50.00% [bracketed]\n"


@pytest.mark.parametrize("done", [0, 4])
def test_on_a_terminal_the_bar_counts_on(done, monkeypatch):
    screen = io.StringIO()
    terminal = lambda **options: Console(file=screen, force_terminal=True, width=100, **options)  # noqa: E731
    monkeypatch.setattr("rich.console.Console", terminal)
    with Progress(10, done) as progress:
        for _ in range(3):
            progress.advance(0.125)
    assert f"{done + 3}/10" in screen.getvalue()
    assert "loss 0.125" in screen.getvalue()
