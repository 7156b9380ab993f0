"""Tokenizers: files carried as they are (`files`), byte-level BPE looked into (`byte_level`), sentencepiece's
families (`pieces`: of a tokenizer.json or of its own file), GGUF's keys written (`gguf`) and read (`from_keys`).
"""

from neoxconv.formats.tokenizer.byte_level import SURROGATE, check_rows, hf_files
from neoxconv.formats.tokenizer.files import END, PADDING, Tokenizer, load, load_folder
from neoxconv.formats.tokenizer.from_keys import from_gguf
from neoxconv.formats.tokenizer.gguf import differences, gguf_keys

__all__ = [
    "END", "PADDING", "SURROGATE", "Tokenizer", "check_rows", "differences", "from_gguf", "gguf_keys", "hf_files",
    "load", "load_folder",
]  # fmt: skip
