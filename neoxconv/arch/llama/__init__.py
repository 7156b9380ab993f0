"""Llama and Mistral, as gpt-neox trains them: weights, configuration in every format's words, forward pass."""
