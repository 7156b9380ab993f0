"""ZeRO-1 optimizer files: the weights' fp32 master copies, as byte ranges of what each data-parallel rank keeps.

    optimizer_state_dict
        local_sub_partitions_of_fp32_groups    group -> interval -> numbers: DeeperSpeed 0.3.15, which trained 20B
        single_partition_of_fp32_groups        group -> numbers: DeepSpeed since, for fp16 and bf16
    param_shapes                               name -> shape: here, or in newer checkpoints in the mp_rank file

A group is its parameters one after the other in the order of param_shapes, cut into intervals and each of these into a
partition for every data-parallel rank. What is left over at the end is padding, which most writers cut off:

    | interval 0: rank 0 | rank 1 | rank 2 | interval 1: rank 0 | rank 1 | rank 2 ... padding |

`files` reads each optimizer file, `flat` knows rows of numbers and ranges of them, `masters` puts parameters together.
Sources: DeeperSpeed's deepspeed/runtime/zero/stage1.py (0.3.15), DeepSpeed's zero/stage_1_and_2.py and
bf16_optimizer.py.
"""

from neoxconv.formats.neox.zero.masters import Difference, difference, with_masters

__all__ = ["Difference", "difference", "with_masters"]
