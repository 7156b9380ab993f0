"""The second level: every tensor of the target is the source's, exactly or within what its encoding's scales imply."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from neoxconv.core.encoding import Moments
from neoxconv.core.model import Checkpoint
from neoxconv.core.table import Weight
from neoxconv.core.tensor import LazyTensor, slabs
from neoxconv.dtypes import Array, Bools, Floats, narrow
from neoxconv.errors import PlanError
from neoxconv.formats.calibration import digest_of, moments_in, outputs_in
from neoxconv.quant import ENCODINGS, SCALED, floats
from neoxconv.quant.bands import rounded
from neoxconv.quant.feedback.encode import damped_moments
from neoxconv.sources.coverage import is_partial
from neoxconv.targets.calibrated import chosen_by
from neoxconv.targets.gguf import SEARCHED
from neoxconv.targets.stand_in import as_the_targets
from neoxconv.verify.report import Finding, Report, TensorError
from neoxconv.verify.scaled import SLAB, ScaledCheck
from neoxconv.verify.together import not_the_best, taken_apart, too_far

_Progress = Callable[[int], None]
_LOOSE = 0.8  # relative error of types that are only read (docs/verification.md, "Thresholds")
# What must agree for the two to be one function. GGUF does not say which GELU (llama.cpp computes the tanh form), nor
# of a window (llama.cpp has none).
_COMPARED = (
    "layers",
    "hidden",
    "heads",
    "key_heads",
    "ff",
    "rows",
    "context",
    "rotary_dims",
    "rotary_base",
    "norm",
    "norm_eps",
    "parallel_residual",
    "activation",
    "tied",
    "window",
)
_SIZES = ("layers", "hidden", "ff", "rows")
_UNSAID = {"gguf": ("activation", "tied", "window")}


@dataclass(frozen=True)
class _Pair:
    """A tensor of the source and the target's of the same name.

    `joined`: the target's was computed from its ranks' (a mean, a sum), each of which holds its `native` type;
    `weighted`: its encoder knew which columns matter, or searched for other scales than llama.cpp's; `together`: it
    chose codes together, by the `moments` of the inputs and perhaps the `outputs`, those of gradients, where they are
    at hand.
    """

    name: str
    source: LazyTensor
    target: LazyTensor
    joined: bool
    weighted: bool = False
    together: bool = False
    moments: Moments | None = None
    outputs: Moments | None = None


def verify_weights(
    source: Checkpoint,
    target: Checkpoint,
    *,
    calibration: Path | None = None,
    jobs: int = 2,
    progress: _Progress = lambda count: None,
) -> Report:
    """Whether every tensor of `target` holds the weights of `source`, and the configurations give one function.

    `source` must have been opened with the target's norms policy; where the target's format lacks its family, it is
    compared as the one that stands in. `calibration` is the file by which codes were chosen
    together, without which these have bounds only. `progress` gets counts of source bytes compared. Raises
    CheckpointError where its settings are in doubt.
    """
    source.refuse_doubts()
    source = as_the_targets(source, target)
    differences = list(_compare_configs(source, target))
    if any(getattr(source.config, size) != getattr(target.config, size) for size in _SIZES):
        return Report("weights", "no tensor, because the models have other shapes", tuple(differences))
    pairs, findings = _pair_up(source, target)
    pairs = _with_moments(pairs, source, target, calibration)
    with ThreadPoolExecutor(jobs) as pool:
        results = list(pool.map(lambda pair: compare(pair, progress), pairs))
    findings += [finding for _, finding in results if finding]
    findings += differences
    tensors = tuple(error for error, _ in results)
    part = f" of {len(source.tensors)}, all that the target is to hold" if is_partial(target.index) else ""
    return Report("weights", f"{len(pairs)} tensors{part}", tuple(findings), tensors)


def _pair_up(source: Checkpoint, target: Checkpoint) -> tuple[list[_Pair], list[Finding]]:
    """Tensors by name; for two gpt-neox checkpoints of one degree also each rank's own, buffers included."""
    ours, theirs = dict(source.tensors), dict(target.tensors)
    tied_head = source.architecture.tied_head if source.config.tied else {}
    ours |= {head: ours[embedding] for head, embedding in tied_head.items() if head in theirs}
    if source.index.format == target.index.format == "neox" and len(source.index.ranks) == len(target.index.ranks):
        ours, theirs = _by_rank(source), _by_rank(target)
    missing = () if is_partial(target.index) else (name for name in ours if name not in theirs)
    findings = [Finding(name, "is in the source but not in the target") for name in missing]
    findings += [Finding(name, "is in the target but not in the source") for name in theirs if name not in ours]
    split = len(target.index.ranks) > 1
    weighted = any(key in target.index.settings for key in SEARCHED)
    pairs = [
        _Pair(name, ours[name], theirs[name], split and theirs[name].native is not theirs[name].dtype, weighted)
        for name in ours
        if name in theirs
    ]
    return pairs, findings


def _with_moments(pairs: list[_Pair], source: Checkpoint, target: Checkpoint, calibration: Path | None) -> list[_Pair]:
    """The pairs, those whose codes were chosen together marked so. Raises PlanError for another calibration's file."""
    made_with = chosen_by(target.index.settings)
    if calibration and made_with != digest_of(calibration):
        raise PlanError(f"{target.index.where}: was made with another calibration than {calibration}, or without one.")
    if made_with is None:
        return pairs
    moments = moments_in(calibration) if calibration else {}
    weights = [weight for _, weight in source.architecture.in_gguf(source.config)]
    last = "head" if any(weight.role == "head" for weight in weights) else "embedding"
    matrices = {w.unified: w.gguf for w in weights if w.linear or w.role == last}
    outputs = _outputs_in(calibration, weights, source) if calibration else {}

    def marked(pair: _Pair) -> _Pair:
        type_, name = pair.target.dtype.name, matrices.get(pair.name)
        has_grid = type_ in SCALED or (type_ in ENCODINGS and ENCODINGS[type_].grid)
        if not has_grid or name is None or (moments and name not in moments):
            return pair
        found = outputs.get(name) if type_ in ENCODINGS else None
        return replace(pair, together=True, moments=moments.get(name), outputs=found)

    return list(map(marked, pairs))


def _outputs_in(calibration: Path, weights: Sequence[Weight], source: Checkpoint) -> dict[str, Moments]:
    """The moments of gradients by GGUF name, but in the order of the source's rows."""
    found = outputs_in(calibration)
    orders = {w.gguf: np.argsort(w.gguf_order(source.config)) for w in weights if w.gguf_order and w.gguf in found}
    return found | {name: _in_order(found[name], order) for name, order in orders.items()}


def _in_order(moments: Moments, order: npt.NDArray[np.intp]) -> Moments:
    """Moments whose row and column i are those numbered order[i]."""
    return replace(moments, read=lambda: moments.read()[order][:, order])


def _by_rank(checkpoint: Checkpoint) -> dict[str, LazyTensor]:
    """Every rank's tensors by their unified names, and its buffers by their own."""
    tensors: dict[str, LazyTensor] = {}
    for rank, (known, stored) in enumerate(zip(checkpoint.ranks, checkpoint.index.ranks, strict=True)):
        buffers = {name: stored[name] for name in checkpoint.dropped if name in stored}
        tensors |= {f"{name} of rank {rank}": tensor for name, tensor in (known | buffers).items()}
    return tensors


def compare(pair: _Pair, progress: _Progress) -> tuple[TensorError, Finding | None]:
    """The error of one tensor, and what is wrong with it if anything is."""
    encoding = (pair.target.native if pair.joined else pair.target.dtype).name
    if pair.source.shape != pair.target.shape:
        found = Finding(pair.name, f"is {list(pair.target.shape)}; the source's is {list(pair.source.shape)}")
        return TensorError(pair.name, encoding, float("inf"), float("inf")), found
    wrong, first, largest, squares, power = 0, -1, 0.0, 0.0, 0.0
    moments = damped_moments(pair.moments, pair.name)[0] if pair.moments else None
    outputs = damped_moments(pair.outputs, pair.name, damping=0)[0] if pair.outputs else None
    check = ScaledCheck(SCALED[encoding], pair.source, moments) if encoding in SCALED else None
    unit = check.unit if check else pair.source.rows if pair.outputs else 1
    for start, stop in slabs(pair.source, SLAB, unit):
        weights = floats(pair.source.read(start, stop), pair.source.dtype)
        stored = pair.target.read(start, stop)
        values = floats(stored, pair.target.dtype)
        error = np.abs(weights - values)
        if pair.joined:
            stored = narrow(values, pair.target.native)
        if pair.together:
            bad = _not_chosen(encoding, check, weights, stored, start, (moments, outputs))
        elif check:
            bad = check.wrong(weights, values, start)
        elif encoding in ENCODINGS:
            bad = ENCODINGS[encoding].wrong(weights, stored, pair.weighted)
        else:
            bad = differs(pair, weights, values)
        if bad.any() and first < 0:
            first = start * pair.source.columns + int(np.flatnonzero(bad)[0])
        wrong += int(bad.sum())
        largest = max(largest, float(error.max(initial=0)))
        squares += float(np.square(error, dtype=np.float64).sum())
        power += float(np.square(weights, dtype=np.float64).sum())
        progress((stop - start) * pair.source.dtype.size(pair.source.columns))
    result = TensorError(pair.name, encoding, largest, (squares / power) ** 0.5 if power else float(squares > 0))
    if pair.weighted and result.relative > _LOOSE:
        return result, Finding(pair.name, f"is {result.relative:.2g} of its size away from the source's weights")
    if not wrong:
        return result, None
    at = list(map(int, np.unravel_index(first, pair.source.shape)))
    count = pair.source.rows * pair.source.columns
    what = f"{wrong} of {count} weights are not the source's as {encoding}, the first at {at}"
    return result, Finding(pair.name, what)


def _not_chosen(
    encoding: str,
    check: ScaledCheck | None,
    weights: Floats,
    stored: Array,
    start: int,
    known: tuple[Floats | None, Floats | None],
) -> Bools:
    """True where rows from `start` on are not what was chosen together for weights, as far as can be told.

    `known` are the damped moments of inputs and of gradients.
    """
    moments, outputs = known
    if check:
        rows, weights = check.stored(stored, start), rounded(check.encoding, check.source, weights)
        bad = check.no_code(rows, start)
    else:
        grid = ENCODINGS[encoding].grid
        assert grid
        rows, bad = taken_apart(grid, stored), np.zeros(weights.shape, np.bool_)
    bad |= too_far(rows, weights)
    return bad | not_the_best(rows, weights, moments, outputs) if moments is not None else bad


def differs(pair: _Pair, weights: Floats, values: Floats) -> npt.NDArray[np.bool_]:
    """True where a type that we only read cannot have come from these weights: loosely for blocks, else exactly."""
    if pair.target.dtype.block == 1:
        return np.asarray(weights != values) & ~(np.isnan(weights) & np.isnan(values))
    power = np.square(weights, dtype=np.float64).sum()
    far = np.square(weights - values, dtype=np.float64).sum() > _LOOSE**2 * power
    return np.full(weights.shape, far) | ~np.isfinite(values)


def _compare_configs(source: Checkpoint, target: Checkpoint) -> Iterator[Finding]:
    """Hyperparameters that differ, as far as the target's format can say the source's."""
    own, made = source.config, target.config
    if target.index.format != "neox":
        own = source.architecture.sayable(own)
    for name in _COMPARED:
        ours, theirs = getattr(own, name), getattr(made, name)
        if ours != theirs and name not in _UNSAID.get(target.index.format, ()):
            yield Finding("configuration", f"{name} is {theirs} in the target and {ours} in the source")
