"""GPT-J: its weights, its configuration in Hugging Face's words, its forward pass, and GPT-NeoX in its place."""
