"""GPT-NeoX: its weights, its configuration in every format's words, its forward pass."""
