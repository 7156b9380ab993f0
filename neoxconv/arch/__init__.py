"""Model families: a folder each, with one table of all its weights. One row each in ARCHITECTURES."""

from neoxconv.arch.gpt2.weights import GPT2
from neoxconv.arch.gpt_neo.weights import GPT_NEO
from neoxconv.arch.gpt_neox.weights import GPT_NEOX
from neoxconv.arch.gptj.weights import GPT_J
from neoxconv.arch.llama.weights import LLAMA, MISTRAL
from neoxconv.arch.mpt.weights import MPT
from neoxconv.core.model import Architecture

ARCHITECTURES: tuple[Architecture, ...] = (GPT_NEOX, LLAMA, MISTRAL, GPT2, GPT_NEO, GPT_J, MPT)
