"""The hyperparameters of a tiny Llama, for tests of what is computed from them."""

from neoxconv.core.table import ModelConfig

CONFIG = ModelConfig(
    layers=1, hidden=32, heads=4, kv_heads=2, ff=44, rows=64, context=16, rotary_pct=1.0, rotary_base=1e4,
    norm="rmsnorm", norm_eps=1e-5, parallel_residual=False, activation="silu", tied=False,
)  # fmt: skip
