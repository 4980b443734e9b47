"""What ``gatewright list`` prints can be chosen, and everything that can be chosen is printed."""

from dataclasses import fields
from typing import get_args

import pytest

from gatewright.cli.train import parse_train
from gatewright.data import BUILT_IN_NAMES
from gatewright.data.text.config import BUILT_IN_TEXTS
from gatewright.losses import LOSSES
from gatewright.models import CHOOSABLE_ROUTERS, MixtureConfig
from gatewright.recipes import RECIPES
from gatewright.routers import ROUTERS
from gatewright.studies import STUDIES


@pytest.fixture
def printed(gatewright):
    """Names and summaries, by the title of their table."""
    status, output, errors = gatewright("list")
    assert (status, errors) == (0, "")
    tables = {}
    for line in output.splitlines():
        cells = [cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")]
        if "┃" in line:
            tables[cells[0]] = rows = {}
        elif "│" in line and cells[0]:
            rows[cells[0]] = cells[1]
    return tables


def test_everything_that_can_be_chosen_is_printed_with_what_it_is(printed):
    kinds = {item.name: item.type for item in fields(MixtureConfig)}
    assert {title: set(rows) for title, rows in printed.items()} == {
        "gatewright train RECIPE": set(RECIPES),
        "gatewright study NAME": set(STUDIES),
        "--data.name of images": {*BUILT_IN_NAMES, "OWNER/NAME"},
        "--data.name of text": {*BUILT_IN_TEXTS, "OWNER/NAME"},
        "--model.router of images": set(CHOOSABLE_ROUTERS),
        "--model.router of text": {*ROUTERS, "gated-hash"} - {"expert-choice", "sinkhorn"},
        "--model.experts": set(get_args(kinds["experts"])),
        "beside the experts": {f"--model.{name}" for name, kind in kinds.items() if kind is bool},
        "--model.dispatch": set(get_args(kinds["dispatch"])),
        "--model.losses NAME COEFFICIENT": set(LOSSES).union(
            *(router.own_losses for router in CHOOSABLE_ROUTERS.values())
        ),
    }
    summaries = [summary for rows in printed.values() for summary in rows.values()]
    assert all(len(summary) > 20 for summary in summaries)
    assert not any("http" in summary or "``" in summary for summary in summaries)


def test_what_is_printed_can_be_chosen(printed):
    for flag, rows in list(printed.items())[2:]:
        for name in rows:
            words = [flag.split()[0], name] if flag.startswith("--") else [name]
            words += ["0.1"] if "COEFFICIENT" in flag else []
            owners = [router for router, made in CHOOSABLE_ROUTERS.items() if name in made.own_losses]
            words += ["--model.router", owners[0]] if owners else []
            if name in ("folder", "text"):
                words += ["--data.path", "."]
            parse_train(RECIPES["python-lm" if "of text" in flag else "digits"](), words)
