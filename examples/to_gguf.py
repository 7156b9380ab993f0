"""Make a GGUF file that llama.cpp runs, and tell on the way how far it is.

    python examples/to_gguf.py CHECKPOINT FILE [TYPE]

TYPE is a quantization that `neoxconv formats` lists: Q8_0 (the default), Q4_0, F16, ...
"""

import sys
import threading

from neoxconv import Recipe, make_plan, open_checkpoint, run


def main(source: str, target: str, mix: str = "Q8_0") -> None:
    """Write the file, with the part that is done on stderr."""
    plan = make_plan(open_checkpoint(source), Recipe("gguf", type=mix))
    total, done, lock = sum(step.nbytes for step in plan.steps), 0, threading.Lock()

    def progress(count: int) -> None:
        nonlocal done
        with lock:  # every worker thread calls this
            done += count
            print(f"\r{done / total:4.0%} of {total:,} bytes", end="", file=sys.stderr)

    run(plan, target, progress=progress)
    print(file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
