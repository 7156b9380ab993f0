"""`verify`: the levels that a command asks for, for one target or several."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from neoxconv.cli.progress import progress_bar
from neoxconv.cli.source import Given, Reading, chosen, opened
from neoxconv.cli.verdicts import Outcome, Outcomes
from neoxconv.core.model import Checkpoint
from neoxconv.engine.manifest import read_manifest
from neoxconv.engine.memory import threads_for
from neoxconv.engine.side_file import check_side_file
from neoxconv.errors import CheckpointError, NeoxconvError, PlanError, VerifyError
from neoxconv.sources.checkpoint import open_checkpoint, read_index
from neoxconv.storage import Place, watched
from neoxconv.verify.beside import verify_beside
from neoxconv.verify.bytes import Seen, sha256sums, verify_bytes
from neoxconv.verify.ids import verify_ids
from neoxconv.verify.logits.trial import Engine, Limits, Sample, Task, Trial
from neoxconv.verify.report import Report, findings_of, together
from neoxconv.verify.subject import Subject
from neoxconv.verify.weights import verify_weights

_LOGITS_ONLY = (
    "tokens", "length", "sequences", "task", "data", "shots", "shots_data", "device",
    "max_kl", "max_kl_p99", "min_top1", "max_ppl_ratio", "bisect", "html",
)  # fmt: skip
_UNTOLD = ("qkv_layout", "rmsnorm")  # how to read a source that does not say it


@dataclass(frozen=True)
class _Audit:
    """What `verify` is asked to do with targets, and the source that they were made from unless they stand alone."""

    source: Place | None
    targets: tuple[Place, ...]
    level: str  # the last that is run: bytes, tokenizer (by itself), weights or logits
    reading: Reading  # of the source
    trial: Trial  # of the logits level
    calibration: Path | None  # by which the targets' codes were chosen
    jobs: int | None
    quiet: bool  # no bars

    @property
    def read(self) -> tuple[Place | None, ...]:
        """What is read: the models, and what the logits level takes besides them."""
        sample, task = self.trial.sample, self.trial.task
        of_task = (task.data, task.shots_data) if task else ()
        return self.source, *self.targets, sample.text, sample.tokens, *of_task


def asked_for(paths: Sequence[Place], given: Given) -> _Audit:
    """The request that the options make. Raises UsageError where they do not go together."""
    source, targets = (paths[0], tuple(paths[1:])) if len(paths) > 1 else (None, tuple(paths))
    level = given["level"] or ("weights" if source else "bytes")
    if level != "bytes" and source is None:
        raise click.UsageError(f"--level {level} needs the source too: neoxconv verify SRC TARGET.")
    _check_logits_options(level, given)
    _check_task_options(given)
    shots = given["shots"] or 0, given["shots_data"]
    task = Task(given["task"], given["data"], given["sequences"], *shots) if given["task"] else None
    trial = Trial(
        sample=chosen(Sample, given),
        limits=chosen(Limits, given),
        engine=Engine(given["engine"], given["engine_python"]),
        device=given["device"] or "cpu",
        bisect=given["bisect"],
        task=task,
        html=given["html"],
    )
    quiet = given["json"] or given["quiet"]
    plain = {"calibration": given["calibration"], "jobs": given["jobs"], "quiet": quiet}
    if len(set(targets)) < len(targets):
        raise click.UsageError("a TARGET is given twice; give each once.")
    return _Audit(source, targets, level, reading=chosen(Reading, given), trial=trial, **plain)


def _check_logits_options(level: str, given: Given) -> None:
    """Raise UsageError for options of the logits level where another is run, and for two sources of tokens."""
    idle = [name for name in _LOGITS_ONLY if given[name] not in (None, False)]
    if level != "logits" and idle:
        raise click.UsageError(f"--{idle[0].replace('_', '-')} is for --level logits.")
    if level == "bytes" and given["text"]:
        raise click.UsageError(
            "--text compares TARGET with SRC, which --level bytes does not: give both, leave it out."
        )
    if level != "logits" and given["engine"] != "native" and not given["text"]:
        raise click.UsageError("--engine is for --level logits, or for the ids of a text (--text).")
    if given["engine_python"] and given["engine"] == "native":
        raise click.UsageError("--engine-python is where a program runs; name one with --engine.")
    if given["text"] and given["tokens"]:
        raise click.UsageError("--text and --tokens exclude each other; give one of them.")
    if given["bisect"] and given["engine"] != "native":
        raise click.UsageError("--bisect needs the native engine, which sees the layers; leave --engine out.")


def _check_task_options(given: Given) -> None:
    """Raise UsageError where options of a task are given without their companions."""
    if bool(given["task"]) != bool(given["data"]):
        raise click.UsageError("--task and --data belong together; give both.")
    if bool(given["shots"]) != bool(given["shots_data"]) or (given["shots"] and not given["task"]):
        raise click.UsageError("--shots and --shots-data belong together, and to a --task; give all of them.")


def digests(paths: Sequence[Place], given: Given) -> Iterator[str]:
    """What `--sha256sums` prints: lines for `sha256sum -c`. Raises UsageError for options that check something."""
    if len(paths) > 1:
        raise click.UsageError(f"expected TARGET, found {len(paths)} paths.")
    _check_logits_options("bytes", given)
    if given["level"] or given["json"]:
        raise click.UsageError("--sha256sums prints digests and checks nothing; leave --level and --json out.")
    return (f"{digest}  {name}" for name, digest in sha256sums(paths[0]))


def audit(asked: _Audit) -> Outcomes:
    """The levels up to the one asked for, for each target: bytes (where it has a manifest), then against the source."""
    if asked.trial.sample.text:
        _ = asked.trial.sample.content  # what cannot be read fails here, and not after an hour of weights
    if asked.level == "logits":
        import_module("neoxconv.verify.logits.level")  # and so does a torch that is missing
    if asked.trial.html:
        check_side_file(asked.trial.html, asked.read)
    earlier = [_tried(asked, target) for target in asked.targets]
    if asked.level != "logits":
        return Outcomes(tuple(outcome for outcome, _ in earlier))
    return Outcomes(tuple(_with_logits(earlier, asked)))


def _tried(asked: _Audit, target: Place) -> tuple[Outcome, Subject | None]:
    """The levels before the logits of a target; one of several that cannot be checked leaves the others theirs."""
    try:
        return _earlier(asked, target)
    except NeoxconvError as problem:
        if len(asked.targets) == 1:
            raise
        return Outcome(target, error=str(problem)), None


def _earlier(asked: _Audit, target: Place) -> tuple[Outcome, Subject | None]:
    """What the levels before the logits found of a target, and the target beside its source if it could be opened."""
    manifest = read_manifest(target) if target.exists() else None
    if asked.source is None or asked.level == "bytes":
        return Outcome(target, {}, _check_bytes(asked, target, manifest)), None
    alone = asked.level == "tokenizer"
    seen = Seen(target, manifest) if manifest and not alone else None
    source, basis = _opened(asked.source, asked.reading, manifest)
    reports: tuple[Report, ...] = ()
    try:
        with watched(seen):
            made = open_target(target, asked.reading.preset)
        reports += () if alone else (_check_weights(source, made, asked, foreign=manifest is None),)
        outcome = _with_tokenizer(Outcome(target, basis, reports, model=made), source, made, asked)
    except CheckpointError as error:
        reports = (*_check_bytes(asked, target, manifest, seen), *reports) if seen else reports
        if all(report.passed for report in reports):
            raise
        undone = Report("weights", "cannot be opened", findings_of(target, error), ran=False)
        return Outcome(target, basis, (*reports, undone)), None
    if seen:  # at last, as the weights' reading has hashed most of it
        outcome = replace(outcome, reports=(*_check_bytes(asked, target, manifest, seen), *outcome.reports))
    return outcome, Subject(source, made, target, manifest=manifest, before=outcome.reports, basis=basis)


def _opened(place: Place, how: Reading, manifest: Mapping[str, Any] | None) -> tuple[Checkpoint, dict[str, str]]:
    """The source as a target's manifest says that it was read, unless options say otherwise, and how that is."""
    norms, whence = _policy("norms", "mean", manifest, how.norms)
    weights, told = _policy("weights", "stored", manifest, how.weights)
    untold: dict[str, Any] = {name: getattr(how, name) or (manifest or {}).get(name) for name in _UNTOLD}
    source = opened(place, replace(how, norms=norms, weights=weights, **untold))
    settings = how.preset or ", ".join(path.name for path in source.index.configs) or "the source's own"
    basis = {"norms": f"{norms} ({whence})" if len(source.index.ranks) > 1 else "one rank", "configuration": settings}
    return source, basis | ({"weights": f"{weights} ({told})"} if weights != "stored" else {})


def _with_tokenizer(before: Outcome, source: Checkpoint, made: Checkpoint, asked: _Audit) -> Outcome:
    """The outcome with what lies beside the weights, and the ids of a text or why they could not be compared."""
    found, error = [*filter(None, [verify_beside(source, made)])], ""
    trial, target = asked.trial, before.target
    try:
        if trial.sample.text:
            found.append(verify_ids(source, made, trial.sample, target=target, engine=trial.engine))
    except NeoxconvError as problem:
        error = str(problem)
        found.append(Report("tokenizer", "the text's ids could not be compared", (), ran=False))
    if asked.level == "tokenizer" and not found:
        raise PlanError(f"{target}: there is no tokenizer and no setting to compare; choose another --level.")
    return replace(before, reports=(*before.reports, *([together(found)] if found else [])), error=error)


def _with_logits(earlier: Sequence[tuple[Outcome, Subject | None]], asked: _Audit) -> list[Outcome]:
    """The outcomes with the last level, or with why it could not be carried out: the others' verdicts stand."""
    subjects = [subject for outcome, subject in earlier if subject and not outcome.error]
    left_out = [f"{outcome.target}: {outcome.verdict}" for outcome, subject in earlier if not subject or outcome.error]
    found = iter(_check_logits(subjects, asked, left_out) if subjects else [])
    return [
        _concluded(outcome, next(found)) if subject and not outcome.error else _undone(outcome, outcome.error)
        for outcome, subject in earlier
    ]


def _concluded(before: Outcome, found: Report | NeoxconvError) -> Outcome:
    """The outcome with the last level's report, or with why there is none."""
    if isinstance(found, VerifyError):
        found = Report("logits", "cannot be compared", findings_of(before.target, found), ran=False)
    if isinstance(found, NeoxconvError):
        return _undone(before, str(found))
    return replace(before, reports=(*before.reports, found))


def _undone(before: Outcome, error: str) -> Outcome:
    """The outcome without the last level; no error where an earlier one found that the target cannot be opened."""
    if not error and not before.passed:
        return before
    undone = Report("logits", "could not be carried out", (), ran=False)
    return replace(before, reports=(*before.reports, undone), error=error)


def _check_logits(
    subjects: Sequence[Subject], asked: _Audit, left_out: Sequence[str]
) -> Sequence[Report | NeoxconvError]:
    """The third level, with a bar that counts layers; a page where one was asked for."""
    from neoxconv.verify.logits.level import verify_logits

    sides = 1 + (len(subjects) if asked.trial.engine.native else 0)
    layers = subjects[0].source.config.layers + 1
    with progress_bar(sides * layers, "layers", asked.quiet, "layer") as progress:
        try:
            return verify_logits(subjects, asked.trial, left_out=left_out, progress=progress)
        except NeoxconvError as error:
            return [error] * len(subjects)


def _policy(name: str, default: str, manifest: Mapping[str, Any] | None, asked: str | None) -> tuple[str, str]:
    """How the target's norms were joined, or which weights it was made of, and who says so."""
    if asked:
        return asked, "as asked"
    if manifest and name in manifest:
        return str(manifest[name]), "from the manifest"
    return default, "the default"


def _check_bytes(
    asked: _Audit, target: Place, manifest: Mapping[str, Any] | None, seen: Seen | None = None
) -> tuple[Report, ...]:
    """The first level, with a bar."""
    total = sum(file["bytes"] for file in manifest["files"]) if manifest else 0
    with progress_bar(total, "bytes", asked.quiet) as progress:
        return (verify_bytes(target, manifest=manifest, seen=seen, jobs=asked.jobs, progress=progress),)


def _check_weights(source: Checkpoint, made: Checkpoint, asked: _Audit, *, foreign: bool) -> Report:
    """The second level, with a bar; what has no manifest of ours may be another program's (`foreign`)."""
    total = sum(tensor.nbytes for tensor in source.tensors.values())
    with progress_bar(total, "weights", asked.quiet) as progress:
        threads = max(threads_for(checkpoint, asked.jobs) for checkpoint in (source, made))
        options: Any = {"calibration": asked.calibration, "foreign": foreign, "jobs": threads}
        return verify_weights(source, made, **options, progress=progress)


def open_target(target: Place, preset: str | None) -> Checkpoint:
    """The target as a checkpoint; one without settings of its own gets the source's preset."""
    if preset and read_index(target, ()).settings:
        preset = None
    return open_checkpoint(target, preset=preset, partial=True)
