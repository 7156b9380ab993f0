"""GPT-Neo: its weights, its configuration in Hugging Face's words, its forward pass, and GPT-2 in its place."""
