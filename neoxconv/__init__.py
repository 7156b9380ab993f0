"""neoxconv: quantization and checkpoint conversion for GPT-NeoX-20B and its family."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from neoxconv.version import __version__

if TYPE_CHECKING:
    from neoxconv.engine.plan import make_plan
    from neoxconv.engine.run import run
    from neoxconv.engine.together import run_all
    from neoxconv.sources.checkpoint import open_checkpoint
    from neoxconv.targets.recipe import Recipe
    from neoxconv.verify.bytes import verify_bytes
    from neoxconv.verify.weights import verify_weights

# Loaded when first used, so that `neoxconv --help` answers at once.
PUBLIC = {
    "open_checkpoint": "neoxconv.sources.checkpoint",
    "Recipe": "neoxconv.targets.recipe",
    "make_plan": "neoxconv.engine.plan",
    "run": "neoxconv.engine.run",
    "run_all": "neoxconv.engine.together",
    "verify_bytes": "neoxconv.verify.bytes",
    "verify_weights": "neoxconv.verify.weights",
}
__all__ = ["Recipe", "__version__", "make_plan", "open_checkpoint", "run", "run_all", "verify_bytes", "verify_weights"]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in PUBLIC:
        raise AttributeError(f"module 'neoxconv' has no attribute {name!r}")
    return getattr(import_module(PUBLIC[name]), name)
