"""What a source is, told from names and headers: so that one sees why 287 GiB become 38.

`inspect` gives plain values (what `--json` prints); `render` makes the tables of them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import PurePath
from typing import Any

from neoxconv.core.model import Checkpoint, Index
from neoxconv.core.table import ModelConfig
from neoxconv.core.tensor import LazyTensor
from neoxconv.dtypes import DType
from neoxconv.engine.manifest import MANIFEST
from neoxconv.errors import CheckpointError
from neoxconv.formats.neox import folder as neox
from neoxconv.sources import SOURCES
from neoxconv.sources.checkpoint import rank_difference
from neoxconv.sources.integrity import Integrity
from neoxconv.sources.tokenizer import tokenizer_of
from neoxconv.storage import Place, size_of, together
from neoxconv.targets.carried import tokenizer_facts, tokenizer_line
from neoxconv.words import first_of, plural, size, table

# Whose names a gpt-neox checkpoint has: by what some tensor's holds, the first that fits.
_GENERATIONS = {
    "TransformerEngine": (".attention.qkv.", ".mlp.fc1_", ".mlp.fc2_"),
    "gpt-neox since 2024-09": (".mlp.linear1.", ".mlp.linear2."),
    "legacy": (".mlp.dense_h_to_4h.", ".mlp.w1."),
}
_KINDS = ("weights", "optimizer states", "bookkeeping", "config and tokenizer", "other")
_SUFFIXES = (".yml", ".yaml", ".json", ".txt", ".model", ".jinja")
# Where settings say the size of the vocabulary: GGUF (its tokens, or their number by the family), config.json,
# gpt-neox's YAML.
_VOCABULARY = ("tokenizer.ggml.tokens", "{family}.vocab_size", "vocab_size", "padded_vocab_size")
_STEPS = ("global_steps", "iteration")  # in DeepSpeed's bookkeeping
_BOOKKEEPING = ("latest", MANIFEST)


def inspect(checkpoint: Checkpoint, check: Integrity | None = None) -> dict[str, Any]:
    """All that names and headers tell of a source, and how far its ranks' norms are apart, as plain values.

    With a check also what that found; norms of a damaged source are not compared.
    """
    index, nbytes = checkpoint.index, _bytes_by_type(checkpoint)
    facts = {
        "source": source(checkpoint),
        "config": checkpoint.config.facts,
        "tokenizer": _tokenizer(checkpoint),
        "parameters": checkpoint.parameters,
        "dtype": max(nbytes, key=lambda name: nbytes[name], default=""),
        "bits_per_weight": 8 * nbytes.total() / max(1, checkpoint.parameters),
        "vocabulary": _vocabulary(checkpoint),
        "groups": groups(checkpoint),
        "tensors": [
            {"name": name, "dtype": dtype.name, "shape": list(t.shape), "bytes": dtype.size(t.rows * t.columns)}
            for name, t in checkpoint.tensors.items()
            for dtype in [_type_of(t, index)]
        ],
        "files": _files_by_kind(index),
        "rank_difference": _norms_apart(checkpoint, check),
        "dropped": list(checkpoint.dropped),
        "notes": [*checkpoint.notes, *checkpoint.doubts],
    }
    return facts | ({"check": check.facts} if check else {})


def _tokenizer(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The tokenizer that would be taken; None where there is none, `problem` where it cannot be."""
    try:
        return tokenizer_facts(checkpoint, tokenizer_of(checkpoint)) or None
    except CheckpointError as error:
        return {"problem": str(error)}


def _norms_apart(checkpoint: Checkpoint, check: Integrity | None) -> float | None:
    """The largest difference between ranks in any norm; None where the source is damaged."""
    if check and check.damage:
        return None
    return rank_difference(checkpoint) if len(checkpoint.index.ranks) > 1 else 0.0


def source(checkpoint: Checkpoint) -> dict[str, Any]:
    """What kind of source it is."""
    index = checkpoint.index
    facts: dict[str, Any] = {"format": index.format, "path": str(index.folder), "tensor_parallel": len(index.ranks)}
    if SOURCES[index.format].naming != "neox":
        return facts
    return facts | {
        "pipeline_parallel": max(1, len(index.states) // len(index.ranks)),
        "layout": "sequential" if index.sequential else "pipeline",
        "names": generation(checkpoint),
        "step": _step(index),
        "weights": checkpoint.weights,
        "configs": [str(path) for path in index.configs],
    }


def generation(checkpoint: Checkpoint) -> str:
    """Which gpt-neox's names the tensors have."""
    names = "\n".join(checkpoint.index.ranks[0])
    return next((era for era, parts in _GENERATIONS.items() if any(part in names for part in parts)), "unknown")


def _type_of(tensor: LazyTensor, index: Index) -> DType:
    """The type in which the source holds a tensor; a file without ranks holds it as it is read."""
    as_read = tensor.dtype.quantized or SOURCES[index.format].naming == "gguf"
    return tensor.dtype if as_read else tensor.native


def _bytes_by_type(checkpoint: Checkpoint) -> Counter[str]:
    """Bytes of the model's tensors by the type in which they are stored, without scales in tensors of their own."""
    total: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        dtype = _type_of(tensor, checkpoint.index)
        total[dtype.name] += dtype.size(tensor.rows * tensor.columns)
    return total


def _vocabulary(checkpoint: Checkpoint) -> dict[str, int | None]:
    """The embedding's rows, and the size of the vocabulary as the source's settings say it; None where they do not."""
    settings = checkpoint.index.settings
    keys = [key.format(family=checkpoint.architecture.gguf_name) for key in _VOCABULARY]
    said = next((settings[key] for key in keys if key in settings), None)
    tokens = len(said) if isinstance(said, list) else said if type(said) is int else None
    return {"rows": checkpoint.config.rows, "said": tokens}


def _step(index: Index) -> int | None:
    """The step of the training at which a checkpoint of gpt-neox was saved; None where nothing tells."""
    state = next(iter(index.states.values()), None)
    said = [state.get(key) for key in _STEPS] if isinstance(state, Mapping) else []
    named = re.fullmatch(r"global_step(\d{1,18})", index.folder.name)
    found = next((step for step in said if type(step) is int), None)
    return found if found is not None else int(named[1]) if named else None


def groups(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """The unified tensors of one role, type and shape together, in the order of the forward pass."""
    count: Counter[tuple[str, str, tuple[int, ...]]] = Counter()
    total: Counter[tuple[str, str, tuple[int, ...]]] = Counter()
    for _, weight in checkpoint.architecture.names(checkpoint.config):
        tensor = checkpoint.tensors[weight.unified]
        dtype = _type_of(tensor, checkpoint.index)
        key = weight.role, dtype.name, tensor.shape
        count[key] += 1
        total[key] += dtype.size(tensor.rows * tensor.columns)
    return [
        {"role": role, "count": count[key], "dtype": dtype, "shape": list(shape), "bytes": total[key]}
        for key in count
        for role, dtype, shape in [key]
    ]


def _files_by_kind(index: Index) -> list[dict[str, Any]]:
    """How many files of each kind there are, and their bytes."""
    count: Counter[str] = Counter()
    total: Counter[str] = Counter()
    files = _source_files(index)
    for path, nbytes in zip(files, together(size_of, files, index.folder), strict=True):
        kind = _kind_of(path, index)
        count[kind] += 1
        total[kind] += nbytes
    return [{"kind": kind, "count": count[kind], "bytes": total[kind]} for kind in _KINDS if count[kind]]


def _source_files(index: Index) -> list[Place]:
    """The files that make up a source: all of its folder's, and those beside `latest`; single files alone."""
    if index.single:
        return [file.storage.path for file in index.files]
    found: set[Place] = {path for path in index.folder.rglob("*") if path.is_file()} | set(index.configs)
    if (index.folder.parent / "latest").is_file():
        found |= {path for path in index.folder.parent.iterdir() if path.is_file()}
    return sorted(found, key=str)


def _kind_of(path: Place, index: Index) -> str:
    """What a file is for, by its name and by what was read from it."""
    if path.name in index.set_aside or neox.OPTIMIZER.fullmatch(path.name):
        return "optimizer states"
    with_weights = index.sequential or index.format == "deepspeed"
    if path.name in _BOOKKEEPING or (neox.STATES.fullmatch(path.name) and not with_weights):
        return "bookkeeping"
    if path.name in {file.storage.name for file in index.files}:
        return "weights"
    return "config and tokenizer" if path.suffix in _SUFFIXES else "other"


def render(facts: Mapping[str, Any], every_tensor: bool) -> str:
    """The tables that a person reads; `every_tensor` lists each one by name."""
    sections = [
        ("source", table("<<", _what_it_is(facts))),
        ("config", table("<<", _config_lines(facts["config"]))),
        ("tensors", _tensor_table(facts)),
        *([("every tensor", every(facts))] if every_tensor else []),
        ("files", _file_table(facts)),
        *([("check", _check_table(facts["check"]))] if "check" in facts else []),
        *([("notes", "\n".join(f"  {note}" for note in facts["notes"]))] if facts["notes"] else []),
    ]
    return "\n\n".join(f"{title}\n{body}" for title, body in sections)


_USUAL = {field.name: field.default for field in fields(ModelConfig) if field.default is not MISSING}


def _config_lines(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The hyperparameters, those that most models lack only where this one has them; shared keys in words."""
    words = {"kv_heads": f"{config['kv_heads']}, each for {config['heads'] // (config['kv_heads'] or 1)} heads"}
    shown = {name: value for name, value in config.items() if name not in _USUAL or value != _USUAL[name]}
    return [(name, words.get(name, value)) for name, value in shown.items()]


def _what_it_is(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The lines on the source as a whole."""
    found = facts["source"]
    rows = [("what", SOURCES[found["format"]].title), ("path", found["path"])]
    if "layout" in found:  # gpt-neox's own
        rows += [
            ("parallel", f"TP {found['tensor_parallel']}, PP {found['pipeline_parallel']} ({found['layout']})"),
            ("names", found["names"]),
            *([("step", f"{found['step']:,}")] if found["step"] is not None else []),
            *([("weights", "master: the optimizer's fp32")] if found["weights"] == "master" else []),
            ("configs", ", ".join(PurePath(path).name for path in found["configs"]) or "none"),
        ]
    if found["tensor_parallel"] > 1:
        apart = facts["rank_difference"]
        rows.append(("ranks' norms", "not compared" if apart is None else f"differ by {apart:.3g} at most"))
    words = facts["tokenizer"] or {}
    rows.append(("tokenizer", words["problem"] if "problem" in words else tokenizer_line(words)))
    vocabulary = facts["vocabulary"]
    said = "" if vocabulary["said"] is None else f", {vocabulary['said']:,} by its settings"
    return [
        *rows,
        ("parameters", f"{facts['parameters']:,}"),
        ("type", f"{facts['dtype']}, {facts['bits_per_weight']:.2f} bits per weight"),
        ("vocabulary", f"{vocabulary['rows']:,} rows{said}"),
        ("dropped", dropped(facts["dropped"])),
    ]


def dropped(names: list[str]) -> str:
    """How many buffers are left out, by the last part of their names."""
    endings = Counter(re.split(r"[./]", name)[-1] for name in names)
    return ", ".join(f"{count} {ending}" for ending, count in endings.items()) or "nothing"


def times(shape: list[int]) -> str:
    return " x ".join(map(str, shape))


def _tensor_table(facts: Mapping[str, Any]) -> str:
    """The groups of tensors with their sum."""
    rows = [
        (group["role"], group["count"], group["dtype"], times(group["shape"]), size(group["bytes"]))
        for group in facts["groups"]
    ]
    count, total = (sum(group[key] for group in facts["groups"]) for key in ("count", "bytes"))
    return table("<><<>", [("role", "count", "type", "shape", "size"), *rows, ("sum", count, "", "", size(total))])


def every(facts: Mapping[str, Any]) -> str:
    """Each unified tensor on a line."""
    return table("<<<>", [(t["name"], t["dtype"], times(t["shape"]), size(t["bytes"])) for t in facts["tensors"]])


def _file_table(facts: Mapping[str, Any]) -> str:
    """The kinds of files with their sum."""
    files = facts["files"]
    rows = [(file["kind"], file["count"], f"{file['bytes']:,}", size(file["bytes"])) for file in files]
    count, total = (sum(file[key] for file in files) for key in ("count", "bytes"))
    return table("<>>>", [("kind", "files", "bytes", "size"), *rows, ("sum", count, f"{total:,}", size(total))])


def _check_table(check: Mapping[str, Any]) -> str:
    """What was read, what came of it, and up to twenty findings."""
    read = f"{plural(check['files'], 'file')}, {plural(check['records'], 'record')}, {check['bytes']:,} bytes"
    bare = plural(check["files_without_checksums"], "file"), plural(check["records_without_checksum"], "record")
    lines = [table("<<", [("read", read), ("without a checksum", ", ".join(bare)), ("result", check["verdict"])])]
    return "\n".join([*lines, *first_of([finding["message"] for finding in check["findings"]])])
