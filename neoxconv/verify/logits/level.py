"""`verify --level logits`: the comparison of targets with their source, and its verdicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from neoxconv.core.model import Checkpoint
from neoxconv.dtypes import Numbers
from neoxconv.engine.side_file import whole
from neoxconv.errors import NeoxconvError, PlanError
from neoxconv.sources.coverage import is_partial
from neoxconv.targets.stand_in import as_the_targets
from neoxconv.verify.engines.child import program
from neoxconv.verify.logits.bisect import bisect
from neoxconv.verify.logits.compare import Logits, Predictions, check_sizes, compare_all
from neoxconv.verify.logits.limits import Limit, judged, type_of
from neoxconv.verify.logits.outcome import Outcome
from neoxconv.verify.logits.tokens import speller, tokens_for
from neoxconv.verify.logits.trial import Engine, Sample, Trial
from neoxconv.verify.page.facts import page_facts
from neoxconv.verify.page.page import page
from neoxconv.verify.report import Finding, Report, layer_name
from neoxconv.verify.subject import Subject
from neoxconv.verify.tasks.exam import Exam, examine


def verify_logits(
    subjects: Sequence[Subject],
    trial: Trial,
    *,
    left_out: Sequence[str] = (),
    progress: Callable[[int], None] = lambda count: None,
) -> list[Report | NeoxconvError]:
    """For each target of one source the report of the third level, or why there is none.

    The source is run once for all of them, and so is a task that it answers. The page also says which targets were
    `left_out`, and why. `progress` is told of every layer of a side, and of the heads. Raises PlanError or
    CheckpointError where the trial cannot be done with any target.
    """
    subjects[0].source.refuse_doubts()
    _check_alike(subjects)
    source = _as_short(subjects)
    tokens, text = tokens_for(_within_windows(source, subjects, trial.sample), trial.sample)
    for each in subjects:
        _check_window(tokens.shape[1], each, trial.sample)
    ready: list[tuple[Subject, Logits | None]] = []
    found: dict[int, Report | NeoxconvError] = {}
    for at, each in enumerate(subjects):
        try:
            ready.append((each, _ready(source, each, trial.engine, tokens)))
        except NeoxconvError as error:
            found[at] = error
    outcomes = _outcomes(source, ready, tokens, trial, progress) if ready else []
    told = iter([outcome.report(text) for outcome in outcomes])
    if trial.html:
        facts = page_facts(subjects, outcomes, found, text=text, spell=speller(source), left_out=left_out)
        with whole(trial.html) as partial:
            partial.write_text(page(facts), "utf-8")
    return [found[at] if at in found else next(told) for at in range(len(subjects))]


def _check_alike(subjects: Sequence[Subject]) -> None:
    """Raise PlanError where the targets say that their sources were read differently: one run cannot serve both."""
    usual = subjects[0].source.unusual
    for each in subjects:
        if each.source.unusual != usual:
            raise PlanError(
                f"{each.target}: was made with {each.source.unusual or 'the usual weights'} of the source, "
                f"{subjects[0].target} with {usual or 'the usual ones'}; verify them one by one."
            )


def _ready(source: Checkpoint, subject: Subject, engine: Engine, tokens: Numbers) -> Logits | None:
    """Another engine's logits of a target; None for the native engine, which makes them layer by layer.

    Raises NeoxconvError where the target cannot be compared, or the engine dies.
    """
    if is_partial(subject.candidate.index):
        raise PlanError(
            f"{subject.target}: holds a part of the model only (--only), which predicts nothing; leave --level out."
        )
    check_sizes(source, subject.candidate)
    if engine.native:
        return None
    with program(engine, subject.target, subject.candidate) as ask:
        return ask(tokens)


def _outcomes(
    source: Checkpoint,
    ready: Sequence[tuple[Subject, Logits | None]],
    tokens: Numbers,
    trial: Trial,
    progress: Callable[[int], None],
) -> list[Outcome]:
    """What comes of the targets that can be compared."""
    subjects, logits = zip(*ready, strict=True)
    engine, device = trial.engine, trial.device
    given = [each for each in logits if each]
    models = [each.candidate for each in subjects]
    compared = compare_all(source, models, tokens, device=device, progress=progress, engine=engine.name, logits=given)
    exams: Sequence[Exam | None] = [None] * len(subjects)
    if trial.task:
        exams = examine(source, [(s.target, s.candidate) for s in subjects], trial.task, engine=engine, device=device)
    return [_outcome(*each, trial) for each in zip(subjects, compared, exams, strict=True)]


def _outcome(subject: Subject, predictions: Predictions, exam: Exam | None, trial: Trial) -> Outcome:
    """A target's figures held against its limits; what is wrong is looked for where that was asked."""
    source, candidate = subject.source, subject.candidate
    limits = judged(predictions, source, candidate, trial.limits)
    findings = _found_wrong(predictions, limits, subject)
    if trial.bisect and findings and trial.engine.native:
        aligned = as_the_targets(source, candidate)
        suspect = bisect(aligned, candidate, predictions.broken, predictions.tokens, device=trial.device)
        findings.append(Finding("bisect", str(suspect)))
    return Outcome(subject, predictions, tuple(limits), tuple(findings), type_of(candidate), exam)


def _as_short(subjects: Sequence[Subject]) -> Checkpoint:
    """The source with the targets' context where that is shorter: a family that stands in may have room for less."""
    source = subjects[0].source
    context = min(source.config.context, *(each.candidate.config.context for each in subjects))
    return replace(source, config=replace(source.config, context=context))


def _common(subject: Subject) -> int | None:
    """Tokens in a row up to which the two are one function, though one of them has another window; None for all."""
    windows = subject.source.config.window, subject.candidate.config.window
    return None if windows[0] == windows[1] else min(filter(None, windows))


def _within_windows(source: Checkpoint, subjects: Sequence[Subject], sample: Sample) -> Checkpoint:
    """The source with no more context than all have in common, where sequences are cut from a text."""
    common = [] if sample.tokens else [most for each in subjects if (most := _common(each))]
    return replace(source, config=replace(source.config, context=min([source.config.context, *common])))


def _check_window(length: int, subject: Subject, sample: Sample) -> None:
    """Raise PlanError where token ids in longer rows were given."""
    most = _common(subject)
    if most is not None and length > most:
        raise PlanError(
            f"{sample.tokens}: has rows of {length} tokens; source and target have another window, so that they are "
            f"equal up to {most} tokens only. Give rows of at most {most}."
        )


def _found_wrong(predictions: Predictions, limits: Sequence[Limit], subject: Subject) -> list[Finding]:
    """The limits that do not hold; if any, first of all where it begins, as far as that stands out."""
    findings = [Finding(str(subject.target), str(limit)) for limit in limits if not limit.passed]
    if not findings or predictions.broken is None:
        return findings
    begin = Finding(layer_name(predictions.broken), "is the first whose output differs clearly more than the others'")
    return [begin, *findings]
