"""GPT-2: learned positions, serial residual; also gpt-neox's models with its default `pos_emb: learned`."""
