"""Several targets of one source in one read: `--type A,B,C`, or a file of recipes.

targets:                                    # --recipe FILE: each target by the options of `convert`
  - {to: gguf, type: "Q8_0,Q4_K_M"}
  - {to: gguf, type: IQ3_XXS, imatrix: 20B.imatrix}
  - {to: mlx, type: 4bit, name: 20B-mlx}    # its name in DST; else one that says model, size and type
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import yaml

from neoxconv.cli.convert import Request, recipe_of, requests, source_as_asked
from neoxconv.cli.progress import progress_bar
from neoxconv.cli.source import Given
from neoxconv.engine.plan import Plan, make_plan
from neoxconv.engine.together import carry_out_all, is_made
from neoxconv.errors import NeoxconvError, PlanError, escaped
from neoxconv.storage import Place
from neoxconv.targets.recipe import Recipe
from neoxconv.words import size, table

_OF_A_TARGET = ("format", *Recipe.__dataclass_fields__)  # options that a recipe may have
_OF_ALL = ("metadata", "set")  # of these, what may be said of all targets at once


def is_several(given: Given) -> bool:
    """Whether several targets are asked for."""
    return given["recipe"] is not None or len(given["type"] or ()) > 1


def prepare_several(source: Place, folder: Place, given: Given) -> _Several:
    """The plans for several targets in a folder; what the same plans made there already is left as it is.

    Raises UsageError, CheckpointError or PlanError where one of them cannot be carried out.
    """
    asked = [(name, recipe_of(each)) for name, each in _asked_for(given)]
    if folder.is_file():
        raise PlanError(f"{folder}: is a file; several targets need a folder.")
    checkpoint = source_as_asked(source, given)
    plans: dict[Place, Plan] = {}
    for name, recipe in asked:
        plan = make_plan(checkpoint, recipe)
        target = folder / (name or plan.name)
        if target in plans:
            raise PlanError(f"{target.name}: two targets have this name; give one of them a `name` in a --recipe file.")
        plans[target] = plan
    made = {target: plan for target, plan in plans.items() if not given["overwrite"] and is_made(plan, target)}
    left = {target: plan for target, plan in plans.items() if target not in made}
    return _Several(folder, plans, tuple(made), tuple(requests(source, left, given)) if left else ())


def _asked_for(given: Given) -> Iterator[tuple[str | None, Given]]:
    """The name, if it has one, and the options of every target: a type for each."""
    for name, each in _in_file(given["recipe"], given) if given["recipe"] else [(None, given)]:
        types = each["type"] or (None,)
        if name and len(types) > 1:
            raise click.UsageError(f"{given['recipe']}: {name} is the name of {len(types)} targets; give one type.")
        yield from ((name, {**each, "type": kind and (kind,)}) for kind in types)


def _in_file(path: Path, given: Given) -> Iterator[tuple[str | None, Given]]:
    """The targets of a file of recipes, read as the command line is. Raises UsageError for what it does not know."""
    if extra := [name for name in _OF_A_TARGET if name not in _OF_ALL and given[name] not in (None, ())]:
        raise click.UsageError(f"--recipe says what each target is; write {', '.join(extra)} into {path}.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        entries = [dict(entry) for entry in content["targets"]]
    except OSError as error:
        raise click.UsageError(f"{path}: cannot be read ({error.strerror}).") from error
    except (ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise click.UsageError(
            f"{path}: is no file of recipes; expected YAML such as "
            "`targets: [{to: gguf, type: Q8_0}, {to: hf, dtype: F16}]`."
        ) from error
    for number, entry in enumerate(entries, 1):
        name = entry.pop("name", None)
        try:
            options = _parsed(entry)
        except click.UsageError as error:
            raise click.UsageError(f"{path}: target {number}: {error.format_message()}") from error
        own = {option: options[option] for option in _OF_A_TARGET if option not in _OF_ALL or options[option]}
        yield name and str(name), {**given, **own}


def _parsed(entry: Mapping[str, Any]) -> Given:
    """The options of a target, by their names on the command line."""
    context = click.get_current_context()
    known = {opt: param.name for param in context.command.params for opt in param.opts}
    words = ["source", "target"]
    for key, value in entry.items():
        option = f"--{str(key).replace('_', '-')}"
        if known.get(option) not in _OF_A_TARGET:
            raise click.UsageError(f"{key} is no option of a target.")
        if isinstance(value, bool):
            words += [option] * value
        else:
            words += [word for each in (value if isinstance(value, list) else [value]) for word in (option, str(each))]
    return context.command.make_context("convert", words, parent=context.parent).params


@dataclass(frozen=True)
class _Several:
    """Conversions that are carried out together; `made` are targets that were there already."""

    folder: Place
    plans: Mapping[Place, Plan]
    made: tuple[Place, ...]
    requests: tuple[Request, ...]

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
        errors = [outcome for outcome in outcomes if isinstance(outcome, NeoxconvError)]
        if errors:
            raise type(errors[0])(*map(str, errors), f"{escaped(self.folder)}: the other targets are made.")
        seconds = time.monotonic() - begin
        for each in sorted(self.requests, key=lambda each: each.plan.total):  # the smallest gives the card its head
            each.write_card()
        told = zip(self.requests, outcomes, strict=True)
        results = [each.result(made, seconds) for each, made in told if not isinstance(made, NeoxconvError)]
        return {"made": list(map(str, self.made)), "targets": results, "seconds": round(seconds, 3)}

    def farewell(self, result: Mapping[str, Any]) -> str:
        """What was made, and what to do next."""
        told = zip(self.requests, result["targets"], strict=True)
        return "\n".join(each.farewell(made) for each, made in told) or f"{escaped(self.folder)}: all is made already."
