"""The code in the documents runs."""

import re
from pathlib import Path

import pytest
import torch

from gatewright.routers import ROUTERS

ROOT = Path(__file__).parent.parent
PAGES = sorted(page.relative_to(ROOT).as_posix() for page in [*ROOT.glob("docs/*/*.md"), ROOT / "docs/dispatch.md"])
TOP = sorted(page.relative_to(ROOT).as_posix() for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def python_blocks(name):
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)


def test_the_example_of_the_readme_runs(capsys):
    (example,) = python_blocks("README.md")
    exec(compile(example, "README.md", "exec"), {})
    assert "tensor" in capsys.readouterr().out


def test_the_router_of_the_contributing_guide_routes_by_angle_alone():
    (source,) = python_blocks("CONTRIBUTING.md")
    names = {"__name__": "cosine"}
    exec(compile(source, "CONTRIBUTING.md", "exec"), names)
    router = names["Cosine"](6, 4, 2)
    features = torch.randn(9, 6)
    routing, scaled = router(features), router(features * 5)
    assert routing.expert_index.tolist() == scaled.expert_index.tolist()
    torch.testing.assert_close(routing.weight, scaled.weight)
    routing.weight.square().sum().backward()
    assert router.gate.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", PAGES)
def test_the_examples_of_the_pages_run(name):
    (example,) = python_blocks(name)
    exec(compile(example, name, "exec"), {})


def test_every_router_has_a_page_and_the_index_has_every_page():
    pages = {page.name for page in ROOT.glob("docs/routers/*.md")} - {"README.md"}
    assert {f"{name}.md" for name in ROUTERS} <= pages
    index = (ROOT / "docs/routers/README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"\]\(([a-z-]+\.md)\)", index)) == sorted(pages)


@pytest.mark.parametrize("name", sorted({*TOP, *PAGES}))
def test_links_lead_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)\)", text)
    local = [link for link in links if not link.startswith("https:")]
    assert all(((ROOT / name).parent / link).exists() for link in local)
