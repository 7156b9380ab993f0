"""What a shell offers at Tab, by click's own answers to it."""

import pytest
from click.shell_completion import BashComplete

from neoxconv.cli.main import commands


@pytest.mark.parametrize(
    ("typed", "begun", "offered"),
    [
        ("", "ver", [("plain", "verify")]),
        ("inspect", "/tm", [("file", "/tm")]),
        ("convert source", "/tm", [("file", "/tm")]),
        ("verify source", "tar", [("file", "tar")]),
        ("convert a b --imatrix", "20", [("file", "20")]),
        ("convert a b --to", "g", [("plain", "gguf")]),
        ("convert a b --to gguf --type", "Q5_K", [("plain", "Q5_K_M"), ("plain", "Q5_K_S")]),
        ("convert a b --to gguf --type", "q5_k", [("plain", "Q5_K_M"), ("plain", "Q5_K_S")]),
        ("convert a b --to gguf --type", "Q8_0,q5_k_m", [("plain", "Q8_0,Q5_K_M")]),
        ("convert a b --dou", "--dou", [("plain", "--double-quant")]),
    ],
)
def test_tab_offers_commands_files_options_and_types(typed: str, begun: str, offered: list[tuple[str, str]]) -> None:
    shell = BashComplete(commands, {}, "neoxconv", "_NEOXCONV_COMPLETE")
    found = shell.get_completions(typed.split(), begun)
    assert [(item.type, item.value) for item in found] == offered
