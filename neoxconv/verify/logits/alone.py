"""One model alone, streamed from disk as it was trained: what it predicts, and the logits that its files hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor

from neoxconv.core.model import Checkpoint
from neoxconv.core.tensor import LazyTensor
from neoxconv.dtypes import FLOATS, Numbers
from neoxconv.verify.logits.compare import WORDS, Logits
from neoxconv.verify.logits.metrics import Softmax
from neoxconv.verify.logits.stream import Side, running, side

# What gpt-neox saves with `checkpoint_validation_with_forward_pass`: for the tokens 0, 1, 2, ... the last stage's
# logits [time, words of this rank], in that stage's mp_rank files (megatron/checkpointing.py, do_forward_pass).
_STORED = "checkpoint_validation_logits"


def predicted(
    checkpoint: Checkpoint, tokens: Numbers, following: Numbers, *, device: str = "cpu", logits: Logits | None = None
) -> Softmax:
    """A model's predictions for tokens, where `following` comes after each (-1: nothing), both [batch, time].

    `logits` are the model's where another engine has computed them. Raises PlanError where the device is not there.
    """
    with running(tokens, device) as (pool, ids):
        found = Softmax(torch.from_numpy(following.reshape(-1)).to(device))
        if logits is None:
            model = side(checkpoint, pool, device=device)
            normed = _through_layers(checkpoint, model, ids)
            logits = partial(model.logits, normed)
        for start in range(0, checkpoint.config.rows, WORDS):
            stop = min(start + WORDS, checkpoint.config.rows)
            found.add(start, logits(start, stop).reshape(-1, stop - start).to(device).double())
    return found


def loss_of(checkpoint: Checkpoint, tokens: Numbers) -> float:
    """The mean loss in nats of each token of [batch, time] but the first ones; infinite where it is no number."""
    with running(tokens, "cpu") as (pool, ids):
        model = side(checkpoint, pool)
        normed = _through_layers(checkpoint, model, ids)
        following = ids[:, 1:]
        total = torch.full(following.shape, -torch.inf)
        right = torch.zeros(following.shape)
        for start in range(0, checkpoint.config.rows, WORDS):
            stop = min(start + WORDS, checkpoint.config.rows)
            logits = model.logits(normed, start, stop)[:, :-1]
            total = torch.logaddexp(total, logits.logsumexp(-1))
            inside = (following >= start) & (following < stop)
            right[inside] = logits[inside].gather(-1, (following[inside] - start)[:, None])[:, 0]
        loss = float((total - right).mean())
    return loss if math.isfinite(loss) else math.inf


def off_stored(checkpoint: Checkpoint) -> float | None:
    """How far a model's logits are at most from those that gpt-neox stored with it; None where it stored none."""
    stored = [
        state[_STORED]
        for _, state in sorted(checkpoint.index.states.items())
        if isinstance(state, Mapping) and isinstance(state.get(_STORED), LazyTensor)
    ]
    stored = [logits for logits in stored if len(logits.shape) == 2 and logits.dtype.name in FLOATS]
    config = checkpoint.config
    if not stored or sum(logits.columns for logits in stored) != config.rows:
        return None
    time = min(logits.rows for logits in stored)
    if not 0 < time <= min(config.context, config.rows):
        return None
    expected = np.concatenate([logits.floats(0, time) for logits in stored], axis=1)
    with running(np.arange(time)[None], "cpu") as (pool, ids):
        model = side(checkpoint, pool)
        normed = _through_layers(checkpoint, model, ids)
        bands = [(start, min(start + WORDS, config.rows)) for start in range(0, config.rows, WORDS)]
        found = torch.cat([model.logits(normed, start, stop)[0] for start, stop in bands], dim=-1)
    return float(np.abs(found.numpy() - expected).max())


def _through_layers(checkpoint: Checkpoint, model: Side, ids: Tensor) -> list[Tensor]:
    """What the head is multiplied with, for tokens [batch, time]."""
    streams = model.embed(ids)
    for number in range(checkpoint.config.layers):
        streams = model.layer(number, streams)
    return model.final(streams)
