"""The page of a verification: whole, self-contained, escaped, and the same each time, whatever the figures are."""

from __future__ import annotations

import errno
import json
import os
import re
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from neoxconv import Recipe, make_plan, open_checkpoint, run
from neoxconv.cli.main import main
from neoxconv.engine.side_file import whole
from neoxconv.errors import NeoxconvError
from neoxconv.storage import Place
from neoxconv.verify.logits import compare
from neoxconv.verify.page.page import page
from neoxconv.verify.page.sizes import size_chart
from neoxconv.verify.page.target import grouped
from tests.toy import toy

VOID = {"meta", "br"}
NAN, INF = float("nan"), float("inf")


class Balance(HTMLParser):
    """Fails where a tag is not closed, or something is fetched or run."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe")
        assert all(str(value).startswith("#") for name, value in attrs if name in ("src", "href"))
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def facts(*targets: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """What a page shows of a reference and these targets."""
    found = list(targets) or [target()]
    usual = {
        "version": "0.1.0", "model": "m<1>", "text": "text", "sequences": 2, "length": 64, "engine": "native",
        "remark": "", "left_out": [], "passed": all(each["passed"] for each in found), "targets": found,
        "reference": {
            "place": "a<b", "format": "neox", "parameters": 10**9, "bytes": 2 * 10**9, "bits_per_weight": 16.0,
            "fingerprint": "ab" * 32,
        },
    }  # fmt: skip
    return usual | changes


def target(**changes: Any) -> dict[str, Any]:
    """A target of a page."""
    layers = [{"layer": i, "error": 10.0 ** (i - 6), "cosine": 0.999} for i in range(-1, 4)]
    likely = [["<b>&\n", 0.5], ["\udce2", 0.25], ["", 0.1]]
    spot = {"kl": 0.1, "sequence": 0, "position": 3, "before": "a <script>\n", "token": "<b>&\n"}
    usual = {
        "place": "c&d", "name": "d.gguf", "passed": True, "verdict": "logits ok", "format": "gguf", "type": "Q4_K_M",
        "parameters": 10**9, "bytes": 5 * 10**8, "bits_per_weight": 4.0, "compression": 4.0, "made_by": "0.1.0",
        "basis": {"norms": "mean"}, "manifest": None, "broken": None, "task": None, "layers": layers,
        "kl": {"mean": 1e-3, "error": 1e-5, "median": 1e-4, "p99": 0.1, "max": 1.0},
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


def finding(level: str, where: str, what: str = "is wrong") -> dict[str, str]:
    return {"level": level, "where": where, "what": what}


STRANGE = {
    "usual": {},
    "nothing": {"layers": [], "kl_values": [], "worst": [], "limits": [], "tensors": []},
    "failed": {"passed": False, "findings": [finding("weights", "<x>")]},
    "not compared": {"passed": False, "failed": "<b>no</b>"},
    "zeros": {"kl_values": [0.0] * 9, "layers": [{"layer": 0, "error": 0.0, "cosine": 1.0}]},
    "not finite": {
        "kl_values": [NAN, INF, 1.0],
        "kl": dict.fromkeys(("mean", "error", "median", "p99", "max"), NAN),
        "layers": [{"layer": i, "error": error, "cosine": NAN} for i, error in enumerate((NAN, INF, 1.0))],
        "perplexity": {"reference": INF, "candidate": NAN, "ratio": NAN, "ratio_error": NAN},
        "tensors": [{"name": "gpt_neox.layers.0.mlp.dense_h_to_4h.weight", "encoding": "F16", "relative": NAN}],
    },
    "one": {"kl_values": [1e-3], "layers": [{"layer": 7, "error": 1e-3, "cosine": 1.0}]},
}


def checked(given: dict[str, Any]) -> str:
    """The page, after looking at what must hold of any."""
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
    return text


@pytest.mark.parametrize("name", STRANGE)
def test_a_page_is_whole_escaped_and_always_the_same(name: str) -> None:
    alone, beside = target(**STRANGE[name]), target(name="other.gguf", bytes=10**9)
    checked(facts(alone))
    checked(facts(alone, beside))


def test_a_page_says_what_was_compared() -> None:
    text = checked(facts(target(manifest="cd" * 32), remark="far <off>", left_out=["e: absent"]))
    assert "Not on this page: e: absent" in text and "1 of 2 targets are right" in text
    for told in ("neoxconv 0.1.0", "m&lt;1&gt;", "1,000,000,000", "4.00 : 1", "ab" * 32, "cd" * 32, "far &lt;off&gt;"):
        assert told in text
    assert "nats" in text and "the embedding" in text and ">-1<" not in text and "layer -1" not in text


def test_findings_are_grouped_and_the_broken_layer_comes_first() -> None:
    found = [
        finding("bytes", "x.gguf"),
        finding("weights", "gpt_neox.layers.0.a.weight"),
        finding("weights", "embed_out.weight"),
        finding("weights", "gpt_neox.layers.12.a.weight"),
        finding("logits", "layer 12", "is the first"),
        finding("logits", "x.gguf", "mean KL"),
    ]
    groups = dict(grouped(target(findings=found, broken={"layer": 12, "name": "layer 12"})))
    assert list(groups) == ["Where it begins", "Level logits", "Level weights", "Level tokenizer", "Level bytes"]
    assert groups["Where it begins"] == ["layer 12: is the first"] and groups["Level logits"] == ["x.gguf: mean KL"]
    order = [line.split(":")[0] for line in groups["Level weights"]]
    assert order == ["gpt_neox.layers.12.a.weight", "gpt_neox.layers.0.a.weight", "embed_out.weight"]


def test_labels_of_a_crowded_chart_do_not_overlap() -> None:
    names = [f"Q{bits}_{kind}" for bits in range(2, 7) for kind in ("0", "K_S", "K_M", "K_L")]
    many = [
        target(type=name, bytes=10**8 * (20 + at), kl={"mean": 0.1 / 1.3**at, "error": 1e-5})
        for at, name in enumerate(names)
    ]
    drawing = ElementTree.fromstring(size_chart(many))
    labels = [each for each in drawing.iter("text") if each.get("class") == "label"]
    assert [each.text for each in labels] == names
    boxes = [(float(str(each.get("x"))), float(str(each.get("y"))), 4.4 * len(str(each.text))) for each in labels]
    for (x, y, half), (other_x, other_y, other_half) in combinations(boxes, 2):
        assert abs(x - other_x) >= half + other_half - 0.2 or abs(y - other_y) >= 17.9


def test_targets_that_others_beat_are_hollow_and_off_the_line() -> None:
    best, beaten = target(bytes=100), target(type="Q4_0", bytes=110, kl={"mean": 2e-3, "error": 0.0})
    large = target(type="Q8_0", bytes=200, kl={"mean": 1e-5, "error": 0.0})
    drawing = ElementTree.fromstring(size_chart([beaten, large, best]))
    assert [each.get("class") for each in drawing.iter("circle")] == ["dot", "zero", "dot"]
    (line,) = drawing.iter("polyline")
    assert len(str(line.get("points")).split()) == 2


def test_the_command_writes_it(tmp_path: Path) -> None:
    source = toy(tmp_path)
    target = run(make_plan(open_checkpoint(source), Recipe("gguf", type="Q8_0")), tmp_path / "q8.gguf")
    html = tmp_path / "report.html"
    assert main(["verify", str(source), str(target), "--level", "logits", "--html", str(html)]) == 0
    text = html.read_text()
    assert "PASS" in text and "layer" in text and "Worst positions" in text


def test_several_targets_share_a_run_of_the_source_and_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, html = toy(tmp_path), tmp_path / "page.html"
    kinds = {"q8": Recipe("gguf", type="Q8_0"), "f16": Recipe("gguf", type="F16"), "other": Recipe("hf")}
    other = toy(tmp_path / "b", seed=5)
    targets = [
        run(make_plan(open_checkpoint(other if name == "other" else source), recipe), tmp_path / name)
        for name, recipe in kinds.items()
    ]
    ran: list[Place] = []
    opened = compare.side
    monkeypatch.setattr(
        compare, "side", lambda model, *a, **k: (ran.append(model.index.folder), opened(model, *a, **k))[1]
    )
    words = [str(place) for place in (source, *targets)]
    assert main(["verify", *words, "--level", "logits", "--html", str(html), "--json"]) == 3
    told = json.loads(capsys.readouterr().out)
    assert len(ran) == 4 and sum("global_step" in place.name for place in ran) == 1
    assert [row["passed"] for row in told["targets"]] == [True, True, False] and not told["passed"]
    q8, f16, _ = told["targets"]
    assert (
        q8["kl"]["mean"] > f16["kl"]["mean"] > 0
        and q8["kl"]["error"] > 0
        and (q8["type"], f16["type"]) == ("Q8_0", "F16")
    )
    assert q8["bytes"] == targets[0].stat().st_size and q8["bits_per_weight"] < f16["bits_per_weight"]
    assert {level["target"] for level in told["levels"]} == set(words[1:])
    text = html.read_text()
    assert "2 of 3 targets are right" in text and text.count('class="target"') == 3

    assert main(["verify", *words[:3], "--level", "logits", "--json"]) == 0
    alone = [float(row["kl"]["mean"]) for row in json.loads(capsys.readouterr().out)["targets"]]
    assert alone == [q8["kl"]["mean"], f16["kl"]["mean"]]
    assert main(["verify", words[0], words[1], words[1]]) == 2
    assert "given twice" in capsys.readouterr().err


def test_a_page_that_cannot_be_written_is_named_and_nothing_half_made_stays(tmp_path: Path) -> None:
    full = pytest.raises(NeoxconvError, match=r"report\.html: cannot be written \(No space left on device\)")
    with full, whole(tmp_path / "report.html") as partial:
        partial.write_text("<!DOC")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not list(tmp_path.iterdir())
