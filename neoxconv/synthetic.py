"""Checkpoints made here, of any size, in gpt-neox's and DeepSpeed's layout: for the demo, tests and benchmarks.

Every tensor can be made a band of rows at a time: a row is a stretch of one long block of random numbers, chosen by the
tensor's name and the row's number. So 20B widths take seconds and little memory; the same seed gives the same bytes.
As in real training, ranks disagree: each has its own noise on the norms and its own part of the row-parallel biases.
"""

from __future__ import annotations

import json
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from neoxconv.arch.fused import split
from neoxconv.arch.gpt_neox.weights import GPT_NEOX
from neoxconv.arch.joins import by_columns
from neoxconv.arch.llama.training import to_neox
from neoxconv.arch.llama.weights import LLAMA
from neoxconv.core.encoding import copied
from neoxconv.core.layout import Digest, Entry, FileLayout
from neoxconv.core.model import Architecture, Stored
from neoxconv.core.table import Buffer, ModelConfig, Weight
from neoxconv.core.tensor import LazyTensor, slabs
from neoxconv.dtypes import PLAIN, Array, DType, narrow
from neoxconv.formats.neox import folder as neox
from neoxconv.formats.neox.numbers import number_name
from neoxconv.formats.pt import layout_pt
from neoxconv.formats.tokenizer import END, PADDING, Tokenizer
from neoxconv.formats.tokenizer.byte_level import NFC
from neoxconv.formats.tokenizer.made import added_token, alphabet, tokenizer_json

_BLOCK = 1 << 20
_STRIDE = 611_953  # a prime: how far apart in the block neighbouring rows begin
SLAB = 8 << 20
_SPREAD = {"norm": 0.1, "bias": 0.05}  # of the values; matrices have 0.02
_STEP = 10


@dataclass(frozen=True)
class Synthetic:
    """What to make; `rows` counts all ranks'.

    With `llama` it is a Llama as gpt-neox trains it today, with `kv_heads` and an MLP of `ff`; `generation`, residual,
    activation and rotary part are then its own. `generation` 0 has gpt-neox's legacy names, 1 those since 2024-09, 2
    TransformerEngine's.
    """

    layers: int = 2
    hidden: int = 64
    heads: int = 4
    rows: int = 512
    tp: int = 2
    pp: int = 1
    dtype: str = "F16"
    generation: int = 0
    sequential: bool = False
    parallel_residual: bool = True
    tanh_gelu: bool = True
    head_by_columns: bool = False
    context: int = 128
    rotary_pct: float = 0.25
    norm_noise: float = 0.002
    seed: int = 0
    llama: bool = False
    kv_heads: int | None = None
    ff: int | None = None

    @property
    def architecture(self) -> Architecture:
        """The family of the model."""
        return LLAMA if self.llama else GPT_NEOX

    @property
    def config(self) -> ModelConfig:
        """The hyperparameters of the model."""
        if not self.llama:
            return self._neox
        changes: Any = dict.fromkeys(("parallel_residual", "attention_bias", "mlp_bias"), False)
        changes |= {"norm": "rmsnorm", "activation": "silu", "rotary_pct": 1.0, "kv_heads": self.kv_heads}
        return replace(self._neox, **changes)

    @property
    def _neox(self) -> ModelConfig:
        """The hyperparameters of a model of these sizes in GPT-NeoX's own family."""
        return ModelConfig(
            layers=self.layers,
            hidden=self.hidden,
            heads=self.heads,
            ff=self.ff or 4 * self.hidden,
            rows=self.rows,
            context=self.context,
            rotary_pct=self.rotary_pct,
            rotary_base=1e4,
            norm_eps=1e-5,
            parallel_residual=self.parallel_residual,
            activation="gelu_tanh" if self.tanh_gelu else "gelu",
            tied=False,
        )

    @property
    def number_type(self) -> DType:
        """The type of every weight."""
        return PLAIN[self.dtype]


Write = Callable[[Path, FileLayout], None]


def write_checkpoint(
    folder: Path,
    model: Synthetic,
    *,
    tokenizer: Tokenizer | None = None,
    sparse: bool = False,
    optimizer_bytes: int = 0,
) -> Path:
    """Make the checkpoint in `folder` and return its global_step10.

    `tokenizer` is the one to put beside it (default: a tiny one). `sparse` leaves holes where weights would be.
    `optimizer_bytes` are shared out over optimizer files without contents, one for each rank and 12 data-parallel ones.
    """
    step = folder / f"global_step{_STEP}"
    (step / "configs").mkdir(parents=True)
    (folder / "latest").write_text(step.name)
    (folder / "tokenizer.json").write_bytes((tokenizer or tiny()).data)
    (step / "configs" / "model.yml").write_text(json.dumps(_yaml_settings(model), indent=2))
    write: Write = _write_holes if sparse else _write_file
    for name, value in contents(model).items():
        write(step, layout_pt(name, value))
    stages = [
        f"zero_pp_rank_{d}_mp_rank_{m:02d}_optim_states.pt" for m in range(model.tp * model.pp) for d in range(12)
    ]
    for number, name in enumerate(stages if optimizer_bytes else ()):
        with open(step / name, "wb") as file:
            file.truncate(optimizer_bytes // len(stages) + (number < optimizer_bytes % len(stages)))
    return step


def contents(model: Synthetic) -> dict[str, Any]:
    """What each .pt file of the checkpoint holds."""
    ranks = [dict(_rank_entries(model, rank)) for rank in range(model.tp)]
    if model.sequential:
        names = [{neox.SEQUENTIAL + key: entry for key, entry in rank.items()} for rank in ranks]
        return {neox.states_file(r): states(model, OrderedDict(names[r])) for r in range(model.tp)}
    files = neox.by_layer_file(ranks, OrderedDict if model.generation else dict)
    return files | {neox.states_file(rank): states(model, None) for rank in range(model.tp * model.pp)}


def _rank_entries(model: Synthetic, rank: int) -> Iterator[tuple[str, Entry]]:
    """`N.name` and contents of every tensor of a rank, in the order in which gpt-neox stores them."""
    for stored in model.architecture.in_layer_files(model.config):
        weight, buffer = stored.weights[0], stored.buffer
        if buffer and model.generation:
            continue
        if stored.fused:
            name = number_name(weight, stored.layer, model.layers, stored.name)
            yield name, _entry_of(name, _fused_tensor(model, stored, name, rank))
            continue
        spelled = buffer.source if buffer else _spellings(weight)[model.generation]
        name = number_name(weight, stored.layer, model.layers, spelled)
        yield name, _entry_of(name, _buffered(model, buffer) if buffer else _rank_tensor(model, weight, name, rank))


def _spellings(weight: Weight) -> tuple[str, str, str]:
    """A weight's name in each generation; of two names the table has, the second is TransformerEngine's."""
    names = weight.source
    return (names[0], names[1] if len(names) == 3 else names[0], names[-1])


def _entry_of(name: str, tensor: LazyTensor) -> Entry:
    """A tensor that is written as it is."""
    return Entry(name, name, tensor, copied(tensor.dtype))


def _fused_tensor(model: Synthetic, stored: Stored, name: str, rank: int) -> LazyTensor:
    """What one rank holds of several weights in one tensor."""
    parts = [_whole(model, weight, f"{name}/{weight.unified}/{model.seed}") for weight in stored.weights]
    return split(stored, parts, model.tp, model.config)[rank]


def _whole(model: Synthetic, weight: Weight, name: str) -> LazyTensor:
    """A weight of all ranks together."""
    shape = tuple(model.config.sizes[size] for size in weight.shape)
    centre = 1.0 if weight.role == "norm" and weight.unified.endswith("weight") else 0.0
    return _random_tensor(model, name, shape, (centre, _SPREAD.get(weight.role, 0.02)))


def _rank_tensor(model: Synthetic, weight: Weight, name: str, rank: int) -> LazyTensor:
    """What one rank holds of a weight."""
    whole = _whole(model, weight, f"{name}/{model.seed}")
    if weight.role == "norm":
        return _with_noise(model, whole, f"{name}/{model.seed}/{rank}")
    if weight.join.name == "row-parallel bias":
        own = f"{name}/{model.seed}/{rank if model.parallel_residual else 0}"
        return _random_tensor(model, own, whole.shape, (0.0, _SPREAD["bias"]))
    split = by_columns if weight.role == "head" and model.head_by_columns else weight.join.split
    return split(whole, model.tp, model.config)[rank]


@lru_cache(maxsize=16)
def block(seed: int, centre: float, spread: float, dtype: DType) -> Array:
    """A long stretch of normal numbers, stored as `dtype`."""
    values = np.random.default_rng(seed).standard_normal(2 * _BLOCK, np.float32)
    return narrow(np.float32(centre) + np.float32(spread) * values, dtype)


def _random_tensor(model: Synthetic, name: str, shape: tuple[int, ...], values: tuple[float, float]) -> LazyTensor:
    """A tensor of normal numbers with the centre and spread in `values`."""
    columns = int(np.prod(shape[1:]))
    first = zlib.crc32(name.encode())

    def read(start: int, stop: int) -> Array:
        numbers = block(model.seed, *values, model.number_type)
        if len(shape) == 1:
            return numbers[(first + np.arange(start, stop)) % _BLOCK]
        places = (first + np.arange(start, stop) * _STRIDE) % _BLOCK
        return np.lib.stride_tricks.sliding_window_view(numbers, columns)[places].reshape(stop - start, *shape[1:])

    return LazyTensor(shape, model.number_type, read, model.number_type)


def _with_noise(model: Synthetic, tensor: LazyTensor, name: str) -> LazyTensor:
    """A rank's own version of a norm."""
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(tensor.rows, np.float32) * model.norm_noise
    values = narrow(tensor.floats(0, tensor.rows) + noise.astype(np.float32), model.number_type)
    return LazyTensor(tensor.shape, model.number_type, lambda start, stop: values[start:stop], model.number_type)


def _buffered(model: Synthetic, buffer: Buffer) -> LazyTensor:
    """A buffer in the type of the weights."""
    values = narrow(buffer.values(model.config), model.number_type)
    return LazyTensor(values.shape, model.number_type, lambda start, stop: values[start:stop], model.number_type)


def states(model: Synthetic, module: Any) -> dict[str, Any]:
    """An mp_rank file's contents, random-number states included."""
    degree = model.tp * (1 if model.sequential else model.pp)
    args = {
        "num_layers": model.layers,
        "hidden_size": model.hidden,
        "num_attention_heads": model.heads,
        "max_position_embeddings": model.context,
        "make_vocab_size_divisible_by": model.rows // model.tp,
        "padded_vocab_size": model.rows,
        "tokenizer_type": "HFTokenizer",
        "model_parallel_size": model.tp,
    }
    counts = dict.fromkeys(("skipped_steps", "global_steps", "global_samples"), _STEP)
    return {
        "module": module,
        "optimizer": None,
        "lr_scheduler": {
            "start_lr": 1e-4,
            "warmup_iter": 1,
            "num_iters": _STEP,
            "decay_style": "cosine",
            "end_iter": _STEP,
            "min_lr": 1e-5,
        },
        "csr_tensor_module_names": set(),
        **counts,
        "dp_world_size": 1,
        "mp_world_size": degree,
        "iteration": _STEP,
        "args": args,
        "random_rng_state": (3, tuple(range(625)), None),
        # Arrays and tensors in real files; their names are what matters here.
        **dict.fromkeys(("np_rng_state", "torch_rng_state", "cuda_rng_state"), (_STEP,)),
        "rng_tracker_states": {"model-parallel-rng": (_STEP,)},
    }


def _yaml_settings(model: Synthetic) -> dict[str, Any]:
    """The training configuration in the spelling of 20B.yml."""
    return {
        "pipe-parallel-size": 0 if model.sequential else model.pp,
        "model-parallel-size": model.tp,
        "num-layers": model.layers,
        "hidden-size": model.hidden,
        "num-attention-heads": model.heads,
        "seq-length": model.context,
        "max-position-embeddings": model.context,
        "norm": "layernorm",
        "pos-emb": "rotary",
        "rotary_pct": model.rotary_pct,
        "no-weight-tying": True,
        "gpt_j_residual": model.parallel_residual,
        "output_layer_parallelism": "row" if model.head_by_columns else "column",
        "bias-gelu-fusion": model.tanh_gelu,
        "make_vocab_size_divisible_by": model.rows // model.tp,
        "tokenizer_type": "HFTokenizer",
        "vocab-file": "./tokenizer.json",
        **(to_neox(model.config) if model.llama else {}),
    }


def _write_file(folder: Path, file: FileLayout) -> None:
    """Write a file with its tensors."""
    with open(folder / file.name, "w+b") as stream:
        written = []
        for slot in file.slots:
            stream.seek(slot.offset)
            crc = 0
            for start, stop in slabs(slot.entry.tensor, SLAB):
                data = np.ascontiguousarray(slot.entry.tensor.read(start, stop)).reshape(-1).view(np.uint8).data
                stream.write(data)
                crc = zlib.crc32(data, crc)
            written.append(Digest("", crc))
        _write_container(stream, file, written)


def _write_holes(folder: Path, file: FileLayout) -> None:
    """Write a file whose tensors are zeros that take no room on disk."""
    with open(folder / file.name, "w+b") as stream:
        _write_container(stream, file, [Digest("", _crc_of_zeros(slot.part.nbytes)) for slot in file.slots])


@lru_cache
def _crc_of_zeros(count: int) -> int:
    """The CRC-32 of `count` zero bytes."""
    crc, chunk = 0, bytes(1 << 20)
    for done in range(0, count, len(chunk)):
        crc = zlib.crc32(chunk[: count - done], crc)
    return crc


def _write_container(stream: Any, file: FileLayout, written: list[Digest]) -> None:
    """Everything in a file but its tensors."""
    stream.truncate(file.size)
    late = ((late.offset, late.make(written)) for late in file.late)
    for offset, data in (*file.pieces, *late):
        stream.seek(offset)
        stream.write(data)


_TINY_PAIRS = ("Ġ Ġ", "Ġ t", "Ġ a", "h e", "i n", "r e", "o n", "e r", "Ġt he", "n d", "a t", "e s", "Ġa nd", "in g")


_TINY_SPACES = (8, 4, 3, 2)


def tiny() -> Tokenizer:
    """A tokenizer of our own in the manner of the 20B one: 2 special tokens, 256 bytes, 14 merges, 4 runs of spaces."""
    merged = [pair.replace(" ", "") for pair in _TINY_PAIRS]
    vocab = {text: i for i, text in enumerate([END, PADDING, *alphabet(), *merged])}
    special = [added_token(vocab[text], text, special=True) for text in (END, PADDING)]
    spaces = [added_token(len(vocab) + i, " " * run, special=False) for i, run in enumerate(_TINY_SPACES)]
    return Tokenizer(tokenizer_json(vocab, _TINY_PAIRS, special + spaces, NFC))
