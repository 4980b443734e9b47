import io

import pytest
import torch

from gatewright.report import expert_table, result_table

console = pytest.importorskip("rich.console")


def printed(table):
    screen = console.Console(width=160, record=True, file=io.StringIO())
    screen.print(table)
    return screen.export_text().replace("\N{NO-BREAK SPACE}", " ")


def test_shares_favourites_and_the_dead(result):
    layer = result["layers"]["net/moe & co"]
    text = printed(
        expert_table(
            "net[bold]",
            torch.tensor(layer["tokens_per_expert"]),
            torch.tensor(layer["class_by_expert"]),
            torch.tensor(layer["tokens_per_class"]),
            list(result["test_accuracy_per_class"]),
        )
    )
    assert "Experts of net[bold]" in text
    assert "share of the load" in text
    assert "favourite classes, and the share of their images that reaches it" in text
    first, dead, last = [line for line in text.splitlines() if line.startswith("│")]
    assert "75.0% ████████████████" in first
    assert "cat 100%, <b>dog</b> 50%, [red]fox 50%" in first
    assert "dead" in dead
    assert "25.0% █████ " in last
    assert "<b>dog</b> 50%, [red]fox 50%" in last
    assert "cat" not in last


def test_the_result_in_a_few_lines(result):
    text = printed(result_table(result))
    for part in (
        "digits <script>, seed 3",
        "97.50%",
        "1 epoch in 1 min 15 s",
        "1,234,567",
        "345,678",
        "3 experts, 1 dead, busiest 2.2 times the mean, nothing dropped; load CV 0.90 (test set)",
    ):
        assert part in text
    assert "pets (/data/pets): 1,000 training, 200 test images" in text
    assert "optim.lr 0.1 (recipe: 0.001)" in text
    assert "optim.lr was 0.2 until step <5>, and is 0.1 from there on." in text
