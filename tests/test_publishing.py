"""From a checkpoint to a published repository by the commands of docs/publishing.md, on a small Hub on loopback."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import cli
from tests.hub import TOKEN, Hub, hub
from tests.toy import toy

__all__ = ["hub"]
TYPES = ("Q8_0", "Q6_K", "Q4_K_M", "IQ4_XS")


@pytest.mark.oracle
def test_four_files_their_card_and_a_page_are_published_by_five_commands(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = toy(tmp_path, hidden=256), tmp_path / "out"
    words = ("--to", "gguf", "--type", ",".join(TYPES), "--card", "--set", "general.quantized_by=Me", "--quiet")
    assert cli("convert", source, out, *words) == 0
    files = sorted(path.name for path in out.glob("*.gguf"))
    capsys.readouterr()
    targets = [out / name for name in files]
    fast = ("--level", "logits", "--length", 16, "--sequences", 1, "--html", out / "verify.html", "--json")
    assert cli("verify", source, *targets, *fast) == 0
    (out / "verify.json").write_text(capsys.readouterr().out)
    assert cli("card", out) == 0
    assert upload(hub, "org/new", out).returncode == 0

    published = hub.repositories["org/new"].files
    assert {name for name in published if name.endswith(".gguf")} == set(files)
    assert {re.search(r"[-.]([A-Z0-9_]+)\.gguf$", name)[1] for name in files} == set(TYPES)  # type: ignore[index]
    card, report = published["README.md"].decode(), json.loads(published["verify.json"])
    for row in report["targets"]:
        name, kl = Path(row["target"]).name, row["kl"]["mean"]
        told = re.search(rf"\| {re.escape(name)} \|.* ([0-9.]+) \|\n", card)
        assert told and float(told[1]) == pytest.approx(kl, rel=0.05)
    assert "quantized_by: Me" in card and b"<svg" in published["verify.html"]
    for name in files:
        assert cli("verify", f"hf://org/new/{name}") == 0


def upload(hub: Hub, repository: str, folder: Path) -> Any:
    """huggingface_hub's own program, sending a folder."""
    program = Path(sys.executable).with_name("hf")
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }
    words = [str(program), "upload", repository, str(folder)]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
