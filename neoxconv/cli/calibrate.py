"""`neoxconv calibrate`: an importance matrix from a text, by the same streamed forward pass that verifies."""

from __future__ import annotations

from neoxconv.cli.progress import progress_bar
from neoxconv.cli.source import Given, opened
from neoxconv.engine.side_file import check_side_file, whole
from neoxconv.formats.imatrix import write
from neoxconv.storage.remote import Place
from neoxconv.verify.logits.importance import calibrate
from neoxconv.verify.logits.tokens import tokens_for


def make_matrix(source: Place, given: Given) -> str:
    """Carry the command out; returns what was made. Raises PlanError where the output may not be written."""
    output = given["output"]
    check_side_file(output, (source, given["text"], given["tokens"]), given["overwrite"])
    checkpoint = opened(source, given, given["norms"] or "mean")
    tokens, text = tokens_for(checkpoint, given["text"], given["tokens"], given["length"], given["sequences"])
    with progress_bar(checkpoint.config.layers, "layers", given["quiet"], "layer") as progress:
        sums = calibrate(checkpoint, tokens, device=given["device"], progress=progress)
    with whole(output) as partial:
        write(partial, sums, tokens, text)
    return f"{output}: importances of {len(sums)} tensors from {tokens.size} tokens of {text}"
