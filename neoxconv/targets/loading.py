"""How each target is loaded, as its card says it."""

from __future__ import annotations

from neoxconv.targets.card import Loading


def _python(lines: str) -> str:
    return f"```python\n{lines}\n```"


def _shell(*lines: str) -> str:
    return "```\n" + "\n".join(lines) + "\n```"


def _transformers(before: str = "") -> str:
    """Lines for transformers; `before` is what is to be installed."""
    lines = _python(
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'folder = "."  # this folder, or its name on the Hub\n'
        'model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")\n'
        "tokenizer = AutoTokenizer.from_pretrained(folder)"
    )
    return f"{before}\n\n{lines}" if before else lines


HF = Loading("transformers", _transformers())
SAFETENSORS = Loading("safetensors", _shell("neoxconv inspect {file}"))
SLIM = Loading(
    "gpt-neox",
    "In gpt-neox's training configuration, beside the YAML in `configs`:\n\n"
    '```yaml\n{"load": ".", "finetune": true}\n```\n\n`load` is this folder. It holds no optimizer states.',
    ("gpt-neox",),
)
GGUF = Loading("gguf", _shell("llama-cli -m {file}", "llama-server -m {file}"), ("gguf",))
BNB = Loading("transformers", _transformers("With `bitsandbytes` and `accelerate` installed:"), ("bitsandbytes",))
FLOAT8 = Loading("transformers", _transformers("With `compressed-tensors` installed:"), ("float8",))
COMPRESSED = Loading(
    "transformers",
    _shell("vllm serve .") + "\n\n" + _transformers("Or, with `compressed-tensors` installed:"),
    ("compressed-tensors",),
)
MLX = Loading("mlx", _shell('mlx_lm.generate --model . --prompt "Once upon a time"'), ("mlx",))
CTRANSLATE2 = Loading(
    "ctranslate2",
    _python(
        "import ctranslate2, tokenizers\n\n"
        'folder = "."  # this folder\n'
        "generator = ctranslate2.Generator(folder)\n"
        'tokens = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json").encode("Once upon a time").tokens\n'
        "generator.generate_batch([tokens], max_length=50)"
    ),
    ("ctranslate2",),
)
