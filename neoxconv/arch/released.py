"""Released models: what is known of them where no card says it, and how a source is recognized as one of them.

Source: their cards on the Hub. Shapes alone tell nothing: whoever trains a model takes those of a known one.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from neoxconv.arch.gpt_neo.weights import GPT_NEO
from neoxconv.arch.gpt_neox.weights import GPT_NEOX
from neoxconv.arch.gptj.weights import GPT_J
from neoxconv.core.model import Architecture
from neoxconv.core.table import ModelConfig

_PILE, _DEDUPLICATED = "EleutherAI/pile", "EleutherAI/the_pile_deduplicated"


@dataclass(frozen=True)
class Release:
    """A model as its maker publishes it."""

    repo: str  # on the Hub, ORG/NAME
    family: Architecture
    preset: str  # whose shapes it has
    license: str = "apache-2.0"
    languages: tuple[str, ...] = ("en",)
    datasets: tuple[str, ...] = (_PILE,)
    step: int | None = None  # gpt-neox's, of its checkpoint

    @property
    def name(self) -> str:
        return self.repo.partition("/")[2]

    def fits(self, config: ModelConfig) -> bool:
        """Whether a model has its shapes."""
        own = self.family.presets[self.preset]
        return _shapes(own) == _shapes(config)


def _shapes(config: ModelConfig) -> tuple[int, ...]:
    return config.layers, config.hidden, config.heads, config.ff, config.rows


_PYTHIA, _POLYGLOT = (
    [name for name in GPT_NEOX.presets if name.startswith(beginning)] for beginning in ("pythia-", "polyglot-ko-")
)
RELEASES = (
    Release("EleutherAI/gpt-neox-20b", GPT_NEOX, "20B", step=150_000),
    *(Release(f"EleutherAI/{name}", GPT_NEOX, name, step=143_000) for name in _PYTHIA),
    *(
        Release(f"EleutherAI/{name}-deduped", GPT_NEOX, name, datasets=(_DEDUPLICATED,), step=143_000)
        for name in _PYTHIA
    ),
    *(Release(f"EleutherAI/{name}", GPT_NEOX, name, languages=("ko",), datasets=()) for name in _POLYGLOT),
    *(Release(f"EleutherAI/{name}", GPT_NEO, name, license="mit") for name in GPT_NEO.presets),
    Release("EleutherAI/gpt-j-6b", GPT_J, "gpt-j-6B"),
)


def released(
    family: Architecture, config: ModelConfig, names: Collection[str], preset: str | None, step: int | None
) -> Release | None:
    """The released model that a source is; None where nothing tells.

    Its shapes must be that model's. Then one of the source's `names` tells it, else the `preset` that was asked for or
    gpt-neox's `step`, where only one model has these.
    """
    found = [each for each in RELEASES if each.family is family and each.fits(config)]
    known = {name.lower() for name in (*names, preset or "")}
    named = [each for each in found if each.name.lower() in known]
    told = named or [each for each in found if preset == each.preset or (step is not None and step == each.step)]
    return told[0] if len(told) == 1 else None
