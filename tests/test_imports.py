"""Imports point downwards and never in a circle, and the command line starts without the heavy libraries."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "neoxconv"
LAYERS = (
    "version errors dtypes names",
    "words storage",
    "core",
    "arch formats quant",
    "sources",
    "targets",
    "engine synthetic",
    "verify",
    "cli",
    "__init__ __main__",
)
LAYER = {unit: height for height, units in enumerate(LAYERS) for unit in units.split()}
HEAVY = {
    "torch",
    "numba",
    "transformers",
    "bitsandbytes",
    "fsspec",
    "aiohttp",
    "s3fs",
    "dask",
    "gguf",
    "tokenizers",
    "huggingface_hub",
}


def module_of(file: Path) -> str:
    """A file's name as imports spell it; a folder's `__init__` is the folder."""
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in PACKAGE.rglob("*.py")}


def imported(file: Path) -> Iterator[str]:
    """Yield the module of ours that each import in the file needs, wherever in the file it stands."""
    for node in ast.walk(ast.parse(file.read_text())):
        match node:
            case ast.Import():
                found = [alias.name for alias in node.names]
            case ast.ImportFrom(module=str(module), level=0):
                inner = (f"{module}.{alias.name}" for alias in node.names)
                found = [name if name in MODULES else module for name in inner]
            case ast.ImportFrom():
                found = ["neoxconv.relative import"]
            case _:
                continue
        yield from (name for name in found if name.split(".")[0] == "neoxconv")


IMPORTS = {name: set(imported(file)) - {name} for name, file in MODULES.items()}


def unit(module: str) -> str:
    """The folder, or the file, at the top of the package that a module belongs to."""
    return (module + ".__init__").split(".")[1]


def test_imports_point_downwards() -> None:
    between = {(unit(name), unit(target)) for name, targets in IMPORTS.items() for target in targets}
    strangers = {name for pair in between for name in pair} - set(LAYER)
    assert not strangers, f"give {strangers} a place in LAYERS"
    upward = [f"{name} imports {target}" for name, target in between if name != target and LAYER[target] >= LAYER[name]]
    assert not upward


def test_no_imports_go_in_a_circle() -> None:
    try:
        list(TopologicalSorter(IMPORTS).static_order())
    except CycleError as error:
        raise AssertionError(" imports ".join(reversed(error.args[1]))) from None


def test_every_import_of_ours_is_found() -> None:
    assert {target for targets in IMPORTS.values() for target in targets} <= set(MODULES)


def test_the_command_line_starts_light() -> None:
    code = "import sys, neoxconv.cli.main; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    loaded = HEAVY & set(done.stdout.split())
    assert not loaded


def test_no_test_file_imports_another() -> None:
    """What two of them need lies in a file without tests: helpers, toy, scaled, ..."""
    tests = PACKAGE.parent / "tests"
    found = [
        f"{file.relative_to(tests)} imports {name}"
        for file in tests.rglob("*.py")
        for name in re.findall(r"^\s*(?:from|import) (tests\S*\btest_\w+)", file.read_text(), re.MULTILINE)
    ]
    assert not found


def test_what_is_private_stays_in_its_module() -> None:
    """A name with an underscore is its module's own; what another module needs has none."""
    borrowed = [
        f"{name} imports {alias.name} of {node.module}"
        for name, file in MODULES.items()
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("neoxconv")
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
    ]
    assert not borrowed
