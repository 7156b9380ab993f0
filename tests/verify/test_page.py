"""The page of a verification: whole, self-contained, escaped, and the same each time, whatever the figures are."""

from __future__ import annotations

import errno
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from neoxconv import Recipe, make_plan, open_checkpoint, run
from neoxconv.cli.main import main
from neoxconv.engine.side_file import whole
from neoxconv.errors import NeoxconvError
from neoxconv.verify.page.page import page
from tests.toy import toy

VOID = {"meta", "br"}
NAN, INF = float("nan"), float("inf")


class Balance(HTMLParser):
    """Fails where a tag is not closed, or something is fetched or run."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe") and not {"src", "href"} & {name for name, _ in attrs}
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def facts(**changes: Any) -> dict[str, Any]:
    layers = [{"layer": i, "error": 10.0 ** (i - 6), "cosine": 0.999} for i in range(-1, 4)]
    likely = [["<b>&\n", 0.5], ["\udce2", 0.25], ["", 0.1]]
    spot = {"kl": 0.1, "sequence": 0, "position": 3, "before": "a <script>\n", "token": "<b>&\n"}
    usual = {
        "source": "a<b", "target": "c&d", "engine": "native", "passed": True, "verdict": "logits ok", "text": "text",
        "sequences": 2, "length": 64, "layers": layers, "kl": {"mean": 1e-3, "median": 1e-4, "p99": 0.1, "max": 1.0},
        "kl_values": [0.0, 1e-12, 1e-4, 0.1, 1.0], "top1": 0.98, "top5": 0.99, "largest_difference": 0.5,
        "perplexity": {"reference": 20.0, "candidate": 21.0, "ratio": 1.05, "ratio_error": 0.01},
        "rms_probability": 0.01, "tensors": [
            {"name": "gpt_neox.layers.1.mlp.dense_h_to_4h.weight", "encoding": "Q4_K", "relative": 0.07},
            {"name": "embed_out.weight", "encoding": "F16", "relative": 0.0},
        ],
        "worst": [spot | {"reference": likely, "candidate": likely}],
        "limits": [{"name": "mean", "found": 1.0, "limit": 2.0, "least": False, "passed": True}], "findings": [],
    }  # fmt: skip
    return usual | changes


STRANGE = {
    "usual": {},
    "nothing": {"layers": [], "kl_values": [], "worst": [], "limits": [], "tensors": []},
    "failed": {"passed": False, "findings": ["weights: <x> is wrong"]},
    "zeros": {"kl_values": [0.0] * 9, "layers": [{"layer": 0, "error": 0.0, "cosine": 1.0}]},
    "not finite": {
        "kl_values": [NAN, INF, 1.0],
        "kl": dict.fromkeys(("mean", "median", "p99", "max"), NAN),
        "layers": [{"layer": i, "error": error, "cosine": NAN} for i, error in enumerate((NAN, INF, 1.0))],
        "perplexity": {"reference": INF, "candidate": NAN, "ratio": NAN, "ratio_error": NAN},
        "tensors": [{"name": "gpt_neox.layers.0.mlp.dense_h_to_4h.weight", "encoding": "F16", "relative": NAN}],
    },
    "one": {"kl_values": [1e-3], "layers": [{"layer": 7, "error": 1e-3, "cosine": 1.0}]},
}


@pytest.mark.parametrize("name", STRANGE)
def test_a_page_is_whole_escaped_and_always_the_same(name: str) -> None:
    given = facts(**STRANGE[name])
    text = page(given)
    assert text == page(given)
    balance = Balance()
    balance.feed(text)
    assert not balance.open
    text.encode()
    assert "<script" not in text and "<b>&" not in text and "url(" not in text
    assert ("PASS" if given["passed"] else "FAIL") in text
    for drawing in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(drawing)


def test_the_command_writes_it(tmp_path: Path) -> None:
    source = toy(tmp_path)
    target = run(make_plan(open_checkpoint(source), Recipe("gguf", type="Q8_0")), tmp_path / "q8.gguf")
    html = tmp_path / "report.html"
    assert main(["verify", str(source), str(target), "--level", "logits", "--html", str(html)]) == 0
    text = html.read_text()
    assert "PASS" in text and "layer" in text and "Worst positions" in text


def test_a_page_that_cannot_be_written_is_named_and_nothing_half_made_stays(tmp_path: Path) -> None:
    full = pytest.raises(NeoxconvError, match=r"report\.html: cannot be written \(No space left on device\)")
    with full, whole(tmp_path / "report.html") as partial:
        partial.write_text("<!DOC")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not list(tmp_path.iterdir())
