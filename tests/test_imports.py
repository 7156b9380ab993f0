"""Imports point downwards, and the command line starts without the heavy libraries."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "neoxconv"
LAYERS = (
    "errors dtypes names recipe __version__",
    "fetch",
    "remote",
    "storage terminal",
    "tensor tokenizer",
    "model encoding tokenizer_find",
    "layout",
    "arch formats quant fold",
    "imatrix coverage encode",
    "scales",
    "checkpoint",
    "targets integrity",
    "plan",
    "manifest workplace",
    "journal steps files",
    "publish workers",
    "cluster",
    "send",
    "convert verify catalog inspection",
    "synthetic request",
    "audit demo calibrate options",
    "cli",
    "__init__ __main__",
)
LAYER = {unit: height for height, units in enumerate(LAYERS) for unit in units.split()}
HEAVY = {"torch", "numba", "transformers", "bitsandbytes", "fsspec", "aiohttp", "s3fs", "dask", "gguf", "tokenizers"}


def imported(file: Path) -> Iterator[str]:
    """Yield the top module of ours that each import in the file names, wherever in the file it stands."""
    for node in ast.walk(ast.parse(file.read_text())):
        match node:
            case ast.Import():
                modules = [alias.name for alias in node.names]
            case ast.ImportFrom(module=module, level=0):
                modules = [f"{module}.{alias.name}" for alias in node.names]
            case ast.ImportFrom():
                modules = ["neoxconv.relative import"]
            case _:
                continue
        yield from ((module + ".__init__").split(".")[1] for module in modules if module.split(".")[0] == "neoxconv")


def test_imports_point_downwards() -> None:
    imports = {
        (file.relative_to(PACKAGE).parts[0].removesuffix(".py"), target)
        for file in PACKAGE.rglob("*.py")
        for target in imported(file)
    }
    strangers = {unit for pair in imports for unit in pair} - set(LAYER)
    assert not strangers, f"give {strangers} a place in LAYERS"
    upward = [f"{unit} imports {target}" for unit, target in imports if unit != target and LAYER[target] >= LAYER[unit]]
    assert not upward


def test_the_command_line_starts_light() -> None:
    code = "import sys, neoxconv.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    loaded = HEAVY & set(done.stdout.split())
    assert not loaded
