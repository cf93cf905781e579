"""A Hugging Face model folder: config.json and the weights, read with every check, and written whole or not at all.

It knows names, shapes and files, and no model class: model.py says which tensors it wants. Nothing in a folder is run:
weights are safetensors, a pickle is never opened, and Python code that config.json names is left alone.
"""

from __future__ import annotations

import contextlib
import math
import sys
import typing
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from runtime.files import read_object, write_json, write_tensors

if typing.TYPE_CHECKING:  # torch takes seconds, and whoever reads config.json alone does not need it
    import torch
    from torch import Tensor


def _size(most: int = 2**24) -> tuple:  # a slip of the pen must not fill the memory
    return f"must be a whole number from 1 to {most}", lambda value: type(value) is int and 0 < value <= most


def _only(told: str, *values: object) -> tuple:
    return told, lambda value: value in values


def _token_ids(value: object) -> bool:
    return all(type(token) is int for token in (value if isinstance(value, list) else [value]))


NUMBER = "must be a number above 0", lambda value: type(value) in (int, float) and 0 < value < 1e30
SWITCH = "must be true or false", lambda value: type(value) is bool
TOKEN = "must be a token id", lambda value: type(value) is int
ROPE = {  # Llama 3.1's way of stretching a context
    **dict.fromkeys(["rope_factor", "rope_low_freq_factor", "rope_high_freq_factor"], NUMBER),
    "rope_original_max_position_embeddings": _size(),
}
REQUIRED = dict.fromkeys(["vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"], _size())
REQUIRED["num_hidden_layers"] = _size(1024)
FIELDS = {  # the keys that model.ModelConfig has: what is said of a wrong value, and the test of a right one
    "model_type": _only("is unknown, this code reads llama and qwen2", "llama", "qwen2"),
    "rope_type": _only("is unknown, this code knows default and llama3", "default", "llama3"),
    **(REQUIRED | ROPE),
    **dict.fromkeys(["num_key_value_heads", "head_dim", "max_position_embeddings"], _size()),
    **dict.fromkeys(["rms_norm_eps", "rope_theta"], NUMBER),
    **dict.fromkeys(["tie_word_embeddings", "attention_bias", "mlp_bias"], SWITCH),
    **dict.fromkeys(["bos_token_id", "pad_token_id"], TOKEN),
    "eos_token_id": ("must be a token id or a list of them", _token_ids),
}
DEFAULTS = {  # what transformers takes where a file says nothing
    **dict.fromkeys(["tie_word_embeddings", "attention_bias", "mlp_bias"], False),
    **{"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 1e4},
}
OTHER_NETWORKS = {  # keys that would make another network of it
    "hidden_act": _only("is not implemented, Llama uses silu", "silu"),
    "quantization_config": _only("is not implemented: convert the weights to bf16, fp16 or fp32 first", {}),
    "partial_rotary_factor": _only("is not implemented: all of a head is rotated", 1),
    **dict.fromkeys(["num_local_experts", "num_experts"], _only("is not implemented: no mixture of experts", 0)),
    **dict.fromkeys(["use_sliding_window", "sliding_window"], _only("is not implemented: only full attention", False)),
    "layer_types": ("is not implemented: only full attention", lambda value: {*value} == {"full_attention"}),
    "is_causal": _only("is not implemented: no position sees a later one", True),
}


def read_config(folder: str | Path) -> dict:
    """The checked values of `folder/config.json`, under the names of model.ModelConfig; defaults are filled in.

    Raises ValueError or FileNotFoundError, naming the file and the key.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise not_found(path, "a model is a folder with config.json and model.safetensors")
    raw = {key: value for key, value in read_object(path).items() if value is not None}  # null means left out
    if "auto_map" in raw:
        print(f"warning: {path} names Python code to run (auto_map); it is not run here", file=sys.stderr)
    # transformers 5 writes rope_parameters, older versions rope_scaling beside rope_theta
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    _require(path, "rope_scaling", rope, ("must be an object", lambda value: isinstance(value, dict)))
    raw = {"model_type": None, "rope_type": "default"} | raw | {f"rope_{key}": rope[key] for key in rope} | rope
    if raw["model_type"] == "qwen2":
        raw["attention_bias"] = True
        raw.pop("sliding_window", None)  # its files carry one that use_sliding_window switches off
    for key in (*REQUIRED, *(ROPE if raw["rope_type"] == "llama3" else ())):
        _require(path, key.removeprefix("rope_"), raw.get(key), ("is missing", lambda value: value is not None))
    for key, rule in (FIELDS | OTHER_NETWORKS).items():
        if key in raw:
            _require(path, key, raw[key], rule)

    config = {key: tuple(raw[key]) if isinstance(raw[key], list) else raw[key] for key in FIELDS if key in raw}
    heads = config["num_attention_heads"]
    config = DEFAULTS | {"num_key_value_heads": heads, "head_dim": config["hidden_size"] // heads} | config
    even = "must be even and above 0: rotary positions turn pairs of features", lambda size: size and size % 2 == 0
    _require(path, "head_dim", config["head_dim"], even)
    groups = f"must divide the {heads} query heads", lambda key_heads: heads % key_heads == 0
    _require(path, "num_key_value_heads", config["num_key_value_heads"], groups)
    if raw["rope_type"] == "llama3":
        below = "must be below high_freq_factor", lambda low: low < raw["rope_high_freq_factor"]
        _require(path, "low_freq_factor", raw["rope_low_freq_factor"], below)
    return config


def not_found(path: Path, told: str) -> FileNotFoundError:
    """What is said of a file that a model's folder lacks."""
    if (path.parent / "adapter_config.json").is_file():
        told = "the folder holds an adapter: merge it into its model first"
    return FileNotFoundError(f"{path} not found: {told}")


def _require(path: Path, key: str, value: object, rule: tuple) -> None:
    told, fits = rule
    if not fits(value):
        raise ValueError(f"{path}: {key} = {value!r:.80} {told}")


def read_score_mean(folder: str | Path) -> float:
    """The mean that a saved scalar model subtracts from its scores: config.json's score_mean, 0 without one."""
    path = Path(folder) / "config.json"
    mean = read_object(path).get("score_mean", 0.0)
    _require(path, "score_mean", mean, ("must be a number", lambda x: type(x) in (int, float) and math.isfinite(x)))
    return mean


# ---- weights -------------------------------------------------------------------------------------------------------


def read_tensors(
    folder: str | Path,
    wanted: Mapping[str, torch.Size],
    optional: Mapping[str, str | None],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """The tensors of a folder by name: exactly those `wanted`, in these shapes. `optional` ones may be there too: one
    with another's name beside it must be equal to that and is left out, one with None is left out unseen.

    On the CPU and in the file's own dtype (dtype None) a tensor *is* the mapped file: read when first used, copied page
    by page when written to, and valid even if the file is then renamed or deleted.
    Raises ValueError or FileNotFoundError with one sentence naming the file and the tensor.
    """
    folder, tensors, places = Path(folder), {}, {}
    for path in _weight_files(folder):
        with _open(path) as file:  # maps the file, reads no weight yet
            for name in file.keys():
                if name in places:
                    raise ValueError(f"{path}: the tensor {name} is in {places[name]} too")
                if optional.get(name, "a tensor to keep") and not name.endswith("rotary_emb.inv_freq"):
                    tensors[name], places[name] = file.get_tensor(name), path
    for name, original in optional.items():
        if name in tensors and not _same(tensors.pop(name), tensors.get(original)):
            told = f"differs from {original}, though tie_word_embeddings is true: make it false to keep both"
            raise ValueError(f"{places[name]}: the tensor {name} {told}")
    surplus, missing = sorted(tensors.keys() - wanted), sorted(wanted.keys() - tensors)
    if "score.weight" in surplus:
        raise ValueError(f"{folder} is a scalar model (it has score.weight), but a language model is needed here")
    if "score.weight" in missing:
        raise ValueError(f"{folder}: score.weight, the scalar head, is missing; give a folder that reward.py wrote")
    if surplus or missing:
        raise ValueError(f"{folder}: config.json's network misses the tensors {missing[:3]} and has no {surplus[:3]}")
    for name, tensor in tensors.items():
        place, shape = f"{places[name]}: the tensor {name}", tuple(tensor.shape)
        if shape != wanted[name]:
            raise ValueError(f"{place} has shape {shape}, config.json asks for {tuple(wanted[name])}")
        if str(tensor.dtype) not in ("torch.bfloat16", "torch.float16", "torch.float32"):
            raise ValueError(f"{place} is {tensor.dtype}; convert the weights to bf16, fp16 or fp32 first")
        if len(shape) == 1 and not tensor.isfinite().all():  # all weights of a diverged run are NaN, norms are small
            raise ValueError(f"{place} holds NaN or infinity: the run that wrote it diverged")
    on_cpu = str(device) == "cpu"
    for name in sorted(tensors, key=lambda name: -tensors[name].numel()):  # largest first: memory is still free
        if not on_cpu or dtype not in (None, tensors[name].dtype):
            with _open(places[name]) as file:  # mapped anew: what was read of the file leaves memory with this tensor
                tensors[name] = file.get_tensor(name).to(device, dtype or tensors[name].dtype)
    return tensors


def _same(x: Tensor, y: Tensor | None) -> bool:
    return y is not None and x.shape == y.shape and bool((x == y).all())


@contextlib.contextmanager
def _open(path: Path):
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from None


def _weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or else the shards that the index names, as in transformers."""
    index, files = folder / "model.safetensors.index.json", [folder / "model.safetensors"]
    if index.is_file() and not files[0].is_file():
        places = read_object(index).get("weight_map")
        names = set(map(str, places.values())) if isinstance(places, dict) else set()
        if not names or any(Path(name).name != name or not name.endswith(".safetensors") for name in names):
            raise ValueError(f"{index}: weight_map must name the .safetensors file of this folder of every tensor")
        files = [folder / name for name in sorted(names)]
    for path in files:
        if not path.is_file():
            raise not_found(path, "a pickle (.bin, .pt) is never opened, convert it first")
    return files


def write_folder(folder: str | Path, config: dict, tensors: dict[str, Tensor]) -> None:
    """Write config.json and model.safetensors. A write cut short leaves the old weights in place."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_tensors(folder / "model.safetensors", tensors)
    write_json(folder / "config.json", config)
