"""A Hugging Face folder whose card and settings say much of the model."""

from __future__ import annotations

import json
from pathlib import Path

from neoxconv import Recipe, make_plan, open_checkpoint, run
from tests.toy import toy

CARD = """---
license: other
license_name: pile
license_link: https://example.org/license
language:
- en
- no
tags:
- causal-lm
pipeline_tag: text-generation
datasets: [EleutherAI/the_pile_deduplicated, "https://huggingface.co/datasets/a/b"]
base_model: EleutherAI/pythia-160m
author: someone
description: |
  Two lines
  of it
url: https://example.org
repo_url: https://example.org/repo
---
# Pythia
"""
GENERATION = {"do_sample": True, "temperature": 0.7, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.1}


def hugging_face(folder: Path, card: str = CARD) -> Path:
    """A Hugging Face folder of that name with a card and settings for sampling."""
    made = run(make_plan(open_checkpoint(toy(folder.parent)), Recipe("hf")), folder)
    (folder / "README.md").write_text(card)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    return Path(str(made))
