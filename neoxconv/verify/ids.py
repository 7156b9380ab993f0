"""The token ids of a text on both sides: by the tokenizers library, and by the program that will run the target.

The library encodes with each side's own tokenizer, a GGUF file's as it is read back from its keys. A program is asked
of the target, and of the source too where it runs such a source; else the source's ids are the library's. Nothing that
begins or ends a text is added, and special tokens that stand in the text count as such.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from neoxconv.core.model import Checkpoint
from neoxconv.errors import CheckpointError, PlanError, VerifyError, one_line
from neoxconv.formats.tokenizer import Tokenizer
from neoxconv.formats.tokenizer.gguf import PREFIX
from neoxconv.sources.tokenizer import tokenizer_of
from neoxconv.storage import Place
from neoxconv.verify.engines.child import ids_by, runs
from neoxconv.verify.logits.tokens import blamed, library
from neoxconv.verify.logits.trial import NATIVE, Engine, Sample
from neoxconv.verify.report import Finding, Report, findings_of

_MOST = 1 << 20  # characters of a text that are compared: the library takes some 500 bytes of memory for each
_AROUND = 24  # characters that are shown before a difference, and after it
_LIBRARY = "tokenizers"


@dataclass(frozen=True)
class _Encoded:
    """The ids of a text, and from which of its characters to which each stands for; no spans where that is unknown."""

    ids: Sequence[int]
    spans: Sequence[tuple[int, int]] = ()


@dataclass(frozen=True)
class _Compared:
    """What comparing the ids by one program found."""

    by: str
    count: int | None  # ids of the target; None where they were not compared
    findings: tuple[Finding, ...] = ()
    line: str = ""  # why they were not compared, where that is no fault of the target


@dataclass(frozen=True)
class _Reading:
    """A text of which the ids are compared, and the source's by the library."""

    name: str
    text: str
    ours: _Encoded

    def compared(self, by: str, ours: _Encoded, theirs: Sequence[int], target: Place) -> _Compared:
        """What differs, if anything."""
        what = _difference(self.text, ours, theirs)
        findings = (Finding(str(target), f"the ids of {self.name} differ by {by}: {what}"),) if what else ()
        return _Compared(by, len(theirs), findings)


def verify_ids(
    source: Checkpoint, candidate: Checkpoint, sample: Sample, *, target: Place, engine: Engine = NATIVE
) -> Report:
    """Whether the text of the sample has the same ids on both sides, by the library and by `engine` where one is named.

    Raises PlanError where the source has no tokenizer, the text is empty, or the engine does not run such targets,
    CheckpointError where the source's tokenizer or the text cannot be read, NeoxconvError where the engine dies.
    """
    assert sample.text
    text, words = sample.content[:_MOST], tokenizer_of(source)
    if not text:
        raise PlanError(f"{sample.text}: is empty; give a text.")
    if words is None:
        where = source.index.folder
        raise PlanError(f"{where}: has no tokenizer; leave --text out, or give token ids with --tokens FILE.npy.")
    name = sample.text.name if len(text) == len(sample.content) else f"{sample.text.name}'s first {_MOST:,} characters"
    reading = _Reading(name, text, _encoded(words, text))
    if not _has_tokenizer(candidate):
        return Report("tokenizer", f"no ids of {name}, as the target has no tokenizer", ())
    found = [_by_library(reading, candidate, target)]
    if not engine.native:
        found.append(_by_program(reading, source, candidate, target=target, engine=engine))
    return _report(reading, found)


def _report(reading: _Reading, found: Sequence[_Compared]) -> Report:
    """All that was found, as one report."""
    counts = {each.by: each.count for each in found if each.count is not None}
    checked = f"{len(reading.ours.ids):,} ids of {reading.name} by {' and '.join(counts) or 'nothing'}"
    return Report(
        "tokenizer",
        one_line(checked),
        tuple(finding for each in found for finding in each.findings),
        lines=tuple(f"  {each.line}" for each in found if each.line),
        facts={"text": reading.name, "characters": len(reading.text), "ids": counts},
    )


def _has_tokenizer(candidate: Checkpoint) -> bool:
    """Whether the target has one of its own; what lies beside a single file may be another model's."""
    index = candidate.index
    if index.format == "gguf":
        return PREFIX + "tokens" in index.settings
    return index.format != "safetensors" and tokenizer_of(candidate) is not None


def _by_library(reading: _Reading, candidate: Checkpoint, target: Place) -> _Compared:
    """The ids by the target's own tokenizer; of GGUF's keys not all can be made one that the library has."""
    try:
        words = tokenizer_of(candidate)
        assert words
        theirs = _encoded(words, reading.text).ids
    except CheckpointError as error:
        if candidate.index.format == "gguf":
            told = f"the library has no such tokenizer, --engine llama.cpp compares the ids: {error}"
            return _Compared(_LIBRARY, None, line=one_line(told))
        return _Compared(_LIBRARY, None, findings_of(target, error))
    return reading.compared(_LIBRARY, reading.ours, theirs, target)


def _by_program(
    reading: _Reading, source: Checkpoint, candidate: Checkpoint, *, target: Place, engine: Engine
) -> _Compared:
    """The ids by the program that will run the target; what it does not load is a finding."""
    try:
        theirs = ids_by(engine, target, candidate, reading.text)
    except VerifyError as error:
        return _Compared(engine.name, None, findings_of(target, error))
    ours = reading.ours
    if runs(engine.name, source):
        ids = ids_by(engine, source.index.where, source, reading.text)
        ours = _Encoded(ids, ours.spans if ids == list(ours.ids) else ())
    return reading.compared(engine.name, ours, theirs, target)


def _encoded(words: Tokenizer, text: str) -> _Encoded:
    """A text by the tokenizers library. Raises CheckpointError where that cannot be done."""
    made = library(words)
    with blamed(words):
        found = made.encode(text, add_special_tokens=False)
        return _Encoded(found.ids, found.offsets)


def _difference(text: str, ours: _Encoded, theirs: Sequence[int]) -> str:
    """The first id that differs, in words; empty where none does."""
    if list(ours.ids) == list(theirs):
        return ""
    pairs = zip(ours.ids, theirs, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours.ids), len(theirs)))
    there, here = (str(ids[at]) if at < len(ids) else "missing" for ids in (theirs, ours.ids))
    counts = f" ({len(theirs)} ids, the source's {len(ours.ids)})" if len(theirs) != len(ours.ids) else ""
    return f"token {at} is {there}, the source's {here}{counts}{_place(text, ours, at)}"


def _place(text: str, ours: _Encoded, at: int) -> str:
    """Where in the text the source's token `at` stands, as far as that is known; all but ASCII is spelt out."""
    if not ours.spans:
        return ""
    start = ours.spans[at][0] if at < len(ours.spans) else len(text)
    around = text[max(0, start - _AROUND) : start + _AROUND]
    return f", at character {start}, in {around!a}"
