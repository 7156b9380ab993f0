"""What GPT-J calls its modules, as Hugging Face spells them; `{i}` stands for the layer."""

BASE = "transformer."
L = BASE + "h.{i}."
Q, K, V, DENSE = (L + f"attn.{name}_proj" for name in ("q", "k", "v", "out"))
UP, DOWN = L + "mlp.fc_in", L + "mlp.fc_out"
NORM1, NORM = L + "ln_1", BASE + "ln_f"
EMBEDDING, HEAD = BASE + "wte", "lm_head"
