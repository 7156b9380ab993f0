"""JSON files that people read: how they are written, and what a doubtful one says."""

from __future__ import annotations

import json
from typing import Any


def as_json(value: Any) -> bytes:
    """Readable JSON with a final newline."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def object_in(data: bytes) -> dict[str, Any]:
    """The object that a file holds; empty where its bytes are no JSON, or no object."""
    try:
        value = json.loads(data.decode())
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
