"""What stands beside the weights of a slim checkpoint, so that gpt-neox can train on: mp_rank files, YAML, tokenizer.

gpt-neox compares every one of an mp_rank file's `args` with its own settings, so both change together.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from neoxconv.core.model import OWN_STATE, Checkpoint
from neoxconv.core.table import ModelConfig
from neoxconv.core.tensor import LazyTensor
from neoxconv.errors import PlanError, raise_all
from neoxconv.formats.neox import folder as neox
from neoxconv.formats.pt.unpickle import Placeholder
from neoxconv.formats.tokenizer import Tokenizer
from neoxconv.formats.tokenizer.files import MERGES, SENTENCEPIECE, VOCAB
from neoxconv.targets.carried import Carried
from neoxconv.targets.recipe import Recipe

RANDOM_STATES = ("random_rng_state", "np_rng_state", "torch_rng_state", "cuda_rng_state", "rng_tracker_states")
_LOCAL_SHAPES = ("param_shapes", "param_slice_mappings")  # true of the source's degrees only
PRECISION: dict[str, dict[str, Any]] = {"F16": {"fp16": {"enabled": True}}, "BF16": {"precision": "bfloat16"}}
_TOKENIZER = "tokenizer.json"

States = dict[str, dict[str, Any]]  # by file name


@dataclass(frozen=True)
class Degrees:
    """Tensor-parallel ranks, and pipeline stages; with 0 of the latter a rank's weights lie in its mp_rank file."""

    tp: int
    pp: int

    @property
    def files(self) -> int:
        """How many mp_rank files there are: one for each rank of each stage."""
        return self.tp * max(1, self.pp)


def degrees_of(checkpoint: Checkpoint) -> Degrees:
    """The source's degrees: stages as its mp_rank files count them, else as its YAML says."""
    index = checkpoint.index
    tp = len(index.ranks)
    if index.sequential or index.states:
        return Degrees(tp, 0 if index.sequential else -(-len(index.states) // tp))
    said = index.settings.get("pipe_parallel_size")
    return Degrees(tp, said if type(said) is int and 1 <= said <= checkpoint.config.layers else 1)


def degrees_for(recipe: Recipe, before: Degrees, config: ModelConfig) -> Degrees:
    """The target's degrees. Raises PlanError where they do not divide what is split."""
    after = Degrees(recipe.tp or before.tp, before.pp if recipe.pp is None else recipe.pp)
    sizes = {
        "attention heads": config.heads,
        "heads of keys and values": config.key_heads,
        "MLP rows": config.ff,
        "vocabulary rows": config.rows,
    }
    whole = math.gcd(*sizes.values())
    fits = ", ".join(str(degree) for degree in range(1, whole + 1) if whole % degree == 0)
    problems = [
        f"--tp {after.tp}: does not divide {count} {what}; what divides all that is split: {fits}."
        for what, count in sizes.items()
        if after.tp != before.tp and count % after.tp
    ]
    if recipe.pp and recipe.pp > config.layers:
        problems.append(f"--pp {recipe.pp}: there are {config.layers} layers; give as many stages at most.")
    raise_all(PlanError, problems)
    return after


def bookkeeping(checkpoint: Checkpoint, before: Degrees, after: Degrees) -> States:
    """The mp_rank files without `module`, optimizer and random states; one for each stage and rank."""
    index = checkpoint.index
    if index.states and list(index.states) != list(range(before.files)):
        raise PlanError(
            f"{index.folder}: has mp_rank files {list(index.states)}, but ranks 0 to {before.files - 1} are "
            "needed. Download the missing ones, or move them all away to have minimal ones written."
        )
    found = list(index.states.values()) or [_minimal(checkpoint, after)] * before.files
    kept = [_stripped(state, before != after) for state in found]
    places = [
        min(stage, max(1, before.pp) - 1) * before.tp + min(rank, before.tp - 1)
        for stage in range(max(1, after.pp))
        for rank in range(after.tp)
    ]
    split = vocabulary(checkpoint.config, after.tp) if before.tp != after.tp else {}
    changed = [kept[place] if before == after else _resized(kept[place], after, split) for place in places]
    said = checkpoint.opening.settled
    return {neox.states_file(rank): _with_what_was_said(state, said) for rank, state in enumerate(changed)}


def _with_what_was_said(state: dict[str, Any], said: Mapping[str, str]) -> dict[str, Any]:
    """The bookkeeping, and what no file of gpt-neox's tells, so that it need not be said again."""
    own = state.get(OWN_STATE)
    return state | {OWN_STATE: {**(own if isinstance(own, Mapping) else {}), **said}} if said else state


def _stripped(state: Mapping[str, Any], moved: bool) -> dict[str, Any]:
    """What fine-tuning from the weights needs, plain values only; without local shapes where weights have `moved`."""
    dropped = {"module", *RANDOM_STATES, *(_LOCAL_SHAPES if moved else ())}
    kept = {key: value for key, value in state.items() if key not in dropped and _is_plain(value)}
    return kept | {"optimizer": None}


def _is_plain(value: Any) -> bool:
    """Whether a value holds neither tensors nor objects of classes that were not loaded."""
    if isinstance(value, Mapping):
        return all(_is_plain(item) for pair in value.items() for item in pair)
    if isinstance(value, list | tuple | set):
        return all(map(_is_plain, value))
    return not isinstance(value, Placeholder | LazyTensor)


def _resized(state: Mapping[str, Any], after: Degrees, split: Mapping[str, Any]) -> dict[str, Any]:
    """The bookkeeping for other degrees; `split` are the YAML's new settings, of which `args` may hold some."""
    args = state.get("args")
    known = {key: value for key, value in split.items() if isinstance(args, dict) and key in args}
    changed = {"args": {**args, **known}} if isinstance(args, dict) else {}
    return {**state, "mp_world_size": after.files, **changed}


def _minimal(checkpoint: Checkpoint, after: Degrees) -> dict[str, Any]:
    """Bookkeeping for a source that has none."""
    config = checkpoint.config
    args = {
        "num_layers": config.layers,
        "hidden_size": config.hidden,
        "num_attention_heads": config.heads,
        "max_position_embeddings": config.context,
        "padded_vocab_size": config.rows,
        "model_parallel_size": after.tp,
    }
    zeros = dict.fromkeys(("iteration", "skipped_steps", "global_steps", "global_samples"), 0)
    nothing: dict[str, Any] = {"optimizer": None, "lr_scheduler": None, "csr_tensor_module_names": set()}
    return {**nothing, **zeros, "dp_world_size": 1, "mp_world_size": after.files, "args": args}


def iteration(states: Mapping[str, Mapping[str, Any]]) -> int:
    """The training step that the bookkeeping names; 0 where it does not."""
    state = next(iter(states.values()), {})
    step = state.get("iteration", state.get("global_steps", 0))
    return step if isinstance(step, int) else 0


def vocabulary(config: ModelConfig, degree: int) -> dict[str, Any]:
    """The settings with which gpt-neox splits embedding and head by rows, and pads them to the rows that there are."""
    return {
        "model_parallel_size": degree,
        "make_vocab_size_divisible_by": config.rows // degree,
        "output_layer_parallelism": "column",
    }


def configs(checkpoint: Checkpoint, before: Degrees, after: Degrees) -> dict[str, bytes]:
    """The source's YAML files by name: as they are, or with the new degrees and a padding that gives the same rows."""
    import yaml

    index = checkpoint.index
    names = [path.name if path.suffix in (".yml", ".yaml") else f"{path.name}.yml" for path in index.configs]
    if len(set(names)) < len(names):
        raise PlanError(f"{', '.join(map(str, index.configs))}: two have one name but go to one folder; rename one.")
    files = {name: path.read_bytes() for name, path in zip(names, index.configs, strict=True)}
    if before == after:
        return files
    changes = {"pipe_parallel_size": after.pp} if before.pp != after.pp else {}
    changes |= vocabulary(checkpoint.config, after.tp) if before.tp != after.tp else {}
    result = {}
    for number, (name, data) in enumerate(files.items()):
        settings = {k: v for k, v in yaml.safe_load(data).items() if str(k).replace("-", "_") not in changes}
        result[name] = as_yaml(settings | (changes if number == 0 else {}))
    return result


def tokenizer_files(beside: Carried) -> dict[str, bytes]:
    """The files of a tokenizer that gpt-neox reads: a tokenizer.json, or GPT-2's two, or sentencepiece's one."""
    tokenizer = beside.tokenizer
    if tokenizer is None:
        return {}
    if tokenizer.data and not tokenizer.built:
        return {_TOKENIZER: tokenizer.data}
    return {name: data for name, data in tokenizer.beside.items() if name in (VOCAB, MERGES, *SENTENCEPIECE)}


def new_config(checkpoint: Checkpoint, after: Degrees, dtype: str, words: Collection[str]) -> bytes:
    """A YAML for a model that gpt-neox did not write: all that decides its function."""
    config = checkpoint.config
    settings = {
        "pipe_parallel_size": after.pp,
        **vocabulary(config, after.tp),
        **_hyperparameters(checkpoint),
        **PRECISION[dtype],
        **_tokenizer_settings(words),
    }
    return as_yaml(settings)


def _hyperparameters(checkpoint: Checkpoint) -> dict[str, Any]:
    """The settings of a family that gpt-neox trains."""
    assert checkpoint.architecture.to_neox
    return checkpoint.architecture.to_neox(checkpoint.config)


def _tokenizer_settings(words: Collection[str]) -> dict[str, str]:
    """How a YAML names the files of a tokenizer that lie beside `latest`."""
    if _TOKENIZER in words:
        return {"tokenizer_type": "HFTokenizer", "vocab_file": f"./{_TOKENIZER}"}
    if VOCAB in words:
        return {"tokenizer_type": "GPT2BPETokenizer", "vocab_file": f"./{VOCAB}", "merge_file": f"./{MERGES}"}
    return {"tokenizer_type": "SPMTokenizer", "vocab_file": f"./{next(iter(words))}"} if words else {}


def as_yaml(settings: Mapping[str, Any]) -> bytes:
    """Settings as a YAML file, in their order."""
    import yaml

    return yaml.safe_dump(dict(settings), sort_keys=False).encode()


def own_files(tokenizer: Tokenizer | None) -> dict[str, bytes]:
    """The files of a gpt-neox checkpoint's tokenizer, under their own names."""
    if tokenizer is None or tokenizer.path is None:
        return {}
    own = {tokenizer.path.name: tokenizer.data} if tokenizer.data and not tokenizer.built else {}
    return {**own, **tokenizer.beside}
