"""How far predictions move: mean KL divergence, in nats a token, from the F16 file's, for every quantized target.

Measured on a small model that was trained with gpt-neox, 10.5 M parameters; a released one of 135 M moves 15 to 50
times as far (docs/verification.md). GGUF's mixes in llama.cpp (python -m benchmarks.divergence), bitsandbytes' types
and FP8_DYNAMIC in transformers on a CPU, float8, packed numbers, MLX's and CTranslate2's in float32 with the weights
that their files stand for (python -m benchmarks.folders); W8A16, W4A16_G32_ASYM and MLX's on 8 of the 32 sequences.
"""

DIVERGENCES = {
    "F16": 0.0, "BF16": 0.000004, "Q8_0": 0.000041, "Q6_K": 0.000234, "Q5_K_M": 0.000396, "Q5_K_S": 0.000454,
    "Q5_1": 0.000489, "Q5_0": 0.000602, "Q4_K_M": 0.001145, "Q4_K_S": 0.001158, "Q4_1": 0.001677, "Q4_0": 0.002052,
    "IQ4_NL": 0.001398, "IQ4_XS": 0.001383, "Q3_K_L": 0.003292, "Q3_K_M": 0.003685, "Q3_K_S": 0.005654, "Q2_K":
    0.016927,
    # By four of the sequences, with a matrix of sixteen others; IQ1 by eight, natively.
    "IQ3_M": 0.003683, "IQ3_S": 0.004873, "IQ3_XS": 0.005167, "IQ3_XXS": 0.007234, "Q2_K_S": 0.02054,
    "IQ2_M": 0.007788, "IQ2_S": 0.009131, "IQ2_XS": 0.02355, "IQ2_XXS": 0.02669, "IQ1_M": 0.0315, "IQ1_S": 0.0314,
    "INT8": 0.000058, "NF4": 0.001238, "NF4_DQ": 0.001244, "FP4": 0.002119, "FP4_DQ": 0.002121,
    "F8_E4M3": 0.000105, "E4M3_TENSOR": 0.000091, "E4M3_CHANNEL": 0.000091,
    "F8_E5M2": 0.000389, "E5M2_TENSOR": 0.000389, "E5M2_CHANNEL": 0.000389,
    "CT2_INT8": 0.000027,
    "FP8_DYNAMIC": 0.000410,
    "W4A16_CHANNEL": 0.001987, "W4A16_G128": 0.001520, "W4A16_G64": 0.001401, "W4A16_G32": 0.001179,
    "W4A16_CHANNEL_ASYM": 0.001586, "W4A16_G128_ASYM": 0.001351, "W4A16_G64_ASYM": 0.001115,
    "W4A16_G32_ASYM": 0.000912,
    "W8A16_CHANNEL": 0.0000074, "W8A16_G128": 0.0000065, "W8A16_G64": 0.0000048, "W8A16_G32": 0.0000042,
    "W8A16_CHANNEL_ASYM": 0.0000054, "W8A16_G128_ASYM": 0.0000053, "W8A16_G64_ASYM": 0.0000042,
    "W8A16_G32_ASYM": 0.0000033,
    "MLX_2BIT_32": 0.134, "MLX_2BIT_64": 0.148, "MLX_2BIT_128": 0.160,
    "MLX_3BIT_32": 0.0195, "MLX_3BIT_64": 0.0236, "MLX_3BIT_128": 0.0274,
    "MLX_4BIT_32": 0.00402, "MLX_4BIT_64": 0.00513, "MLX_4BIT_128": 0.00590,
    "MLX_5BIT_32": 0.000902, "MLX_5BIT_64": 0.001136, "MLX_5BIT_128": 0.001290,
    "MLX_6BIT_32": 0.000236, "MLX_6BIT_64": 0.000269, "MLX_6BIT_128": 0.000358,
    "MLX_8BIT_32": 0.000017, "MLX_8BIT_64": 0.000018, "MLX_8BIT_128": 0.000023,
    "MLX_MXFP4": 0.00862, "MLX_MXFP8": 0.000572, "MLX_NVFP4": 0.00729,
}  # fmt: skip

# Types that are run with quantized inputs, where only the weights are rounded: as verification runs them itself.
WEIGHTS_ALONE = {"INT8": 0.000007, "FP8_DYNAMIC": 0.000091}
