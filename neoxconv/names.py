"""The names that the command line offers, as plain strings: `--help` must not load the tables that they belong to."""

FORMATS = ("hf", "safetensors", "slim", "gguf", "bnb", "float8", "compressed-tensors", "mlx", "ctranslate2")
MIXES = (
    "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0",
    "IQ4_NL", "IQ4_XS", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K", "Q2_K_S",
    "IQ3_M", "IQ3_S", "IQ3_XS", "IQ3_XXS", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S",
)  # fmt: skip
TYPES = (
    "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS",
    "Q3_K", "IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S",
    "MXFP4", "NVFP4",
)  # fmt: skip
BNB_TYPES = ("NF4", "FP4", "INT8")
FLOAT8_TYPES = ("E4M3", "E5M2")
PACKED_TYPES = ("W4A16", "W8A16", "FP8_DYNAMIC")
MLX_TYPES = ("2bit", "3bit", "4bit", "5bit", "6bit", "8bit", "mxfp4", "mxfp8", "nvfp4")
CTRANSLATE2_TYPES = (
    "INT8", "INT8_FLOAT16", "INT8_BFLOAT16", "INT8_FLOAT32", "FLOAT16", "BFLOAT16", "FLOAT32",
)  # fmt: skip
TARGET_TYPES = tuple(dict.fromkeys(
    (*MIXES, *BNB_TYPES, *FLOAT8_TYPES, *PACKED_TYPES, *MLX_TYPES, *CTRANSLATE2_TYPES)
))  # of any target  # fmt: skip
SCALES = ("none", "tensor", "channel")
ENGINES = ("native", "transformers", "llama.cpp", "ctranslate2", "mlx", "vllm")  # what runs a target
GROUPS = ("32", "64", "128", "channel")  # columns that share a scale
DTYPES = ("F16", "BF16", "F32")
NORMS = ("mean", "fold", "rank0")
STAND_INS = ("gpt_neox", "gpt2")  # families that others are written as
WEIGHTS = ("stored", "master")
QKV_LAYOUTS = ("per-head", "blocks")
RMSNORMS = ("inside", "outside")
PRESETS = (
    "20B", "pythia-14m", "pythia-31m", "pythia-70m", "pythia-160m", "pythia-410m",
    "pythia-1b", "pythia-1.4b", "pythia-2.8b", "pythia-6.9b", "pythia-12b",
    "redpajama-incite-3b", "redpajama-incite-7b", "stablelm-alpha-3b", "stablelm-alpha-7b",
    "dolly-v2-3b", "dolly-v2-7b", "dolly-v2-12b", "oasst-pythia-12b",
    "polyglot-ko-1.3b", "polyglot-ko-3.8b", "polyglot-ko-5.8b", "polyglot-ko-12.8b",
    "japanese-gpt-neox-small", "japanese-gpt-neox-3.6b", "bilingual-gpt-neox-4b",
    "open-calm-small", "open-calm-medium", "open-calm-large", "open-calm-1b", "open-calm-7b",
    "polycoder-160M", "polycoder-0.4B", "polycoder-2.7B",
    "gpt-neo-125m", "gpt-neo-1.3B", "gpt-neo-2.7B", "gpt-j-6B",
)  # fmt: skip
