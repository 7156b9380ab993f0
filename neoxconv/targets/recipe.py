"""A recipe: what the user asks of a conversion, apart from source and target."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """`type` is a mix of a quantized format, `dtype` a number type of a plain one; sizes are bytes."""

    format: str
    type: str | None = None
    dtype: str | None = None
    tp: int | None = None  # slim: tensor-parallel degree, the source's by default
    pp: int | None = None  # slim: pipeline stages, the source's by default; 0: sequential files
    current_names: bool = False  # slim: made anew for gpt-neox since 2024-09; else as SRC's files, or those of 2022
    shard_size: int = 5_000_000_000  # hf, bnb, float8, compressed-tensors, mlx
    split_size: int | None = None  # gguf
    mix: str = "current"  # gguf: or classic, the older recipe for attn_qkv
    pure: bool = False  # gguf: one type for every matrix
    output_type: str | None = None  # gguf
    embedding_type: str | None = None  # gguf
    tensor_type: tuple[tuple[str, str], ...] = ()  # gguf: (pattern of names, type)
    effort: str = "normal"  # gguf: or high, a longer search for less error
    imatrix: Path | None = None  # gguf: an importance matrix
    calibration: Path | None = None  # one with second moments, by which codes are chosen together
    bits: float | None = None  # gguf: types by what they cost, with so many bits a weight at most
    size: int | None = None  # gguf: the same, with so many bytes of the file at most
    types: tuple[str, ...] = ()  # gguf: which may be chosen so; by default all
    allow_other_tokens: bool = False  # gguf: the nearest tokenizer where llama.cpp has not the same
    double_quant: bool = False  # bnb: 4-bit types with quantized scales
    compute_dtype: str | None = None  # bnb: the type in which transformers multiplies 4-bit weights
    scale: str | None = None  # float8: none, tensor or channel
    group: str | None = None  # compressed-tensors, mlx: columns that share a scale, or channel
    asymmetric: bool = False  # compressed-tensors: a zero for each group
    only: tuple[str, ...] = ()  # hf, safetensors: patterns of the unified names that the target holds; else all
    tokenizer: Path | None = None
    metadata: Path | None = None  # what is said of the model in names and cards: a JSON file of GGUF's keys
    set: tuple[tuple[str, str], ...] = ()  # the same key by key, above the file
    as_family: str | None = None  # gguf, slim: the family to write the model as, where the format lacks its own

    @property
    def facts(self) -> dict[str, Any]:
        """What decides the target's bytes; files act through what they hold, not where they are."""
        files = ("tokenizer", "imatrix", "calibration", "metadata")
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in files}
