"""The GGUF target: a mix gives every weight its type, an importance matrix tells which columns matter."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from neoxconv.core.encoding import Moments
from neoxconv.core.layout import Content, Entry
from neoxconv.core.model import Checkpoint
from neoxconv.core.table import Weight
from neoxconv.core.tensor import reordered
from neoxconv.errors import PlanError
from neoxconv.formats import imatrix
from neoxconv.formats.calibration.read import digest_of, gradients_in, moments_in
from neoxconv.formats.gguf import write
from neoxconv.formats.gguf.read import ALIGNMENT
from neoxconv.formats.imatrix import Matrix
from neoxconv.quant import ENCODINGS
from neoxconv.targets.budget import ROLES, TYPES, Chosen, Known, choose_within, costs_of, line
from neoxconv.targets.calibrated import KEY, check_aims, notes_on_source, with_contexts
from neoxconv.targets.carried import carried, generation, kept_tokenizer_facts, tokenizer_facts
from neoxconv.targets.gguf_words import TOKENS, is_kept, kept_keys, notes_beside, tokenizer_keys, unsaid
from neoxconv.targets.metadata import file_stem, words_of
from neoxconv.targets.mixes import MIXES, Choice, GgufTensor, check_patterns, choose, needs_matrix, wanted
from neoxconv.targets.recipe import Recipe
from neoxconv.targets.stand_in import written_as
from neoxconv.words import plural

# llama-quantize's words for an importance matrix, and ours: a file's checker must know what its encoder could choose.
_FILE_KEY, _TEXT_KEY = "quantize.imatrix.file", "quantize.imatrix.dataset"
_ENTRIES_KEY, _CHUNKS_KEY = "quantize.imatrix.entries_count", "quantize.imatrix.chunks_count"
_EFFORT_KEY = "neoxconv.effort"
AIMED = "neoxconv.aimed"  # names of tensors that are not rounded weights, but what a calibration has in their place
_BESIDE_CHOSEN = "Q4_K_M"
SEARCHED = (_ENTRIES_KEY, _EFFORT_KEY)
RECIPES = tuple(Recipe("gguf", type=mix) for mix in MIXES)  # all that `formats` lists
OPTIONS = (  # what changes the mix, and what may be written of the tokenizer
    "mix", "pure", "output_type", "embedding_type", "tensor_type", "imatrix", "calibration", "bits", "size", "types",
    "effort", "allow_other_tokens",
)  # fmt: skip


def to_gguf(checkpoint: Checkpoint, recipe: Recipe) -> Content:
    """A GGUF file (or several, with --split-size), with the tokenizer that llama.cpp needs."""
    own = checkpoint
    checkpoint, stands_in = written_as(own, "gguf", recipe.as_family)
    choice = _choice_of(checkpoint, recipe)
    kept = kept_keys(checkpoint, recipe)
    words = words_of(own, recipe, generation(own, {}))
    beside = None if TOKENS in kept else carried(own, recipe.tokenizer)
    matrix, moments = _importances(recipe)
    entries = with_contexts(gguf_entries(checkpoint, recipe), matrix, moments, recipe)
    searched = any(entry.context for entry in entries)
    digest = digest_of(recipe.calibration) if recipe.calibration else ""
    aims = {name: known.aim for name, known in moments.items() if known.aim}
    keys = {
        "general.architecture": checkpoint.architecture.gguf_name,
        "general.type": "model",
        **words.keys,
        **_hyperparameters(checkpoint),
        "general.file_type": MIXES[choice.mix].file_type,
        "general.quantization_version": 2,
        **(tokenizer_keys(checkpoint, beside, recipe) if beside else {}),
        **(_matrix_keys(matrix) if matrix and searched else {}),
        **({_EFFORT_KEY: recipe.effort} if recipe.effort != "normal" and searched else {}),
        **({KEY: digest} if digest else {}),
        **({AIMED: list(aims)} if aims else {}),
    }
    keys |= {key: value for key, value in kept.items() if is_kept(key, keys, words, checkpoint)}
    chosen = _within_budget(entries, keys, moments, matrix, checkpoint, recipe)
    if chosen:
        entries = [replace(entry, encoding=chosen.encoding(entry)) for entry in entries]
        entries = with_contexts(entries, matrix, moments, recipe)
    check_aims(entries, aims, recipe)
    _check_matrix(checkpoint, choice, entries)
    notes = (
        *stands_in,
        *words.notes,
        *([line(chosen, recipe)] if chosen else []),
        *_gguf_notes(checkpoint, choice, entries, chosen),
        *(_matrix_notes(matrix, entries, digest) if matrix else ()),
        *(notes_on_source(checkpoint, recipe.calibration) if recipe.calibration else ()),
        *(notes_beside(beside, keys, words, recipe) if beside else unsaid(checkpoint)),
    )
    tokenizer = tokenizer_facts(checkpoint, beside.tokenizer) if beside else kept_tokenizer_facts(checkpoint)
    kind = _kind(entries, own) if chosen else choice.mix
    files = write.layout(file_stem(words.keys, kind), keys, entries, recipe.split_size)
    return Content(files, {}, notes, tokenizer, kind)


def _kind(entries: Sequence[Entry], checkpoint: Checkpoint) -> str:
    """What types that were chosen by their costs are called together: 4_5BPW for 4.5 bits a weight."""
    bits = 8 * sum(entry.nbytes for entry in entries) / checkpoint.parameters
    return f"{bits:.1f}BPW".replace(".", "_")


def _matrix_keys(matrix: Matrix) -> dict[str, Any]:
    """What llama-quantize tells of an importance matrix; of its file the name alone."""
    told = {_FILE_KEY: matrix.path.name, _TEXT_KEY: matrix.dataset}
    counts = {_ENTRIES_KEY: len(matrix.entries), _CHUNKS_KEY: matrix.chunks}
    return {key: text for key, text in told.items() if text} | counts


def _hyperparameters(checkpoint: Checkpoint) -> dict[str, Any]:
    """The keys of a family that GGUF has."""
    assert checkpoint.architecture.to_gguf
    return checkpoint.architecture.to_gguf(checkpoint.config)


def _choice_of(checkpoint: Checkpoint, recipe: Recipe) -> Choice:
    """The mix that the recipe asks for, with its overrides; by default BF16 for a bf16 source, else F16.

    Where types are chosen by what they cost it is the mix of what has no cost.
    """
    native = [tensor.native.name for tensor in checkpoint.tensors.values() if len(tensor.shape) == 2]
    plain = "BF16" if native.count("BF16") * 2 > len(native) else "F16"
    mix = recipe.type or (_BESIDE_CHOSEN if recipe.bits or recipe.size else plain)
    classic = recipe.mix == "classic"
    overrides = recipe.output_type, recipe.embedding_type, recipe.tensor_type
    return Choice(mix, classic, recipe.pure, *overrides, bool(recipe.imatrix or recipe.calibration))


def _gguf_tensors(checkpoint: Checkpoint) -> list[tuple[GgufTensor, Weight]]:
    """Every tensor of a GGUF file, as a mix sees it and as the table has it; a head where llama.cpp wants one."""
    config = checkpoint.config
    rows, queries = checkpoint.architecture.in_gguf(config), config.heads // config.key_heads
    tied = all(weight.role != "head" for _, weight in rows)
    columns = [math.prod(config.sizes[size] for size in weight.shape[1:]) for _, weight in rows]
    return [
        (GgufTensor(w.gguf, w.role, layer, config.layers, width, queries, tied and w.role == "embedding"), w)
        for (layer, w), width in zip(rows, columns, strict=True)
    ]


def gguf_entries(checkpoint: Checkpoint, recipe: Recipe) -> list[Entry]:
    """Every tensor under its GGUF name, in GGUF's order of rows, with the encoding that the mix gives it."""
    checkpoint, _ = written_as(checkpoint, "gguf", recipe.as_family)
    choice, tied_head = _choice_of(checkpoint, recipe), checkpoint.architecture.tied_head
    entries = []
    for described, weight in _gguf_tensors(checkpoint):
        unified = weight.unified
        tensor = checkpoint.tensors[unified if unified in checkpoint.tensors else tied_head[unified]]
        if weight.gguf_order:
            tensor = reordered(tensor, weight.gguf_order(checkpoint.config))
        entries.append(Entry(weight.gguf, unified, tensor, choose(choice, described)))
    return entries


def _importances(recipe: Recipe) -> tuple[Matrix | None, Mapping[str, Moments]]:
    """How much columns matter, and the moments of what matrices are multiplied with, as far as they were given.

    Raises PlanError where both kinds of files were.
    """
    if recipe.imatrix and recipe.calibration:
        raise PlanError("--calibration is an importance matrix too; leave --imatrix out.")
    source = recipe.calibration or recipe.imatrix
    return imatrix.read(source) if source else None, moments_in(recipe.calibration) if recipe.calibration else {}


def _within_budget(
    entries: Sequence[Entry],
    keys: Mapping[str, Any],
    moments: Mapping[str, Moments],
    matrix: Matrix | None,
    checkpoint: Checkpoint,
    recipe: Recipe,
) -> Chosen | None:
    """Types for matrices by what they cost; None where nobody asked. Raises PlanError where none fit."""
    if recipe.bits is None and recipe.size is None:
        if recipe.types:
            raise PlanError("--types limits what --bits or --size may choose; give one of them.")
        return None
    if recipe.bits and recipe.size:
        raise PlanError("--bits and --size exclude each other; give one of them.")
    shapes = {entry.name: entry.tensor.shape for entry in entries}
    gradients = gradients_in(recipe.calibration, shapes) if recipe.calibration else {}
    importance = {name: values for name, values in matrix.entries.items() if values.any()} if matrix else {}
    costs = []
    for entry, (tensor, _) in zip(entries, _gguf_tensors(checkpoint), strict=True):
        if (entry.name in gradients if gradients else tensor.role in ROLES) and not _is_asked(tensor, recipe):
            known = Known(importance.get(entry.name), gradients.get(entry.name), moments.get(entry.name))
            costs.append(costs_of(entry, tensor, known, recipe.types or TYPES))
    costs = [each for each in costs if each.nats]  # others have rows that no type's blocks divide
    names = {each.entry.name for each in costs}
    fixed = sum(entry.nbytes for entry in entries if entry.name not in names)
    if recipe.size:
        (file,) = write.layout("model", keys, entries, None)
        room = recipe.size - file.slots[0].offset - ALIGNMENT * len(entries)
    else:
        room = int(checkpoint.parameters * (recipe.bits or 0) / 8)
    return choose_within(costs, room - fixed)


def _check_matrix(checkpoint: Checkpoint, choice: Choice, entries: Sequence[Entry]) -> None:
    """Raise PlanError where tensors become types that are too poor without knowing which columns matter."""
    lacking = [
        f"{entry.name} ({entry.encoding.name})"
        for entry, (tensor, _) in zip(entries, _gguf_tensors(checkpoint), strict=True)
        if needs_matrix(choice.mix, tensor, entry.encoding.name)
        and (entry.context is None or entry.context.importance is None)
    ]
    if lacking:
        raise PlanError(
            f"--type {choice.mix}: {plural(len(lacking), 'tensor')} would be of no use without an importance matrix: "
            f"{listed(lacking)}. Give --imatrix FILE (neoxconv calibrate makes one), or take a type that needs none, "
            "such as IQ3_S or Q2_K."
        )


def _is_asked(tensor: GgufTensor, recipe: Recipe) -> bool:
    """Whether --tensor-type, --output-type or --embedding-type gives a matrix its type."""
    head = recipe.output_type if tensor.role == "head" or tensor.tied else None
    embedding = recipe.embedding_type if tensor.role == "embedding" else None
    return bool(head or embedding) or any(re.search(pattern, tensor.name) for pattern, _ in recipe.tensor_type)


def _matrix_notes(matrix: Matrix, entries: Sequence[Entry], calibration: str) -> list[str]:
    """What the importance matrix was, or the calibration of a digest, and the tensors that could have used an entry but
    have none."""
    lacking = [e.name for e in entries if e.search and (e.context is None or e.context.importance is None)]
    count = plural(len(matrix.entries), "tensor")
    note = (
        f"calibration of {count}, digest {calibration}"
        if calibration
        else f"importance matrix of {count}, sha256 {matrix.sha256}"
    )
    without = f"{plural(len(lacking), 'tensor')} without importances, quantized as if all columns mattered alike: "
    return [note, *([without + listed(lacking)] if lacking else [])]


def listed(names: Sequence[str]) -> str:
    """The first of the names."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _gguf_notes(checkpoint: Checkpoint, choice: Choice, entries: Sequence[Entry], chosen: Chosen | None) -> list[str]:
    """What differs from what the mix's name promises, and what llama.cpp will compute differently."""
    notes = check_patterns(choice, [described for described, _ in _gguf_tensors(checkpoint)])
    odd: dict[tuple[str, str], list[str]] = {}
    for entry, (described, weight) in zip(entries, _gguf_tensors(checkpoint), strict=True):
        if chosen and entry.name in chosen.types:
            continue
        if len(weight.shape) == 2 and (name := wanted(choice, described)) != entry.encoding.name:
            odd.setdefault((name, entry.encoding.name), []).append(entry.name)
    for (name, instead), tensors in odd.items():
        block = ENCODINGS[name].dtype.block
        count = plural(len(tensors), "tensor")
        notes.append(f"{count} as {instead}: no rows of {name}'s {block} weights: {listed(tensors)}")
    window = checkpoint.config.window
    if window and window < checkpoint.config.context:
        notes.append(f"llama.cpp has no window for such a model: it computes the same up to {window} tokens only")
    if checkpoint.config.activation == "gelu":
        notes.append("the model uses the erf GELU; llama.cpp computes the tanh form, so logits differ slightly")
    return notes
