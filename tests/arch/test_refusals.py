"""What gpt-neox trains and no family here computes: refused by the setting's name and its value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from neoxconv import Recipe, make_plan, open_checkpoint, run
from neoxconv.errors import CheckpointError
from tests.toy import toy

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "scalenorm": ({"norm": "scalenorm"}, "norm: scalenorm"),
    "layernorm with swiglu": ({"activation": "swiglu"}, "activation: swiglu"),
    "geglu": ({"activation": "geglu"}, "activation: geglu"),
    "reglu": ({"activation": "reglu"}, "activation: reglu"),
    "glu": ({"activation": "glu"}, "activation: glu"),
    "bilinear": ({"activation": "bilinear"}, "activation: bilinear"),
    "rpe": ({"pos_emb": "rpe"}, "pos_emb: rpe"),
    "qk norm": ({"use_qk_layernorm": True}, "use_qk_layernorm: True"),
    "experts": ({"moe_num_experts": 8}, "moe_num_experts: 8"),
    "mamba": ({"attention_config": [[["mamba"], "all"]]}, "attention_config: mamba"),
    "rwkv": ({"attention_config": [[["rwkv"], "all"]]}, "attention_config: rwkv"),
    "gmlp": ({"attention_config": [[["gmlp"], "all"]]}, "attention_config: gmlp"),
    "sparse attention": ({"attention_config": [[["local"], "all"]]}, "attention_config: local"),
    "mup": ({"use_mup": True}, "use_mup: True"),
    "an odd number rotated": ({"rotary_pct": 0.35}, "5 numbers of each head are rotated"),
    "none rotated": ({"rotary_pct": 0.05}, "0 numbers of each head are rotated"),
    "reward head": ({"train_impl": "rm"}, "train_impl: rm"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_implemented_is_named_with_its_value(case: str, tmp_path: Path) -> None:
    changes, told = REFUSED[case]
    source = toy(tmp_path)
    [path] = source.rglob("*.yml")
    settings = {key.replace("-", "_"): value for key, value in yaml.safe_load(path.read_text()).items()}
    path.write_text(yaml.safe_dump(settings | changes))
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(source)
    assert told in str(raised.value) and path.name in str(raised.value)


def test_a_gguf_that_rotates_more_than_a_head_is_refused(tmp_path: Path) -> None:
    file = run(make_plan(open_checkpoint(toy(tmp_path)), Recipe("gguf", type="F16")), tmp_path / "x.gguf")
    data, key = bytearray(file.read_bytes()), b"gptneox.rope.dimension_count"
    value = data.index(key) + len(key) + 4  # behind the type
    assert data[value] == 4
    data[value] = 18
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"18 numbers of each head are rotated; .* 16 at most"):
        open_checkpoint(file)
