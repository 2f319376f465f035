"""Imports go one way between the folders, and no two files need each other."""

import ast
import importlib
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {"engine": set(), "models": {"engine"}, "data": {"engine", "models"}, "eval": {"engine", "models", "data"}}
FLOORS |= {room: {"engine", "models", "data", "eval"} for room in ("prune", "distill")}
OURS = {*FLOORS, "configs", "scripts", "benchmarks", "tests", "train"}
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for room in FLOORS
         for path in (ROOT / room).rglob("*.py")}  # fmt: skip


def imports(nodes) -> set[str]:
    """The project's modules that these nodes of a file's tree import, as they are called within slimstep."""
    found = set()
    for node in nodes:
        names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        inner = {name.removeprefix("slimstep.") for name in names if name}
        found |= {name for name in inner if name in FILES or name.partition(".")[0] in OURS - set(FLOORS)}
    return found


def import_nodes(path: Path):
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, (ast.Import, ast.ImportFrom))]


@pytest.mark.parametrize("room", FLOORS)
def test_a_folder_imports_floors_below_it_alone(room):
    above = {
        (name, imported)
        for name, path in FILES.items() if name.partition(".")[0] == room
        for imported in imports(import_nodes(path)) if imported.partition(".")[0] not in FLOORS[room] | {room}
    }  # fmt: skip
    assert not above


def test_metrics_know_neither_times_nor_pages_and_times_no_pages():
    for room, above in (("eval.metrics", ("eval.timing", "eval.pages")), ("eval.timing", ("eval.pages",))):
        for name, path in FILES.items():
            if name.startswith(f"{room}."):
                assert not [found for found in imports(import_nodes(path)) if found.startswith(above)], name
        assert sum(name.startswith(f"{room}.") for name in FILES) > 4


def test_there_is_one_import_root():
    everywhere = [path for folder in sorted(OURS - {"train"}) for path in (ROOT / folder).rglob("*.py")]
    for path in [*everywhere, ROOT / "train.py"]:
        for node in import_nodes(path):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not [name for name in names if name.partition(".")[0] in FLOORS], path


SCRIPTS = [path for folder in ("docs", "benchmarks", "scripts") for path in sorted((ROOT / folder).glob("*.py"))]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_what_a_script_imports_of_the_package_is_there(path):
    """The jobs' tests run none of these, and a name that has moved would be found by their users."""
    for node in import_nodes(path):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "slimstep":
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name) or find_spec(f"{node.module}.{alias.name}"), (path, alias.name)


def test_no_circle_of_files():
    graph = {name: {needed for needed in imports(import_nodes(path)) if needed in FILES and needed != name}
             for name, path in FILES.items()}  # fmt: skip
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as circle:
        pytest.fail(" -> ".join(circle.args[1]))


READERS = ("eval.pages.runs", "eval.pages.results", "eval.pages.cautions", "eval.pages.tables", "eval.pages.text")


def test_reading_results_loads_no_library_that_draws_or_computes():
    """What each of these modules adds to those before it."""
    heavy = "[name for name in ('torch', 'matplotlib', 'diffusers') if name in sys.modules]"
    modules = [*READERS, "models.architecture", "prune.evolve"]
    code = "import sys\n" + "".join(f"import slimstep.{module}; print('{module}', {heavy})\n" for module in modules)
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert loaded.stdout.splitlines() == [f"{module} []" for module in modules]


def test_the_rule_of_an_architecture_needs_the_standard_library_alone():
    """It travels inside the class file of an export."""
    nodes = import_nodes(FILES["models.architecture"])
    assert {node.module.partition(".")[0] for node in nodes} <= sys.stdlib_module_names


def test_no_test_file_makes_an_accelerator_while_it_is_read():
    """Tests of other files reset accelerate's state, and one that was made before them is of no use then."""
    made = [path.name for path in (ROOT / "tests").rglob("*.py") for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.Assign) and "Accelerator(" in ast.unparse(node)]  # fmt: skip
    assert not made
