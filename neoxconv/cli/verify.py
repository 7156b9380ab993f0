"""The levels of verification that a command asks for, and their outcome for people and for machines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from neoxconv.cli.progress import progress_bar
from neoxconv.cli.source import Given, Reading, chosen, opened
from neoxconv.core.model import Checkpoint
from neoxconv.engine.manifest import read_manifest
from neoxconv.engine.memory import threads_for
from neoxconv.engine.side_file import check_side_file
from neoxconv.errors import CheckpointError, NeoxconvError, PlanError, VerifyError
from neoxconv.sources.checkpoint import open_checkpoint, read_index
from neoxconv.sources.coverage import is_partial
from neoxconv.storage import Place, watched
from neoxconv.verify.beside import verify_beside
from neoxconv.verify.bytes import Seen, sha256sums, verify_bytes
from neoxconv.verify.ids import verify_ids
from neoxconv.verify.logits.trial import Engine, Limits, Sample, Task, Trial
from neoxconv.verify.report import Report, TensorError, findings_of, together, verdicts
from neoxconv.verify.weights import verify_weights
from neoxconv.words import first_of, table

_LOGITS_ONLY = (
    "tokens", "length", "sequences", "task", "data", "device",
    "max_kl", "max_kl_p99", "min_top1", "max_ppl_ratio", "bisect", "html",
)  # fmt: skip


@dataclass(frozen=True)
class _Audit:
    """What `verify` is asked to do: the paths are the target's alone, or the source's and the target's."""

    paths: tuple[Place, ...]
    level: str  # the last that is run: bytes, tokenizer (by itself), weights or logits
    reading: Reading  # of the source
    trial: Trial  # of the logits level
    calibration: Path | None  # by which the target's codes were chosen
    jobs: int | None
    quiet: bool  # no bars

    @property
    def target(self) -> Place:
        return self.paths[-1]

    @property
    def files(self) -> tuple[Path | None, ...]:
        """What the logits level reads besides the two models."""
        task = self.trial.task
        return self.trial.sample.text, self.trial.sample.tokens, task.data if task else None


@dataclass(frozen=True)
class _Outcome:
    """What every level found; `basis` says how the source was read."""

    basis: Mapping[str, str]
    reports: tuple[Report, ...]
    error: str = ""  # why the last level could not be carried out, which is no fault of the target

    @property
    def passed(self) -> bool:
        return not self.error and all(report.passed for report in self.reports)

    @property
    def facts(self) -> dict[str, Any]:
        """The outcome as plain values."""
        levels = [
            {
                "level": report.level,
                "passed": report.passed,
                "checked": report.checked,
                "findings": [str(finding) for finding in report.findings],
                "relative_error": report.relative,
                **report.facts,
            }
            for report in self.reports
        ]
        failure = {"error": self.error, "code": 1} if self.error else {}
        return {"passed": self.passed, "levels": levels, **self.basis, **failure}

    @property
    def listing(self) -> str:
        """The outcome in lines, the last of which is the verdict."""
        lines = [table("<<", [*self.basis.items()])] if self.basis else []
        for report in self.reports:
            lines += [f"  {report.level}: {report.checked}", *findings(report), *report.lines]
            lines += [errors(report)] if report.tensors else []
        return "\n".join([*lines, self.verdict])

    @property
    def verdict(self) -> str:
        """Which levels ran, and whether they passed."""
        return f"{'PASS' if self.passed else 'FAIL'}: {verdicts(self.reports)}"


def findings(report: Report) -> list[str]:
    """What is wrong, up to twenty lines of it."""
    return first_of(report.findings)


def errors(report: Report) -> str:
    """The worst tensor of each encoding: relative and largest absolute error."""
    worst: dict[str, TensorError] = {}
    for tensor in sorted(report.tensors, key=lambda tensor: tensor.relative):
        worst[tensor.encoding] = tensor
    rows = [(name, f"{t.relative:.3g}", f"{t.largest:.3g}", t.name) for name, t in sorted(worst.items())]
    return table("<>><", [("encoding", "relative error", "largest", "in the worst tensor"), *rows])


def asked_for(paths: Sequence[Place], given: Given) -> _Audit:
    """The request that the options make. Raises UsageError where they do not go together."""
    if len(paths) > 2:
        raise click.UsageError(f"expected TARGET or SRC TARGET, found {len(paths)} paths.")
    level = given["level"] or ("weights" if len(paths) == 2 else "bytes")
    if level != "bytes" and len(paths) == 1:
        raise click.UsageError(f"--level {level} needs the source too: neoxconv verify SRC TARGET.")
    _check_logits_options(level, given)
    task = Task(given["task"], given["data"], given["sequences"]) if given["task"] else None
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
    return _Audit(tuple(paths), level, chosen(Reading, given), trial=trial, **plain)


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
    if bool(given["task"]) != bool(given["data"]):
        raise click.UsageError("--task and --data belong together; give both.")


def digests(paths: Sequence[Place], given: Given) -> Iterator[str]:
    """What `--sha256sums` prints: lines for `sha256sum -c`. Raises UsageError for options that check something."""
    if len(paths) > 1:
        raise click.UsageError(f"expected TARGET, found {len(paths)} paths.")
    _check_logits_options("bytes", given)
    if given["level"] or given["json"]:
        raise click.UsageError("--sha256sums prints digests and checks nothing; leave --level and --json out.")
    return (f"{digest}  {name}" for name, digest in sha256sums(paths[0]))


def audit(asked: _Audit) -> _Outcome:
    """The levels up to the one asked for: bytes (where the target has a manifest), then against the source."""
    if asked.trial.sample.text:
        _ = asked.trial.sample.content  # what cannot be read fails here, and not after an hour of weights
    if asked.level == "logits":
        import_module("neoxconv.verify.logits.level")  # and so does a torch that is missing
    target = asked.target
    manifest = read_manifest(target) if target.exists() else None
    if asked.level == "bytes":
        return _Outcome({}, _check_bytes(asked, manifest))
    alone = asked.level == "tokenizer"
    seen = Seen(target, manifest) if manifest and not alone else None
    norms, whence = _policy("norms", "mean", manifest, asked.reading.norms)
    weights, told = _policy("weights", "stored", manifest, asked.reading.weights)
    untold: dict[str, Any] = {
        name: getattr(asked.reading, name) or (manifest or {}).get(name) for name in ("qkv_layout", "rmsnorm")
    }
    source = opened(asked.paths[0], replace(asked.reading, norms=norms, weights=weights, **untold))
    settings = asked.reading.preset or ", ".join(path.name for path in source.index.configs) or "the source's own"
    basis = {"norms": f"{norms} ({whence})" if len(source.index.ranks) > 1 else "one rank", "configuration": settings}
    basis |= {"weights": f"{weights} ({told})"} if weights != "stored" else {}
    if asked.trial.html:
        check_side_file(asked.trial.html, (*asked.paths, *asked.files))
    reports: tuple[Report, ...] = ()
    try:
        with watched(seen):
            made = open_target(target, asked.reading.preset)
        reports += () if alone else (_check_weights(source, made, asked, foreign=manifest is None),)
        outcome = _with_tokenizer(_Outcome(basis, reports), source, made, asked)
    except CheckpointError as error:
        reports = (*_check_bytes(asked, manifest, seen), *reports) if seen else reports
        if all(report.passed for report in reports):
            raise
        return _Outcome(basis, (*reports, Report("weights", "cannot be opened", findings_of(target, error), ran=False)))
    if seen:  # at last, as the weights' reading has hashed most of it
        outcome = replace(outcome, reports=(*_check_bytes(asked, manifest, seen), *outcome.reports))
    return _with_logits(outcome, source, made, asked) if asked.level == "logits" else outcome


def _with_tokenizer(before: _Outcome, source: Checkpoint, made: Checkpoint, asked: _Audit) -> _Outcome:
    """The outcome with what lies beside the weights, and the ids of a text or why they could not be compared."""
    found, error = [*filter(None, [verify_beside(source, made)])], ""
    trial, target = asked.trial, asked.target
    try:
        if trial.sample.text:
            found.append(verify_ids(source, made, trial.sample, target=target, engine=trial.engine))
    except NeoxconvError as problem:
        error = str(problem)
        found.append(Report("tokenizer", "the text's ids could not be compared", (), ran=False))
    if asked.level == "tokenizer" and not found:
        raise PlanError(f"{target}: there is no tokenizer and no setting to compare; choose another --level.")
    return replace(before, reports=(*before.reports, *([together(found)] if found else [])), error=error)


def _with_logits(before: _Outcome, source: Checkpoint, made: Checkpoint, asked: _Audit) -> _Outcome:
    """The outcome with the last level, or with why it could not be carried out: the others' verdicts stand."""
    error = before.error
    if not error:
        try:
            return replace(before, reports=(*before.reports, _check_logits(source, made, asked, before.reports)))
        except NeoxconvError as problem:
            error = str(problem)
    undone = Report("logits", "could not be carried out", (), ran=False)
    return _Outcome(before.basis, (*before.reports, undone), error)


def _policy(name: str, default: str, manifest: Mapping[str, Any] | None, asked: str | None) -> tuple[str, str]:
    """How the target's norms were joined, or which weights it was made of, and who says so."""
    if asked:
        return asked, "as asked"
    if manifest and name in manifest:
        return str(manifest[name]), "from the manifest"
    return default, "the default"


def _check_bytes(asked: _Audit, manifest: Mapping[str, Any] | None, seen: Seen | None = None) -> tuple[Report, ...]:
    """The first level, with a bar."""
    total = sum(file["bytes"] for file in manifest["files"]) if manifest else 0
    with progress_bar(total, "bytes", asked.quiet) as progress:
        return (verify_bytes(asked.target, manifest=manifest, seen=seen, jobs=asked.jobs, progress=progress),)


def _check_weights(source: Checkpoint, made: Checkpoint, asked: _Audit, *, foreign: bool) -> Report:
    """The second level, with a bar; what has no manifest of ours may be another program's (`foreign`)."""
    total = sum(tensor.nbytes for tensor in source.tensors.values())
    with progress_bar(total, "weights", asked.quiet) as progress:
        threads = max(threads_for(checkpoint, asked.jobs) for checkpoint in (source, made))
        options: Any = {"calibration": asked.calibration, "foreign": foreign, "jobs": threads}
        return verify_weights(source, made, **options, progress=progress)


def _check_logits(source: Checkpoint, made: Checkpoint, asked: _Audit, before: Sequence[Report]) -> Report:
    """The third level, with a bar that counts layers; a page where one was asked for."""
    from neoxconv.verify.logits.level import verify_logits

    target = asked.target
    if is_partial(made.index):
        raise PlanError(
            f"{target}: holds a part of the model only (--only), which predicts nothing; leave --level out."
        )
    with progress_bar(2 * (source.config.layers + 1), "layers", asked.quiet, "layer") as progress:
        try:
            return verify_logits(source, made, asked.trial, target=target, before=before, progress=progress)
        except VerifyError as error:
            return Report("logits", "cannot be compared", findings_of(target, error), ran=False)


def open_target(target: Place, preset: str | None) -> Checkpoint:
    """The target as a checkpoint; one without settings of its own gets the source's preset."""
    if preset and read_index(target, ()).settings:
        preset = None
    return open_checkpoint(target, preset=preset, partial=True)
