"""ggml's block types."""
