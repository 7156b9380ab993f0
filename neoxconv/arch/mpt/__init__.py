"""gpt-neox's models with ALiBi, serial residual and biases: GGUF has them as MPT, Hugging Face has no such model."""
