"""Make a folder for MLX, load it with mlx_lm if that is installed, and let it go on from a few tokens.

    python examples/to_mlx.py CHECKPOINT FOLDER [TYPE]

TYPE is 4bit, 8bit, mxfp4, ...; see `neoxconv formats`. `pip install mlx-lm`, and `mlx-cpu` where there is no Mac.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

from neoxconv import Recipe, make_plan, open_checkpoint, run


def main(source: str, folder: str, kind: str = "4bit") -> None:
    """What the folder takes on disk, and the four likeliest next tokens, one after the other."""
    plan = make_plan(open_checkpoint(source), Recipe("mlx", type=kind, group="64" if kind.endswith("bit") else None))
    target = run(plan, folder)
    print(f"{target}: {plan.total:,} bytes")
    if find_spec("mlx_lm") is None:
        print("mlx_lm is not installed: nothing is run.")
        return
    import mlx.core as mx
    from mlx_lm.utils import load_model

    model, _ = load_model(Path(target))
    tokens = [1, 2, 3, 4]
    for _ in range(4):
        tokens.append(int(model(mx.array([tokens]))[0, -1].argmax()))
    print(tokens)


if __name__ == "__main__":
    main(*sys.argv[1:])
