"""What GPT-Neo calls its modules, as Hugging Face spells them; `{i}` stands for the layer."""

BASE = "transformer."
L = BASE + "h.{i}."
Q, K, V, DENSE = (L + f"attn.attention.{name}_proj" for name in ("q", "k", "v", "out"))
UP, DOWN = L + "mlp.c_fc", L + "mlp.c_proj"
NORM1, NORM2, NORM = L + "ln_1", L + "ln_2", BASE + "ln_f"
EMBEDDING, POSITIONS, HEAD = BASE + "wte", BASE + "wpe", "lm_head"
