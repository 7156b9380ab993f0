"""How far predictions move: mean KL divergence, in nats a token, from the F16 file's, for every quantized target.

Measured on a small model that was trained with gpt-neox, 10.5 M parameters; a released one of 135 M moves 15 to 50
times as far (docs/verification.md). GGUF's mixes in llama.cpp (python -m benchmarks.divergence), bitsandbytes' types in
transformers on a CPU, float8 in float32 with the weights that its files stand for (python -m benchmarks.folders).
"""

DIVERGENCES = {
    "F16": 0.0, "BF16": 0.000004, "Q8_0": 0.000041, "Q6_K": 0.000234, "Q5_K_M": 0.000396, "Q5_K_S": 0.000454,
    "Q5_1": 0.000489, "Q5_0": 0.000602, "Q4_K_M": 0.001145, "Q4_K_S": 0.001158, "Q4_1": 0.001677, "Q4_0": 0.002052,
    "IQ4_NL": 0.001398, "IQ4_XS": 0.001383, "Q3_K_L": 0.003292, "Q3_K_M": 0.003685, "Q3_K_S": 0.005654, "Q2_K":
    0.016927,
    # By four of the sequences, with a matrix of sixteen others.
    "IQ3_M": 0.003683, "IQ3_S": 0.004873, "IQ3_XS": 0.005167, "IQ3_XXS": 0.007234, "Q2_K_S": 0.02054,
    "IQ2_M": 0.007788, "IQ2_S": 0.009131, "IQ2_XS": 0.02355, "IQ2_XXS": 0.02669, "IQ1_M": 0.03578, "IQ1_S": 0.03889,
    "INT8": 0.000058, "NF4": 0.001238, "NF4_DQ": 0.001244, "FP4": 0.002119, "FP4_DQ": 0.002121,
    "F8_E4M3": 0.000105, "E4M3_TENSOR": 0.000091, "E4M3_CHANNEL": 0.000091,
    "F8_E5M2": 0.000389, "E5M2_TENSOR": 0.000389, "E5M2_CHANNEL": 0.000389,
}  # fmt: skip

# Types that are run with quantized inputs, where only the weights are rounded: as verification runs them itself.
WEIGHTS_ALONE = {"INT8": 0.000007}
