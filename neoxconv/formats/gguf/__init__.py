"""GGUF: `read` indexes a file, `write` lays one out."""
