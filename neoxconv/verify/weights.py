"""The second level: every tensor of the target is the source's, exactly or within what its encoding's scales imply."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from neoxconv.core.encoding import Comparison, Encoding, Moments, Scaled
from neoxconv.core.model import Checkpoint
from neoxconv.core.table import Weight
from neoxconv.core.tensor import LazyTensor, Misfits, slabs
from neoxconv.dtypes import PLAIN, Array, Floats, Numbers, narrow
from neoxconv.engine.memory import SLAB
from neoxconv.errors import PlanError
from neoxconv.formats.calibration.read import digest_of, moments_in, outputs_in
from neoxconv.quant import ENCODINGS, SCALED, floats
from neoxconv.quant.bands import rounded
from neoxconv.quant.feedback import verdict
from neoxconv.quant.feedback.encode import damped_moments
from neoxconv.quant.scaled.verdict import ScaledCheck, scales_for
from neoxconv.quant.wrong import Wrong
from neoxconv.sources.coverage import is_partial
from neoxconv.targets.calibrated import chosen_by
from neoxconv.targets.gguf import AIMED, SEARCHED
from neoxconv.targets.stand_in import as_the_targets
from neoxconv.verify.report import Finding, Report, TensorError
from neoxconv.verify.settings import compare_settings

_Progress = Callable[[int], None]
_CHOSEN_SLAB = 4 << 20  # bytes of float32: the more rows, the more use is made of moments that were read
_BLOCK = 32  # weights
_LOOSE = 0.8  # relative error of types that are only read (docs/verification.md, "Thresholds")
_SIZES = ("layers", "hidden", "ff", "rows")


@dataclass(frozen=True)
class _Pair:
    """A tensor of the source and the target's of the same name.

    `joined`: the target's was computed from its ranks' (a mean, a sum), each of which holds its `native` type;
    `weighted`: its encoder knew which columns matter, or searched for other scales than llama.cpp's; `together`: it
    chose codes together, by the `moments` of the inputs and perhaps the `outputs`, those of gradients, where they are
    at hand; `aimed`: it rounded an aim that lies with the moments, so that little can be said without them;
    `foreign`: another program made it, whose scales are taken as they are stored.
    """

    name: str
    source: LazyTensor
    target: LazyTensor
    joined: bool
    weighted: bool = False
    together: bool = False
    moments: Moments | None = None
    outputs: Moments | None = None
    aimed: bool = False
    foreign: bool = False


def verify_weights(
    source: Checkpoint,
    target: Checkpoint,
    *,
    calibration: Path | None = None,
    foreign: bool = False,
    jobs: int = 2,
    progress: _Progress = lambda count: None,
) -> Report:
    """Whether every tensor of `target` holds the weights of `source`, and the configurations give one function.

    `source` must have been opened with the target's norms policy; where the target's format lacks its family, it is
    compared as the one that stands in. `calibration` is the file by which codes were chosen together, without which
    these have bounds only. `foreign`: another program made the target, whose scales need not be those that ours would
    be: codes must be the nearest by the scales that are stored. `progress` gets counts of source bytes compared. Raises
    CheckpointError where its settings are in doubt.
    """
    source.refuse_doubts()
    source = as_the_targets(source, target)
    differences = list(compare_settings(source, target))
    if any(getattr(source.config, size) != getattr(target.config, size) for size in _SIZES):
        return Report("weights", "no tensor, because the models have other shapes", tuple(differences))
    pairs, findings = _pair_up(source, target)
    pairs = [replace(pair, foreign=foreign) for pair in _with_moments(pairs, source, target, calibration)]
    with ThreadPoolExecutor(jobs) as pool:
        results = list(pool.map(lambda pair: compare(pair, progress), pairs))
    findings += [finding for _, finding in results if finding]
    findings += differences
    tensors = tuple(error for error, _ in results)
    part = f" of {len(source.tensors)}, all that the target is to hold" if is_partial(target.index) else ""
    told = tuple(_told_of_scales(pairs))
    return Report("weights", f"{len(pairs)} tensors{part}", tuple(findings), tensors, lines=told)


def _told_of_scales(pairs: Sequence[_Pair]) -> Iterator[str]:
    """What is not proven of a target that another program made."""
    if count := sum(_by_stored(pair) is not None for pair in pairs):
        yield (
            f"  the scales of {count} tensors are taken as they are stored, as there is no manifest: "
            "every code must be the nearest by them; whether others would be better is not judged"
        )


def _by_stored(pair: _Pair) -> Misfits | None:
    """What tells which weights cannot have been stored so, by the target's own scales; None where these are judged."""
    return pair.target.misfits if pair.foreign and not pair.together else None


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
    moments, aimed = moments_in(calibration) if calibration else {}, target.index.settings.get(AIMED, ())
    weights = [weight for _, weight in source.architecture.in_gguf(source.config)]
    head = source.architecture.gguf_logits(source.config)
    matrices = {w.unified: w.gguf for w in weights if w.linear or w is head}
    outputs = _outputs_in(calibration, weights, source) if calibration else {}

    def marked(pair: _Pair) -> _Pair:
        type_, name = pair.target.dtype.name, matrices.get(pair.name)
        has_grid = type_ in SCALED or (type_ in ENCODINGS and ENCODINGS[type_].grid)
        if not has_grid or name is None or (moments and name not in moments):
            return pair
        found = outputs.get(name) if type_ in ENCODINGS else None
        return replace(pair, together=True, moments=moments.get(name), outputs=found, aimed=name in aimed)

    return list(map(marked, pairs))


def _outputs_in(calibration: Path, weights: Sequence[Weight], source: Checkpoint) -> dict[str, Moments]:
    """The moments of gradients by GGUF name, but in the order of the source's rows."""
    found = outputs_in(calibration)
    orders = {w.gguf: np.argsort(w.gguf_order(source.config)) for w in weights if w.gguf_order and w.gguf in found}
    return found | {name: _in_order(found[name], order) for name, order in orders.items()}


def _in_order(moments: Moments, order: Numbers) -> Moments:
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
        finding = Finding(pair.name, f"is {list(pair.target.shape)}; the source's is {list(pair.source.shape)}")
        return TensorError(pair.name, encoding, float("inf"), float("inf")), finding
    if _is_copy(pair):
        progress(pair.source.nbytes)
        return TensorError(pair.name, encoding, 0.0, 0.0), None
    wrong, largest, squares, power = Wrong(pair.source), 0.0, 0.0, 0.0
    unit, compared = _comparing(pair, encoding)
    for start, stop in slabs(pair.source, _CHOSEN_SLAB if pair.together else SLAB, unit):
        weights = floats(pair.source.read(start, stop), pair.source.dtype)
        found = compared(_asked(pair, weights, start, stop), pair.target.read(start, stop), start)
        wrong.add(found.wrong, start)
        sums = _sums(weights, found.read())
        largest, squares, power = max(largest, sums.largest), squares + sums.squares, power + sums.power
        progress((stop - start) * pair.source.dtype.size(pair.source.columns))
    result = TensorError(pair.name, encoding, largest, (squares / power) ** 0.5 if power else float(squares > 0))
    if (pair.weighted or pair.foreign) and result.relative > _LOOSE:
        return result, Finding(pair.name, f"is {result.relative:.2g} of its size away from the source's weights")
    return result, Finding(pair.name, wrong.told(encoding)) if wrong.count > _slips(pair, encoding) else None


def _slips(pair: _Pair, encoding: str) -> float:
    """How many weights another program's encoder may have stored as ours would not: of any tensor a block."""
    share = ENCODINGS[encoding].slips if encoding in ENCODINGS else 0
    return _BLOCK + share * pair.source.rows * pair.source.columns if share else 0


def _is_copy(pair: _Pair) -> bool:
    """Whether the target holds the source's numbers bit for bit; none need be looked at then."""
    if pair.source.dtype.name != pair.target.dtype.name or pair.source.dtype.name not in PLAIN:
        return False
    bits = f"u{pair.source.dtype.nbytes}"
    return all(
        np.array_equal(pair.source.read(*band).view(bits), pair.target.read(*band).view(bits))
        for band in slabs(pair.source, SLAB)
    )


def _asked(pair: _Pair, weights: Floats, start: int, stop: int) -> Floats:
    """What rows `start` to `stop` were rounded from: their weights, or the aim that stands in a calibration."""
    aim = pair.moments.aim if pair.moments else None
    return aim.rows.floats(start, stop) if aim else weights


_Compared = Callable[[Floats, Array, int], Comparison]  # of weights, what is stored of them, and their first row


def _comparing(pair: _Pair, encoding: str) -> tuple[int, _Compared]:
    """How the slabs of a pair are compared, and of how many rows, or a multiple, they must be."""
    if misfits := _by_stored(pair):
        return 1, lambda rows, values, start: Comparison(misfits(rows, values, start), lambda: values)
    if encoding in SCALED:
        return _comparing_scaled(pair, SCALED[encoding])
    if encoding not in ENCODINGS:
        return 1, partial(_compare_read, pair)
    if pair.aimed and pair.moments is None:
        return 1, partial(_compare_unknown, pair)
    if pair.together and (grid := ENCODINGS[encoding].grid):
        outputs = damped_moments(pair.outputs, pair.name, damping=0) if pair.outputs else None
        moments = _moments_of(pair)
        unit = pair.source.rows if pair.outputs else 1
        return unit, lambda rows, stored, start: verdict.compare(grid, rows, stored, moments, outputs)
    if pair.joined:
        return 1, partial(_compare_joined, pair, ENCODINGS[encoding])
    return 1, lambda rows, stored, start: ENCODINGS[encoding].compare(rows, stored, pair.weighted)


def _comparing_scaled(pair: _Pair, encoding: Scaled) -> tuple[int, _Compared]:
    """The same where scales lie beside codes."""
    together, moments = pair.together, _moments_of(pair)
    scales = scales_for(encoding, pair.source, SLAB, together=together, moments=moments)
    check = ScaledCheck(encoding, pair.source, scales, together=together, moments=moments)
    return check.unit, lambda rows, values, start: check.compare(rounded(encoding, pair.source, rows), values, start)


def _moments_of(pair: _Pair) -> Floats | None:
    """The damped moments by which a pair's codes were chosen, where they are at hand."""
    return damped_moments(pair.moments, pair.name) if pair.moments else None


def _compare_unknown(pair: _Pair, rows: Floats, stored: Array, _: int) -> Comparison:
    """What was rounded from an aim that is not at hand: no weight of it is known, all of it must be near."""
    values = floats(stored, pair.target.dtype)
    return Comparison(~np.isfinite(values), lambda: values)


def _compare_joined(pair: _Pair, encoding: Encoding, rows: Floats, stored: Array, _: int) -> Comparison:
    """What was computed from ranks is compared as their type, in which a writer would store it."""
    values = floats(stored, pair.target.dtype)
    return Comparison(encoding.wrong(rows, narrow(values, pair.target.native), pair.weighted), lambda: values)


def _compare_read(pair: _Pair, rows: Floats, stored: Array, _: int) -> Comparison:
    """A type that we only read cannot have come from other weights: loosely for blocks, else exactly."""
    values = floats(stored, pair.target.dtype)
    if pair.target.dtype.block == 1:
        return Comparison(np.asarray(rows != values) & ~(np.isnan(rows) & np.isnan(values)), lambda: values)
    sums = _sums(rows, values)
    far = sums.squares > _LOOSE**2 * sums.power
    return Comparison(np.full(rows.shape, far) | ~np.isfinite(values), lambda: values)


@dataclass(frozen=True)
class _Sums:
    """Of weights and what is read of them: the largest |w - v|, the sum of (w - v)^2 and that of w^2."""

    largest: float
    squares: float
    power: float


def _sums(rows: Floats, values: Floats) -> _Sums:
    """The sums of a slab, in a fixed order."""
    from neoxconv.quant.kernels import tally

    largest, squares, power = tally(*(np.ascontiguousarray(each).reshape(-1) for each in (rows, values)))
    return _Sums(float(largest), squares, power)
