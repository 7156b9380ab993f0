"""Hyperparameters in GGUF's keys: those of every family, and those that would change a function and are not read."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from neoxconv.arch.settings import Settings, stale
from neoxconv.core.model import Index, Measured
from neoxconv.dtypes import FLOATS
from neoxconv.errors import CheckpointError, raise_all

# Keys that could change the function, which are not implemented, and the values with which they do not.
# Source: llama.cpp's llama-model.cpp (load_hparams) and gguf's constants.py. 0 stands for "none" there.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "activation_sparsity_scale": (0,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.output_scale": (0, 1),
    "attention.q_lora_rank": (0,),
    "attention.kv_lora_rank": (0,),
    "attention.relative_buckets_count": (0,),
    "attention.scale": (0,),
    "attention.shared_kv_layers": (0,),
    "attention.sliding_window": (0,),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_shared_count": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "residual_scale": (0, 1),
    "rope.scale_linear": (0, 1),
    "rope.scaling.alpha": (0, 1),
    "rope.scaling.attn_factor": (0, 1),
    "rope.scaling.factor": (0, 1),
    "rope.scaling.type": ("none", "linear"),  # linear by a factor, which is another key
    "rope.scaling.yarn_attn_factor": (0, 1),
    "rope.scaling.yarn_ext_factor": (0, -1),
    "swin_norm": (False,),
}
_READ = (  # of every family
    "attention.head_count", "attention.key_length", "attention.value_length", "block_count", "context_length",
    "embedding_length", "feed_forward_length", "rope.freq_base", "rope.freq_base_swa", "vocab_size",
)  # fmt: skip
_ROPE_FACTORS = "rope_freqs.weight"  # a tensor: what llama.cpp divides each frequency by


@dataclass(frozen=True)
class GgufKeys:
    """The keys of a GGUF file's family, by their names without it."""

    index: Index
    read: Settings

    @staticmethod
    def of(index: Index, family: str) -> GgufKeys:
        """Those that begin with `family` and a point."""
        own = {key.removeprefix(f"{family}."): value for key, value in index.settings.items()}
        where = ", ".join(str(file.storage.path) for file in index.files[:1])
        return GgufKeys(index, Settings(where, own, f"{family}."))

    def sizes(self, measured: Measured) -> dict[str, Any]:
        """The hyperparameters that every family has, but for its heads; rows and tying are as measured."""
        read = self.read
        return {
            "layers": read.count("block_count"),
            "hidden": read.count("embedding_length"),
            "ff": read.count("feed_forward_length"),
            "context": read.count("context_length"),
            "rows": measured.rows,
            "tied": measured.tied,
        }

    def refuse_unread(self, hidden: int, heads: int, base: float, own: Mapping[str, tuple[Any, ...]]) -> None:
        """Raise CheckpointError for each key with which llama.cpp, or its kin, would compute another function.

        `own` are the values of further keys that leave it as it is.
        """
        read, head = self.read, hidden // max(1, heads)
        neutral = _NEUTRAL | {
            "attention.key_length": (head,),
            "attention.value_length": (head,),
            "rope.freq_base_swa": (base,),
            **own,
        }
        raise_all(CheckpointError, (
            f"{read.where}: {read.prefix}{key} is {str(read.values[key])[:60]}, which changes the function and is not "
            f"supported; expected {' or '.join(map(str, values))}, or no such key."
            for key, values in neutral.items()
            if key in read.values and not any(read.values[key] == value for value in values)
        ))  # fmt: skip
        self._refuse_rope_factors()

    def _refuse_rope_factors(self) -> None:
        """Raise CheckpointError where the file holds factors of the rotary frequencies that are not all 1."""
        factors = self.index.ranks[0].get(_ROPE_FACTORS)
        if factors is None:
            return
        if factors.dtype.name not in FLOATS or (factors.floats(0, factors.rows) != 1).any():
            raise CheckpointError(
                f"{self.read.where}: {_ROPE_FACTORS} holds factors of the rotary frequencies, which are not supported; "
                "expected all 1, or no such tensor."
            )

    def notes(self, own: Collection[str], rows: int) -> tuple[str, ...]:
        """Notes on keys that nobody read (`own` are the family's that were), and on a vocabulary of another size."""
        where, prefix = self.read.where, self.read.prefix
        known = (*_READ, *_NEUTRAL, *own)
        idle = [key for name in self.read.values if (key := prefix + name) in self.index.settings and name not in known]
        notes = (f"{where}: not read, as no part of the function here: {', '.join(idle)}",) if idle else ()
        return (*notes, *stale(where, f"{prefix}vocab_size", self.read.values.get("vocab_size"), rows))


def rounded(number: float) -> float:
    """A number as it was before float32, in which 1e-5 comes back long."""
    return float(f"{number:.6g}")


def share(part: int, whole: int) -> float:
    """part / whole, or the next number above where `whole` times it would round down to less than `part`."""
    ratio = part / whole
    return ratio if int(whole * ratio) == part else math.nextafter(ratio, 2)
