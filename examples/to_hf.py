"""Make a Hugging Face folder of a gpt-neox checkpoint, the ranks' norms merged without changing the function.

    python examples/to_hf.py CHECKPOINT FOLDER

CHECKPOINT is the folder that holds `latest`, or a global_stepN in it. Interrupted, the same command continues.
"""

import sys

from neoxconv import Recipe, make_plan, open_checkpoint, run


def main(source: str, target: str) -> None:
    """Plan, say what will be written, write it."""
    plan = make_plan(open_checkpoint(source, norms="fold"), Recipe("hf", dtype="F16"))
    print(f"{target}: {plan.total:,} bytes in {len(plan.sizes)} files")
    for note in plan.notes:
        print(f"note: {note}")
    run(plan, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
