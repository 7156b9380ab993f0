"""The positions where two models differ most: the text, and what each expected there."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from neoxconv.verify.page.parts import section
from neoxconv.verify.page.svg import number, percent, shown


def worst(found: Sequence[Mapping[str, Any]]) -> str:
    """The positions where the models differ most."""
    if not found:
        return ""
    about = "Where the models differ most: the text with the right next token (✓), and what each model expected there."
    return section("Worst positions", about, f'<div class="worst">{"".join(map(position, found))}</div>')


def position(item: Mapping[str, Any]) -> str:
    """One position: the text with its next token marked, and the likeliest tokens on both sides."""
    before = item["before"] if len(item["before"]) <= 300 else "…" + item["before"][-299:]
    where = f"KL {number(item['kl'])} nats, sequence {item['sequence']}, position {item['position']}"
    lines = re.sub("(↵+)", r"\1\n", shown(before))
    text = f'<p class="context"><bdi>{lines}</bdi><mark>{token(item["token"])}</mark></p>'
    sides = "".join(_side(name, item[name.lower()], item["token"]) for name in ("Reference", "Candidate"))
    return f'<article class="card"><h3>{where}</h3>{text}<div class="sides">{sides}</div></article>'


def token(text: str) -> str:
    """A token, cut if it is long, whose spaces at the ends can be seen."""
    text = text if len(text) <= 40 else text[:39] + "…"
    inner = text.strip(" ")
    left = len(text) - len(text.lstrip(" "))
    spaced = "␣" * left + inner + "␣" * (len(text) - left - len(inner))
    return f"<bdi>{shown(spaced) or '(empty)'}</bdi>"


def _side(name: str, likely: Iterable[Sequence[Any]], right: str) -> str:
    """One model's likeliest tokens as bars, the right one with a sign."""
    bars = "".join(_chance(text, float(share), text == right) for text, share in likely)
    return f"<div><h4>{name}</h4><ol>{bars}</ol></div>"


def _chance(text: str, share: float, right: bool) -> str:
    wide = 100 * min(max(share, 0.0), 1.0) if math.isfinite(share) else 0.0
    label = f'<code class="right">{token(text)} ✓</code>' if right else f"<code>{token(text)}</code>"
    meter = f'<span class="meter"><i style="width:{wide:.1f}%"></i></span>'
    return f"<li>{label}{meter}<span>{percent(share)}</span></li>"
