"""What the documents tell a reader to run: the commands of their shell blocks, and their Python blocks.

The Python blocks of a page are one program.
"""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
FOLDERS = ("docs/*.md", "docs/*/*.md", "examples/*.md", "notebooks/*.md")
PAGES = sorted(page.relative_to(ROOT).as_posix() for folder in ("*.md", *FOLDERS) for page in ROOT.glob(folder))
PROGRAMS = "az|deepspeed|gatewright|git|make|mkdir|mlflow|pip|python|sbatch|source|torchrun"
COMMAND = re.compile(rf"(\w+=\S* )*(\.venv/bin/)?({PROGRAMS}|\. \.venv/bin/activate)( |$)")
ASSIGNMENT = re.compile(r'(\w+)="([^"]*)"$')
COMMENT = re.compile(r"(^|\s+)#.*$")


@dataclass(frozen=True)
class Example:
    """One thing to run.

    Args:
        page: Where it stands.
        line: The line there on which it begins.
        python: Whether it is Python; else it is one command of a shell.
        text: The program, or the command, without its comment and with the values of the variables that its block sets.
    """

    page: str
    line: int
    python: bool
    text: str


def examples(page):
    """Return everything that a page tells its reader to run, in order; its Python where the first block of it is."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found, program = [], python_of(text)
    for line, language, block in blocks(text):
        if language in ("", "bash", "sh"):
            found += commands(page, line, block)
        elif language == "python" and program:
            found.append(Example(page, line, True, program))
            program = ""
    return found


def python_of(text):
    """Return the Python blocks of a page as one program; empty where there are none."""
    return "\n".join(block for _, language, block in blocks(text) if language == "python")


def blocks(text):
    """Yield the first line, the language and the content of every fenced and every indented block."""
    fenced, indented = r"^```(\w*)\n(.*?)^```$", r"(?<=\n\n)((?:    [^\n]*\n)+)"
    for block in re.finditer(f"{fenced}|{indented}", text, re.DOTALL | re.MULTILINE):
        start = text.count("\n", 0, block.start()) + 1
        if block[2] is not None:
            yield start + 1, block[1], block[2]
        else:
            yield start, "", textwrap.dedent(block[3])


def commands(page, first, block):
    """Return the commands of a block; none where it is a formula, a picture or what a program printed."""
    found, variables = [], {}
    number, lines = first, block.splitlines()
    while lines:
        taken = 1 + next((index for index, line in enumerate(lines) if not line.endswith("\\")), 0)
        line = COMMENT.sub("", " ".join(part.removesuffix("\\").strip() for part in lines[:taken]))
        if assignment := ASSIGNMENT.match(line):
            variables[f"${assignment[1]}"] = assignment[2]
        elif COMMAND.match(line):
            expanded = re.sub(r"\$\w+", lambda name: variables.get(name[0], name[0]), line)
            found.append(Example(page, number, False, expanded))
        elif found and line:
            raise ValueError(f"{page}, line {number}: a block of commands has a line that is none: {line}")
        number, lines = number + taken, lines[taken:]
    return found
