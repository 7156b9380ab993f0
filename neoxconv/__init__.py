"""neoxconv: quantization and checkpoint conversion for GPT-NeoX-20B and its family."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from neoxconv.checkpoint import open_checkpoint
    from neoxconv.convert import run
    from neoxconv.plan import Recipe, make_plan
    from neoxconv.verify import verify_bytes, verify_weights

# Loaded when first used, so that `neoxconv --help` answers at once.
PUBLIC = {
    "open_checkpoint": "neoxconv.checkpoint",
    "Recipe": "neoxconv.plan",
    "make_plan": "neoxconv.plan",
    "run": "neoxconv.convert",
    "verify_bytes": "neoxconv.verify",
    "verify_weights": "neoxconv.verify",
}
__all__ = ["Recipe", "__version__", "make_plan", "open_checkpoint", "run", "verify_bytes", "verify_weights"]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in PUBLIC:
        raise AttributeError(f"module 'neoxconv' has no attribute {name!r}")
    return getattr(import_module(PUBLIC[name]), name)
