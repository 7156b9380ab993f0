"""Several targets of one source in one read, planned, shown and carried out together."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neoxconv.cli.convert import Request, requests, source_as_asked
from neoxconv.cli.progress import progress_bar
from neoxconv.cli.recipes import asked_for
from neoxconv.cli.source import Given
from neoxconv.engine.cards import write_card
from neoxconv.engine.plan import Plan, make_plan
from neoxconv.engine.target_place import target_of
from neoxconv.engine.together import carry_out_all, is_made
from neoxconv.errors import NeoxconvError, PlanError, VerifyError, escaped
from neoxconv.storage import Place
from neoxconv.words import size, table


def prepare_several(source: Place, folder: Place, given: Given) -> _Several:
    """The plans for several targets in a folder; what the same plans made there already is left as it is.

    Raises UsageError, CheckpointError or PlanError where one of them cannot be carried out.
    """
    asked = [*asked_for(given)]
    if folder.is_file():
        raise PlanError(f"{folder}: is a file; several targets need a folder.")
    checkpoint = source_as_asked(source, given)
    plans: dict[Place, Plan] = {}
    for name, recipe in asked:
        plan = make_plan(checkpoint, recipe)
        target = target_of(plan, folder / (name or plan.name))
        if target in plans:
            raise PlanError(f"{target.name}: two targets have this name; give one of them a `name` in a --recipe file.")
        plans[target] = plan
    made = {target: plan for target, plan in plans.items() if not given["overwrite"] and is_made(plan, target)}
    left = {target: plan for target, plan in plans.items() if target not in made}
    planned = tuple(requests(source, left, given)) if left else ()
    return _Several(folder, plans, tuple(made), planned, card=bool(given["card"]))


@dataclass(frozen=True)
class _Several:
    """Conversions that are carried out together; `made` are targets that were there already."""

    folder: Place
    plans: Mapping[Place, Plan]
    made: tuple[Place, ...]
    requests: tuple[Request, ...]
    card: bool = False  # to be written beside single files

    @property
    def facts(self) -> dict[str, Any]:
        """The whole plan as plain values."""
        targets = [{"target": str(each.target), **each.facts} for each in self.requests]
        return {"made": list(map(str, self.made)), "targets": targets}

    @property
    def summary(self) -> str:
        """What is read, what each target holds, and what is worth telling of it."""
        names = {id(each.plan): each.tensors for each in self.requests}
        targets: list[tuple[str, ...]] = [
            (target.name, f"{plan.total:,}", names.get(id(plan), "is made already"))
            for target, plan in self.plans.items()
        ]
        parts: list[tuple[str, list[tuple[str, ...]]]] = [("<<", self._head), ("<><", targets), ("<<", self._notes)]
        return "\n\n".join(table(how, rows) for how, rows in parts if rows)

    @property
    def _head(self) -> list[tuple[str, ...]]:
        """What holds for all of them."""
        total = sum(plan.total for plan in self.plans.values())
        rows: list[tuple[str, ...]] = [
            ("targets", f"{len(self.plans)} in {self.folder}, {total:,} bytes ({size(total)}); the source is read once")
        ]
        if self.requests:
            rows = [*self.requests[0].about_source, *rows, ("memory", self.requests[0].memory)]
        return rows

    @property
    def _notes(self) -> list[tuple[str, ...]]:
        """Each note once: of all targets, or under the names of those that it is about."""
        about: dict[str, list[str]] = {}
        for each in self.requests:
            for note in each.notes:
                about.setdefault(note, []).append(each.target.name)
        everywhere = len(self.requests)
        return [
            ("note", note if len(names) == everywhere else f"{', '.join(names)}: {note}")
            for note, names in about.items()
        ]

    @property
    def listing(self) -> str:
        """The summary, and the disk."""
        if not self.requests:
            return self.summary
        needed = sum(each.plan.total for each in self.requests)
        return f"{self.summary}\n\n  disk     {needed:,} bytes needed, {self.requests[0].free:,} free"

    def run(self, quiet: bool) -> dict[str, Any]:
        """Carry the requests out; what came of each, as plain values. Raises what stopped one of them at last."""
        begin = time.monotonic()
        total = sum(step.nbytes for each in self.requests for step in each.plan.steps)
        with progress_bar(total, "converting", quiet) as progress:
            try:
                outcomes = carry_out_all([each.conversion for each in self.requests], progress)
            except KeyboardInterrupt as stop:
                raise type(stop)(f"{self.folder}: not finished; run the same command again to continue.") from stop
        seconds = time.monotonic() - begin
        told = [*zip(self.requests, outcomes, strict=True)]
        done = [(each, made) for each, made in told if not isinstance(made, NeoxconvError)]
        self._write_cards([*self.made, *(each.target for each, _ in done)])
        _refuse([made for _, made in told if isinstance(made, NeoxconvError)], self.folder if done else None)
        results = [each.result(made, seconds) for each, made in done]
        return {"made": list(map(str, self.made)), "targets": results, "seconds": round(seconds, 3)}

    def _write_cards(self, targets: Sequence[Place]) -> None:
        """The card beside single files, where it was asked for: of all of them, with its head from the smallest."""
        files = [target for target in targets if self.card and self.plans[target].single]
        for folder in dict.fromkeys(target.parent for target in files):
            inside = [target for target in files if target.parent == folder]
            smallest = min(inside, key=lambda target: self.plans[target].total)
            write_card(Path(str(smallest)), self.plans[smallest].card)

    def farewell(self, result: Mapping[str, Any]) -> str:
        """What was made, and what to do next."""
        told = zip(self.requests, result["targets"], strict=True)
        return "\n".join(each.farewell(made) for each, made in told) or f"{escaped(self.folder)}: all is made already."


def _refuse(errors: Sequence[NeoxconvError], made_in: Place | None) -> None:
    """Raise what stopped targets, as VerifyError where a weight of one is wrong; others are made in that folder."""
    if not errors:
        return
    kind = next((type(error) for error in errors if isinstance(error, VerifyError)), type(errors[0]))
    others = [f"{escaped(made_in)}: the other targets are made."] if made_in else []
    raise kind(*map(str, errors), *others)
