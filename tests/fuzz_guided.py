"""The parsers of `tests.fuzz` once more, led by coverage: libFuzzer keeps what reaches new code and goes on from there.

    pip install atheris
    python -m tests.fuzz_guided PARSER [-runs=100000] [options of libFuzzer]

It ends at the first failure, with the input in a file. `tests.fuzz` knows the formats and reaches deeper; this knows
nothing and tries what nobody thought of. Half of the inputs are those of `tests.fuzz`.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import warnings
from pathlib import Path
from random import Random

import atheris

with atheris.instrument_imports(include=["neoxconv"]):
    from tests import fuzz
    from tests.fuzz_inputs import KINDS_OF, LARGEST, make_input, seeds


def main() -> None:
    """The command line."""
    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if name not in fuzz.PARSERS:
        sys.exit(f"give a parser: {', '.join(fuzz.PARSERS)}")
    parser, folder = fuzz.PARSERS[name], Path(tempfile.mkdtemp(prefix="fuzz-"))
    finishes = [kind.mend for kind in KINDS_OF[name]() if kind.mend]

    def read(data: bytes) -> None:
        found = fuzz.verdict(parser.read, parser.put(place, data), 10 * fuzz.SECONDS)
        if found not in ("read", "refused"):
            raise RuntimeError(found)

    def mutate(data: bytes, longest: int, seed: int) -> bytes:
        rng = Random(seed)
        if rng.random() < 0.5:
            return make_input(rng, KINDS_OF[name]())[:longest]
        changed: bytes = atheris.Mutate(data, len(data) + 64)
        with contextlib.suppress(Exception):
            changed = rng.choice(finishes)(changed) if finishes else changed
        return changed[:longest]

    warnings.simplefilter("ignore")
    Path("fuzz-failures").mkdir(exist_ok=True)
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, data in enumerate(seeds(name)):
        (corpus / str(number)).write_bytes(data)
    place = folder / "input"
    place.mkdir()
    fuzz.warm_up(name, place)
    fuzz.start_watching()
    atheris.Setup(
        [sys.argv[0], f"-max_len={LARGEST}", "-artifact_prefix=fuzz-failures/", *sys.argv[1:], str(corpus)],
        read,
        custom_mutator=mutate,
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
