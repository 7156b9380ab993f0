"""Make a CTranslate2 folder, load it with ctranslate2, and let it go on from a text.

    python examples/to_ctranslate2.py CHECKPOINT FOLDER

Needs ctranslate2.
"""

import sys

import ctranslate2
import numpy as np
from tokenizers import Tokenizer

from neoxconv import Recipe, make_plan, open_checkpoint, run


def main(source: str, folder: str) -> None:
    """The folder, what its model says next, and the logits of the last token."""
    plan = make_plan(open_checkpoint(source), Recipe("ctranslate2", type="INT8"))
    target = run(plan, folder)
    words = Tokenizer.from_file(str(target / "tokenizer.json"))
    prompt = words.encode("The").tokens
    generator = ctranslate2.Generator(str(target), device="cpu")
    [spoken] = generator.generate_batch([prompt], max_length=8, include_prompt_in_result=False)
    [logits] = np.asarray(generator.forward_batch([prompt]))
    print(f"{target}: {plan.total:,} bytes on disk, {spoken.sequences_ids[0]}, largest logit {logits[-1].max():.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
