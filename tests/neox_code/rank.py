"""One rank of gpt-neox, run on a CPU by its own Python: it trains, saves and loads as its YAML says.

`python rank.py TASK.json`, with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT set. Real: the model, tensor
and pipeline parallel layers, DeepSpeed's engines, every line that saves and loads. Adapted: what asks for CUDA gets
the CPU, Adam is torch's, the data are TASK's tokens. Nothing of neoxconv is imported here.
"""

from __future__ import annotations

import json
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import numpy as np
import torch


def stub(name: str, **values: Any) -> None:
    """Put a module in the place of one that is not installed."""
    module = types.ModuleType(name)
    vars(module).update(values)
    sys.modules[name] = module


def adapt() -> None:
    """What gpt-neox asks of a GPU is answered by the CPU."""
    import packaging.version

    stub("pkg_resources", packaging=packaging)
    for name in ("wandb", "lm_dataformat", "ftfy", "tiktoken", "lm_eval", "boto3", "hf_transfer", "pandas"):
        try:
            __import__(name)
        except ImportError:
            stub(name)
    stub("apex")
    # DeepSpeed asks this of its own optimizer after loading; an optimizer without masters has nothing to refresh.
    adam: Any = torch.optim.AdamW
    adam.refresh_fp32_params = lambda self: None
    stub("apex.optimizers", FusedAdam=adam)
    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.device_count = lambda: int(os.environ["WORLD_SIZE"])
    cuda.current_device = lambda: "cpu"
    cuda.get_rng_state = lambda *given: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *given: torch.set_rng_state(state)
    cuda.LongTensor = torch.LongTensor
    for name in ("set_device", "synchronize"):
        setattr(cuda, name, lambda *given: None)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, lambda *given: 0)
    cuda.nvtx = types.SimpleNamespace(range_push=lambda *given: None, range_pop=lambda *given: None)
    untouched: Any = lambda self, *given, **named: self  # noqa: E731
    torch.Tensor.cuda = untouched
    torch.nn.Module.cuda = untouched


adapt()
from megatron import mpu, training  # noqa: E402
from megatron.data import data_utils  # noqa: E402
from megatron.neox_arguments import NeoXArgs  # noqa: E402

TASK = json.loads(Path(sys.argv[1]).read_text())
OUT = Path(sys.argv[1]).parent
TOKENS = np.load(OUT / "tokens.npy")  # [steps, micro batches, sequences, words + 1]
LOSSES: list[float] = []


def batches() -> Iterator[dict[str, torch.Tensor]]:
    """The micro batches of all steps, in turn."""
    for batch in TOKENS.reshape(-1, *TOKENS.shape[-2:]):
        yield {"text": torch.from_numpy(batch)}


def disturb(model: Any) -> None:
    """Noise on what starts as ones and zeros: N(0, 0.1), alike on all ranks where ranks hold replicas.

    Norms get N(0, norm_noise) on each rank besides, so that ranks disagree as they do after long training.
    """
    common = torch.Generator().manual_seed(7)
    own = torch.Generator().manual_seed(100 + mpu.get_model_parallel_rank())
    with torch.no_grad():
        for name, value in sorted(model.named_parameters()):
            if value.dim() == 1:
                split = getattr(value, "model_parallel", False)
                value += 0.1 * torch.randn(value.shape, generator=own if split else common)
                if "norm" in name:
                    value += TASK["norm_noise"] * torch.randn(value.shape, generator=own)


def average(model: Any) -> None:
    """Replicas of norms and row-parallel biases become their mean over the tensor-parallel ranks."""
    with torch.no_grad():
        for _, value in sorted(model.module.named_parameters()):
            if value.dim() == 1 and not getattr(value, "model_parallel", False):
                total = value.double()
                torch.distributed.all_reduce(total, group=mpu.get_model_parallel_group())
                value.copy_((total / mpu.get_model_parallel_world_size()).to(value.dtype))


def logits(model: Any, args: Any) -> torch.Tensor | None:
    """This rank's part of the vocabulary for the first step's sequences; None where the last stage is another's."""
    seen: list[torch.Tensor] = []

    def keep(output: Any) -> Any:
        seen.append((output[0] if isinstance(output, tuple) else output).detach().float().clone())
        return output

    if args.is_pipe_parallel:
        functions = model.module.forward_funcs
        if model.is_last_stage():
            last = functions[-1]
            functions[-1] = lambda *given: keep(last(*given))
        model.eval_batch(batches())
        if model.is_last_stage():
            functions[-1] = last
    else:
        model.eval()
        data = batches()
        with torch.no_grad():
            for _ in range(TOKENS.shape[1]):
                tokens, _, _, mask, positions = training.get_batch(neox_args=args, data_iterator=data)
                keep(model((tokens, positions, mask), neox_args=args))
        model.train()
    upright = [part if part.shape[0] == TOKENS.shape[2] else part.transpose(0, 1) for part in seen]
    return torch.cat(upright) if upright else None


def record(name: str, model: Any, args: Any) -> None:
    """Write `NAME-RANK.npy`, the rank's logits [sequences, words, vocabulary / ranks]."""
    found = logits(model, args)
    if found is not None:
        np.save(OUT / f"{name}-{mpu.get_model_parallel_rank():02}.npy", found.numpy())


get_model, setup, train_step = training.get_model, training.setup_model_and_optimizer, training.train_step


def disturbed_model(*given: Any, **named: Any) -> Any:
    """gpt-neox's model, fresh, with noise."""
    model = get_model(*given, **named)
    if TASK.get("norm_noise") is not None:
        disturb(model)
    return model


def recorded_setup(neox_args: Any, **named: Any) -> Any:
    """The engine as gpt-neox sets it up, checkpoint loaded; its logits are written where the task says so."""
    found = setup(neox_args=neox_args, **named)
    if TASK.get("record"):
        record("as_is", found[0], neox_args)
        average(found[0])
        record("averaged", found[0], neox_args)
    return found


def recorded_step(*given: Any, **named: Any) -> Any:
    """A step of training; its loss is kept."""
    result = train_step(*given, **named)
    LOSSES.append(float(result[0]["lm_loss"]))
    return result


def main() -> None:
    """gpt-neox's train.py, but for the data."""
    training.get_model = disturbed_model
    training.setup_model_and_optimizer = recorded_setup
    training.train_step = recorded_step
    data_utils.compile_helper = lambda: None
    training.build_train_valid_test_data_loaders = lambda neox_args: {}
    training.update_iterations = lambda **named: None
    training.shift_and_wrap_data_loaders = lambda **named: (batches(), None, None)
    training.build_train_valid_test_data_iterators = lambda neox_args: (batches(), None, None)
    args = NeoXArgs.from_ymls(TASK["ymls"], overwrite_values=TASK["overwrite"])
    args.configure_distributed_args()
    args.build_tokenizer()
    args.do_train, args.do_valid, args.do_test = 1, 0, 0
    training.pretrain(neox_args=args)
    if int(os.environ["RANK"]) == 0:
        (OUT / "losses.json").write_text(json.dumps(LOSSES))
    torch.distributed.barrier()


main()
