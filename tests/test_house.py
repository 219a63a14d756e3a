"""The shape of the project: which file may import which, and how much there is of each thing.

A file imports from its own floor or a lower one, never from a script, and never in a circle.
"""

import ast
from collections import Counter
from graphlib import CycleError, TopologicalSorter

import pytest

from tests.shared import REPO

FLOORS = [  # from the ground up; a folder stands for all of its files
    {"common", "metrics"},
    {"images", "layouts", "lungs", "cohort", "vit"},
    {"npz_loader", "models", "loading"},
    {"data", "records"},
    {"training", "calibration"},
    {"report", "prediction", "monitoring", "auditing"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
VERBS = len(FLOORS)  # scripts at the root: nothing imports them
FOLDERS = sorted(room for rooms in FLOORS for room in rooms if (REPO / room).is_dir())


def library():
    """{dotted name: path} of every file that is no test and no study."""
    files = [*REPO.glob("*.py"), *(path for folder in FOLDERS for path in (REPO / folder).rglob("*.py"))]
    names = {}
    for path in files:
        parts = path.relative_to(REPO).with_suffix("").parts
        if parts[0] not in ("test_all", "conftest") and parts[-1] != "__init__":
            names[".".join(parts)] = path
    return names


def imported(path, known):
    """[(line, dotted name)] of the project's files that a file imports, in functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [(node.lineno, name if name in known else node.module) for name in whole]
    return [(line, name) for line, name in found if name in known]


def floor_of(name):
    return FLOOR.get(name.split(".")[0], VERBS)


def test_files_import_downwards():
    known, wrong = library(), []
    for name, path in known.items():
        for line, other in imported(path, known):
            if floor_of(other) > floor_of(name) or floor_of(other) == VERBS:
                wrong.append(f"{path.relative_to(REPO)}:{line} imports {other}, of a higher floor")
    assert not wrong, "\n".join(wrong)


def test_no_file_imports_itself_in_a_circle():
    known = library()
    graph = {name: {other for _, other in imported(path, known)} for name, path in known.items()}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_root_is_small():
    """At most 19 Python files at the root, at most 10 in a folder (layouts, tests and studies apart)."""
    assert len(list(REPO.glob("*.py"))) <= 19
    held = Counter(path.parent for path in library().values() if path.parent not in (REPO, REPO / "layouts"))
    assert not {str(folder.relative_to(REPO)): count for folder, count in held.items() if count > 10}


def test_modules_fit_on_a_few_screens():
    """A file of the library has at most 400 lines."""
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in library().items()}
    assert not {name: length for name, length in lengths.items() if length > 400}


def functions():
    """(place, first line, last line) of every function of the library and the scripts."""
    for path in library().values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                yield f"{path.relative_to(REPO)}: {node.name}", node.lineno, node.end_lineno


def test_functions_fit_on_a_screen():
    """A function has at most 60 lines. ruff holds its arguments (8), statements and branches."""
    lengths = {place: last - first + 1 for place, first, last in functions()}
    assert not {place: length for place, length in lengths.items() if length > 60}


def test_each_folder_says_what_lives_there():
    """The __init__.py of a folder is a docstring that names each of its files, and nothing else."""
    for folder in FOLDERS:
        tree = ast.parse((REPO / folder / "__init__.py").read_text(encoding="utf-8"))
        assert len(tree.body) == 1
        text = ast.get_docstring(tree)
        files = sorted(path.name for path in (REPO / folder).glob("*.py") if path.name != "__init__.py")
        assert not [name for name in files if name not in text], folder
