"""gpt-neox's own code as a program: start its ranks, collect what they wrote. Skips where it is not installed.

NEOXCONV_GPT_NEOX names a checkout of gpt-neox, NEOXCONV_GPT_NEOX_PYTHON a Python that has what it imports (README.md).
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.oracles import Logits, Tokens, skip

LIMIT = 600  # seconds that a run may take
# What each run says beside its model: plain training in float32, with nothing that needs a GPU's kernels.
TRAINING: dict[str, Any] = {
    "train_iters": 1, "lr_decay_iters": 1, "lr_decay_style": "cosine", "warmup": 0.1, "min_lr": 1.0e-7,
    "optimizer": {"type": "Adam", "params": {"lr": 1.0e-3, "betas": [0.9, 0.95], "eps": 1.0e-8}},
    "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2, "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 0}, "weight_decay": 0.1, "hidden_dropout": 0, "attention_dropout": 0,
    "checkpoint_activations": False, "scaled_upper_triang_masked_softmax_fusion": False,
    "precision": "fp32", "fp16": None, "bf16": None, "data_types": None, "distributed_backend": "gloo",
    "data_path": "./unused", "data_impl": "mmap", "split": "990,5,5", "eval_interval": 1000, "eval_iters": 1,
    "log_interval": 1, "steps_per_print": 1, "wall_clock_breakdown": False,
    "checkpoint_validation_with_forward_pass": False, "save": None, "checkpoint_factor": None, "extra_save_iters": None,
}  # fmt: skip


@dataclass(frozen=True)
class Made:
    """What gpt-neox wrote, and the logits that it then had: with ranks' own norms, and with their mean."""

    checkpoints: Path
    tokens: Tokens  # [sequences, words]
    as_is: Logits
    averaged: Logits


def train(folder: Path, settings: Mapping[str, Any], tokens: Tokens, norm_noise: float = 0.002) -> Made:
    """Train a model of these settings for a step per `tokens` [steps, 2, 2, words + 1], save it, load it, record."""
    import yaml

    folder.mkdir(parents=True)
    yml = folder / "model.yml"
    yml.write_text(yaml.safe_dump(dict(settings)))
    steps = len(tokens)
    saved = {"train_iters": steps, "lr_decay_iters": steps, "checkpoint_factor": steps, "save": str(folder / "saved")}
    _run(folder / "train", [yml], tokens, settings, {**TRAINING, **saved}, norm_noise=norm_noise)
    again = {**TRAINING, "load": str(folder / "saved"), "finetune": True}
    _run(folder / "again", [yml], tokens[:1], settings, again, record=True)
    found = {name: _gathered(folder / "again", name) for name in ("as_is", "averaged")}
    return Made(folder / "saved", tokens[0].reshape(-1, tokens.shape[-1])[:, :-1], **found)


def first_loss(slim: Path, tokens: Tokens, work: Path) -> float:
    """The loss of the first step from `slim`, by its own YAML and `finetune: true`; tokens [2, 2, words + 1]."""
    import yaml

    ymls = sorted((slim / (slim / "latest").read_text() / "configs").iterdir())
    settings: dict[str, Any] = {}
    for yml in ymls:
        settings |= {key.replace("-", "_"): value for key, value in yaml.safe_load(yml.read_text()).items()}
    asked = {**TRAINING, "load": str(slim), "finetune": True, "seq_length": tokens.shape[-1] - 1}
    _run(work, ymls, tokens[None], settings, asked, beside=slim)
    return float(json.loads((work / "losses.json").read_text())[0])


def _run(
    work: Path, ymls: Sequence[Path], tokens: Tokens, settings: Mapping[str, Any], overwrite: Mapping[str, Any],
    beside: Path | None = None, **task: Any,
) -> None:  # fmt: skip
    """Start a process for each rank in a fresh folder `work`, which also holds the files that lie in `beside`."""
    code, python = _installed()
    work.mkdir(parents=True)
    for file in beside.iterdir() if beside else ():
        if file.is_file():
            (work / file.name).symlink_to(file)
    np.save(work / "tokens.npy", tokens)
    told = {"ymls": [str(path) for path in ymls], "overwrite": dict(overwrite), **task}
    (work / "task.json").write_text(json.dumps(told))
    world = settings["model_parallel_size"] * max(1, settings["pipe_parallel_size"])
    shared = {"WORLD_SIZE": str(world), "LOCAL_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _port()}
    own = {"PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"}
    ranks = []
    for rank in range(world):
        environment = {**os.environ, **shared, **own, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        with open(work / f"log-{rank}.txt", "w") as log:
            command = [python, str(Path(__file__).with_name("rank.py")), str(work / "task.json")]
            ranks.append(subprocess.Popen(command, cwd=work, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        _wait(ranks)
    finally:
        for each in ranks:
            each.kill()
            each.wait()
    assert not any(each.returncode for each in ranks), "\n".join(
        (work / f"log-{rank}.txt").read_text()[-2000:] for rank in range(world)
    )


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Until all ranks have ended, one has failed, or the time is up."""
    end = time.monotonic() + LIMIT
    while time.monotonic() < end and {each.poll() for each in ranks} in ({None}, {None, 0}):
        time.sleep(0.2)


def _installed() -> tuple[Path, str]:
    """The checkout and its Python, or the test is skipped."""
    code = Path(os.environ.get("NEOXCONV_GPT_NEOX", "gpt-neox"))
    if not (code / "megatron").is_dir():
        skip("gpt-neox is not installed; set NEOXCONV_GPT_NEOX to a checkout (tests/neox_code/README.md)")
    return code.absolute(), os.environ.get("NEOXCONV_GPT_NEOX_PYTHON", sys.executable)


def _port() -> str:
    """A port that is free now."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return str(held.getsockname()[1])


def _gathered(folder: Path, name: str) -> npt.NDArray[np.float32]:
    """The ranks' parts of the vocabulary side by side."""
    return np.concatenate([np.load(path) for path in sorted(folder.glob(f"{name}-*.npy"))], axis=-1)
