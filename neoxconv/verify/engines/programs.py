"""The programs by the names that --engine takes."""

from __future__ import annotations

from neoxconv.verify.engines import ctranslate2, llama_cpp, mlx, transformers, vllm
from neoxconv.verify.engines.program import Program

PROGRAMS = {
    "transformers": Program("hf", "Hugging Face folders", transformers.load, transformers.words),
    "llama.cpp": Program("gguf", "GGUF files", llama_cpp.load, llama_cpp.words),
    "ctranslate2": Program("ctranslate2", "CTranslate2 folders", ctranslate2.load, transformers.words),
    "mlx": Program("hf", "MLX's and Hugging Face folders", mlx.load, transformers.words),
    "vllm": Program("hf", "Hugging Face folders", vllm.load, transformers.words),
}
