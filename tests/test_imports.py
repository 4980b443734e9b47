"""The shape of the package: imports run one way, public names are listed, and everything public is documented."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gatewright

ROOT = Path(gatewright.__file__).parent
FILES = {path.relative_to(ROOT).as_posix(): path for path in sorted(ROOT.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}

# Each level may import from those below it, and a room from itself; the package's face sees the whole core.
LEVELS = [
    {"internals", "kernels"},
    {"names", "ops", "reset", "scope"},
    {"routing_sums"},
    {"routing"},
    {"experts", "dispatch", "losses", "metrics"},
    {"routers"},
    {"layers", "reference"},
    {"atomic", "parallel", "settings", "surgery"},
    {"data", "models", "planner"},
    {"tasks"},
    {"train", "report"},
    {"integrations"},
    {"recipes", "studies", "cli", "__main__"},
]
CORE = set.union(*LEVELS[:7])
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
SIDEWAYS = {("cli", "recipes"), ("cli", "studies"), ("__main__", "cli")}


def room_of(name):
    """`routers` of routers/base.py, `losses` of losses.py, `` of the package's own __init__.py."""
    return "" if name == "__init__.py" else name.split("/")[0].removesuffix(".py")


def imports_of(name):
    """Modules that a file imports, wherever it does."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            yield node.module
            if node.module == "gatewright":
                yield from (f"gatewright.{alias.name}" for alias in node.names)


def own_imports_of(name):
    """Rooms of this package that a file imports from; public names of the core count as the layers, which see them."""
    for module in imports_of(name):
        if module.startswith("gatewright."):
            room = module.split(".")[1]
            yield room if room in LEVEL or room == "extras" else "layers"


def may_import(room, other):
    if other == "extras":
        return room not in CORE
    return LEVEL[other] < LEVEL[room] or room == other or (room, other) in SIDEWAYS


def test_imports_run_one_way():
    """Every room sees those below it, and files of the core's rooms see no sibling but their base and its parts."""
    for name in FILES:
        room, others = room_of(name), set(own_imports_of(name))
        assert room in {"", "extras", *LEVEL}, f"give {room} its level in this test"
        allowed = CORE if room == "" else {other for other in others if room != "extras" and may_import(room, other)}
        assert others <= allowed, name
        if room in ("routers", "experts", "dispatch") and not name.endswith("__init__.py"):
            siblings = {module for module in imports_of(name) if module.startswith(f"gatewright.{room}")}
            assert siblings <= {f"gatewright.{room}.{part}" for part in ("base", "gate", "expert_bias")}, name


def test_the_core_imports_torch_jaxtyping_and_the_standard_library():
    """And the reference shares nothing with what is tested against it."""
    known = {"torch", "jaxtyping", "gatewright"} | sys.stdlib_module_names
    for name in FILES:
        if room_of(name) in CORE | {""}:
            optional = {"triton"} if room_of(name) == "kernels" else set()
            assert {module.split(".")[0] for module in imports_of(name)} <= known | optional, name
        if room_of(name) == "reference":
            own = {module for module in imports_of(name) if module.startswith("gatewright")}
            assert own == {module for module in own if module.startswith("gatewright.reference")}, name


def test_importing_the_package_imports_nothing_else():
    """In a fresh interpreter: no outer room, and nothing that torch and jaxtyping had not brought already."""
    code = (
        "import sys, torch, jaxtyping; before = set(sys.modules); import gatewright; "
        "print(*sorted(set(sys.modules) - before), sep='\\n')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = run.stdout.split()
    assert {module.split(".")[0] for module in modules} - sys.stdlib_module_names <= {"gatewright", "torch"}
    rooms = {module.split(".")[1] for module in modules if module.startswith("gatewright.")}
    assert "layers" in rooms
    assert rooms <= CORE


def bound_names(tree, package):
    """Names that a module binds at its top level, those it imports from elsewhere left out."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module.startswith(package):
            yield from (alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name


def order(name):
    """Constants, then classes, then the rest, each in alphabetical order."""
    return (not name.isupper(), not name[0].isupper(), name)


def test_public_names_are_listed_in_order():
    for name in (name for name in FILES if name.endswith("__init__.py")):
        package = ".".join(["gatewright", *name.split("/")[:-1]])
        public = [bound for bound in bound_names(TREES[name], package) if not bound.startswith("_")]
        listed = [
            ast.literal_eval(node.value)
            for node in TREES[name].body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        ]
        assert listed == ([sorted(public, key=order)] if public else []), name


def undocumented(holder):
    """Public functions and classes without a docstring, and their public methods."""
    for node in holder.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            if not ast.get_docstring(node):
                yield node.name
            if isinstance(node, ast.ClassDef):
                yield from undocumented(node)


def test_everything_public_has_a_docstring():
    for name, tree in TREES.items():
        assert ast.get_docstring(tree), name
        assert list(undocumented(tree)) == [], name


def test_the_version_is_the_projects():
    project = ROOT.parent.parent / "pyproject.toml"
    if not project.exists():
        pytest.skip("the package is installed without its repository")
    assert f'version = "{gatewright.__version__}"' in project.read_text().splitlines()
