"""Model families: one file each, with one table of all its weights; the names are those of Hugging Face and GGUF."""

from neoxconv.arch.gpt_neox.weights import GPT_NEOX
from neoxconv.core.model import Architecture

ARCHITECTURES: dict[str, Architecture] = {"gpt_neox": GPT_NEOX, "gptneox": GPT_NEOX}
