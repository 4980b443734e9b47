"""The code in the documents runs, and their commands are understood. ``make docs-check`` runs the commands too."""

import re
import shlex
import tomllib

import pytest
import torch

from gatewright.cli.train import parse_train
from gatewright.recipes import recipe_named
from gatewright.routers import ROUTERS
from tests.documents.__main__ import FRAGMENTS, main
from tests.documents.examples import PAGES, ROOT, examples

EXAMPLES = {page: examples(page) for page in PAGES}
PROGRAMS = {page: example.text for page, found in EXAMPLES.items() for example in found if example.python}
EXPORT = "docs/export.md"
TRAININGS = [
    example
    for found in EXAMPLES.values()
    for example in found
    if not example.python and "gatewright train " in example.text
]


def test_the_example_of_the_readme_runs(capsys):
    exec(compile(PROGRAMS["README.md"], "README.md", "exec"), {})
    assert "tensor" in capsys.readouterr().out


def test_the_router_of_the_contributing_guide_routes_by_angle_alone():
    names = {"__name__": "cosine"}
    exec(compile(PROGRAMS["CONTRIBUTING.md"], "CONTRIBUTING.md", "exec"), names)
    router = names["Cosine"](6, 4, 2)
    features = torch.randn(9, 6)
    routing, scaled = router(features), router(features * 5)
    assert routing.expert_index.tolist() == scaled.expert_index.tolist()
    torch.testing.assert_close(routing.weight, scaled.weight)
    routing.weight.square().sum().backward()
    assert router.gate.weight.grad.abs().sum() > 0
    assert router(features.double()).weight.dtype == router.double()(features).weight.dtype == torch.float64


@pytest.mark.parametrize("name", sorted(PROGRAMS.keys() - {"README.md", "CONTRIBUTING.md", EXPORT} - FRAGMENTS.keys()))
def test_the_examples_of_the_pages_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_program(name)


def test_the_example_of_an_export_runs(run_unhooked):
    """The import hook wants integers, where a free batch size is none."""
    run_unhooked(run_program, EXPORT)


def run_program(name):
    exec(compile(PROGRAMS[name], name, "exec"), {"__name__": name})


@pytest.mark.parametrize("example", TRAININGS, ids=lambda example: f"{example.page}:{example.line}")
def test_the_settings_of_the_commands_are_understood(example):
    words = shlex.split(example.text)
    recipe, *flags = words[words.index("train") + 1 :]
    assert parse_train(recipe_named(recipe), flags).run.recipe == recipe


def test_a_command_that_fails_fails_the_check(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("To see:\n\n    python -c pass\n    python -c 1/0\n    sbatch deploy/slurm.sh RUN digits\n")
    assert main([str(page)]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"^exit 0 +[\d.]+ s  .*page.md:3  python -c pass$", printed, re.MULTILINE)
    assert re.search(r"^exit 1 +[\d.]+ s  .*page.md:4  python -c 1/0$", printed, re.MULTILINE)
    assert "ZeroDivisionError" in printed
    assert "(it needs a Slurm cluster" in printed
    assert printed.endswith(f"1 failed {page}:4\n")


def test_every_router_has_a_page_and_the_index_has_every_page():
    pages = {page.name for page in ROOT.glob("docs/routers/*.md")} - {"README.md"}
    assert {f"{name}.md" for name in ROUTERS} <= pages
    index = (ROOT / "docs/routers/README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"\]\(([a-z-]+\.md)\)", index)) == sorted(pages)


def test_links_of_the_readme_are_absolute_on_a_package_index():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for each in project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(each["pattern"], each["replacement"], text)
    home = project["project"]["urls"]["Homepage"]
    assert f"]({home}/raw/main/docs/report.png)" in text
    assert all(link.startswith(f"{home}/") for link in re.findall(r"\]\(([^)]+)\)", text))


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)\)", text)
    local = [link for link in links if not link.startswith("https:")]
    assert all(((ROOT / name).parent / link).exists() for link in local)
