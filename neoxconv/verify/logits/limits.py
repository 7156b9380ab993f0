"""How far a target's predictions may be from the trained model's: by its type, or as asked."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from neoxconv.core.model import Checkpoint
from neoxconv.targets.compressed_tensors import DYNAMIC
from neoxconv.targets.divergences import DIVERGENCES, WEIGHTS_ALONE
from neoxconv.targets.mixes import MIXES
from neoxconv.verify.logits.compare import Predictions
from neoxconv.verify.logits.trial import Limits

# Mean KL divergence from the model as it was trained: what joining the ranks' norms costs, and what rounding to plain
# types does. ROOM times their sum is allowed. Where they were measured: docs/verification.md, "Thresholds".
_JOINING = {"mean": 1.4e-6, "rank0": 3.6e-6, "fold": 6e-13}
_SERIAL = 2e-8  # more, where every rank has a stream of its own
# The mix in which a block type does most of the work: for files whose tensors have other types than their mix gives.
_MAIN = {"Q2_K": "Q2_K", "Q3_K": "Q3_K_S", "Q4_K": "Q4_K_S", "Q5_K": "Q5_K_S"}
_ROUNDING = {"F32": 0.0, "F16": 7e-8, "BF16": 4e-6}
_ROOM = 2.0
# What a program's own arithmetic adds where it runs packed weights in the model's type.
_ARITHMETIC = {("vllm", "F16"): 1.3e-6, ("vllm", "BF16"): 9e-5}
# The figures above and DIVERGENCES are those of a model of 10.5 M parameters. A released one of 135 M (SmolLM2) moves
# further by the same rounding: 15 times (BF16) to 50 times (Q4_K_M); run by llama.cpp up to 115 times (Q8_0), and F32,
# which is not rounded at all, by 4.7e-7.
_SMALL = 50_000_000  # parameters
_LARGER, _LARGER_ELSEWHERE, _ELSEWHERE = 60.0, 120.0, 1e-6


@dataclass(frozen=True)
class Limit:
    """A figure, what was found, and what it may be: at most, or with `least` at least."""

    name: str
    found: float
    limit: float
    least: bool = False

    @property
    def passed(self) -> bool:
        return self.found >= self.limit if self.least else self.found <= self.limit

    def __str__(self) -> str:
        return f"{self.name} is {self.found:.3g}, expected at {'least' if self.least else 'most'} {self.limit:.3g}"


def type_of(candidate: Checkpoint) -> str:
    """The mix of a GGUF file, else the type of most bytes, a quantized one if there is any."""
    number = candidate.index.settings.get("general.file_type")
    named = [name for name, mix in MIXES.items() if mix.file_type == number]
    if candidate.index.format == "gguf" and named:
        return named[0]
    sizes: Counter[str] = Counter()
    for tensor in candidate.tensors.values():
        sizes[tensor.dtype.name if tensor.dtype.quantized else tensor.native.name] += tensor.nbytes
    quantized = [tensor.dtype.name for tensor in candidate.tensors.values() if tensor.dtype.quantized]
    return max(quantized or sizes, key=lambda name: sizes[name])


def _rounds_inputs(candidate: Checkpoint) -> bool:
    """Whether compressed-tensors' settings say that inputs are rounded too."""
    told = candidate.index.settings.get("quantization_config")
    groups = told.get("config_groups") if isinstance(told, dict) else None
    each = groups.values() if isinstance(groups, dict) else ()
    return any(isinstance(group, dict) and group.get("input_activations") for group in each)


def _default_divergence(source: Checkpoint, candidate: Checkpoint, engine: str = "native") -> float:
    """The mean KL divergence that a target of this type, made with the source's norms policy, may have at most."""
    known = DIVERGENCES | _ROUNDING | (WEIGHTS_ALONE if engine == "native" else {})
    ranks = len(source.index.ranks)
    joined = ranks > 1 and ranks != len(candidate.index.ranks)
    joining = _JOINING[source.norms] + (0.0 if source.config.parallel_residual else _SERIAL)
    stored = {tensor.dtype.name for tensor in candidate.tensors.values() if tensor.dtype.quantized}
    names = {type_of(candidate)} | {_MAIN.get(name, name) for name in stored}
    names |= {DYNAMIC} if _rounds_inputs(candidate) else set()
    usual = DIVERGENCES["Q2_K"]  # of types that were not measured
    rounding = max(known.get(name, usual) for name in names)
    native = {tensor.native.name for tensor in candidate.tensors.values() if tensor.dtype.quantized}
    arithmetic = max((_ARITHMETIC.get((engine, name), 0.0) for name in native), default=0.0)
    usual_figure = _ROOM * ((joining if joined else 0.0) + rounding + arithmetic) + 1e-12
    if source.parameters < _SMALL:
        return usual_figure
    return _LARGER * usual_figure if engine == "native" else _LARGER_ELSEWHERE * usual_figure + _ELSEWHERE


def judged(predictions: Predictions, source: Checkpoint, candidate: Checkpoint, asked: Limits) -> list[Limit]:
    """Each figure that is limited; by default only the mean divergence is."""
    figures, mean = predictions.figures, asked.max_kl
    if mean is None:
        mean = _default_divergence(source, candidate, predictions.engine)
    rows = (
        ("mean KL divergence", figures.mean, mean, False),
        ("99th percentile of KL", figures.p99, asked.max_kl_p99, False),
        ("top-1 agreement", figures.top1, asked.min_top1, True),
        ("perplexity ratio", figures.perplexity.ratio, asked.max_ppl_ratio, False),
    )
    return [Limit(name, found, limit, least) for name, found, limit, least in rows if limit is not None]
