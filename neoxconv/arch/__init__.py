"""Model families: a folder each, with one table of all its weights. One row each in ARCHITECTURES."""

from neoxconv.arch.gpt_neox.weights import GPT_NEOX
from neoxconv.arch.gptj.weights import GPT_J
from neoxconv.arch.llama.weights import LLAMA, MISTRAL
from neoxconv.core.model import Architecture

ARCHITECTURES: tuple[Architecture, ...] = (GPT_NEOX, LLAMA, MISTRAL, GPT_J)
