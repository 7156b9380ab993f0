"""Without torch everything converts and verifies down to each weight; what runs a model says what to install."""

import subprocess
import sys
from pathlib import Path

from tests.fixtures import ROOT
from tests.toy import toy

CHILD = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
from neoxconv.cli.main import main

source, folder = sys.argv[1:]
assert main(["inspect", source]) == 0
for words in ("hf", "slim --tp 1", "safetensors", "gguf --type Q4_K_M", "bnb --type NF4 --double-quant",
              "bnb --type INT8", "float8 --type E4M3 --scale channel"):
    target = f"{folder}/{words.replace(' ', '')}"
    assert main(["convert", source, target, "--quiet", "--to", *words.split()]) == 0, words
    assert main(["verify", source, target, "--quiet"]) == 0, words
    assert main(["inspect", target]) == 0, words
assert main(["verify", source, f"{folder}/hf", "--quiet", "--level", "tokenizer", "--text", "README.md"]) == 0
assert main(["verify", source, f"{folder}/hf", "--quiet", "--level", "logits"]) == 1
assert main(["calibrate", source, "--text", "README.md", "--output", f"{folder}/x.gguf", "--quiet"]) == 1
"""


def test_conversions_need_no_torch(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CHILD, str(toy(tmp_path)), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("torch, which runs the models, is not installed; pip install 'neoxconv[logits]'.") == 2
