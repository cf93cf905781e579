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

from runtime.files import read_object, replacing, write_json

if typing.TYPE_CHECKING:  # torch takes seconds, and whoever reads config.json alone does not need it
    import torch
    from torch import Tensor

# ---- config.json ---------------------------------------------------------------------------------------------------

UNSUPPORTED = {  # keys of config.json that make another network, the value that does not, and what is wrong otherwise
    "hidden_act": ("silu", "Llama uses silu"),
    "quantization_config": ({}, "convert the weights to bf16, fp16 or fp32 first"),
    "partial_rotary_factor": (1, "all of a head is rotated here"),
    "num_local_experts": (0, "a mixture of experts is not implemented"),
    "num_experts": (0, "a mixture of experts is not implemented"),
    "use_sliding_window": (False, "only full attention is implemented"),
}
REQUIRED = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
ROPE = ["rope_factor", "rope_low_freq_factor", "rope_high_freq_factor", "rope_original_max_position_embeddings"]
SWITCHES = ["tie_word_embeddings", "attention_bias", "mlp_bias"]
KINDS = {  # every key that is read, and what it must be
    **dict.fromkeys([*REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings", ROPE[-1]], "size"),
    **dict.fromkeys(["rms_norm_eps", "rope_theta", *ROPE[:-1]], "number"),
    **dict.fromkeys(SWITCHES, "switch"),
    **dict.fromkeys(["bos_token_id", "eos_token_id", "pad_token_id"], "token"),
    **dict.fromkeys(["model_type", "rope_type"], "name"),
}
# what transformers takes where a file says nothing
DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 1e4} | dict.fromkeys(SWITCHES, False)


def read_config(folder: str | Path) -> dict:
    """The checked values of `folder/config.json`, under the names of model.ModelConfig; defaults are filled in.

    Raises ValueError or FileNotFoundError, naming the file and the key.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: a model is a folder with config.json and model.safetensors")
    raw = {key: value for key, value in read_object(path).items() if value is not None}  # null means left out
    if "auto_map" in raw:
        print(f"warning: {path} names Python code to run (auto_map); it is not run here", file=sys.stderr)
    try:
        return _config(_supported(raw))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _refuse(key: str, value: object, supported: str) -> None:
    raise ValueError(f"{key} = {value!r:.80} is not supported; {supported}")


def _supported(raw: dict) -> dict:
    """The same with the keys of RoPE's own object at the top, as rope_*; ValueError if it is another network."""
    model_type = raw.get("model_type")
    if model_type not in ("llama", "qwen2"):
        _refuse("model_type", model_type, "this code reads llama and qwen2")
    # transformers 5 writes rope_parameters, older versions rope_scaling beside rope_theta
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        _refuse("rope_scaling", rope, "it must be an object")
    for key, (harmless, supported) in UNSUPPORTED.items():
        value = (raw | rope).get(key, harmless)
        if value != harmless:
            _refuse(key, value, supported)
    if model_type == "llama" and "sliding_window" in raw:  # qwen2 files carry one that is switched off
        _refuse("sliding_window", raw["sliding_window"], "only full attention is implemented")
    raw = {"rope_type": "default"} | raw
    raw |= {key if key.startswith("rope_") else f"rope_{key}": value for key, value in rope.items()}
    if raw["rope_type"] not in ("default", "llama3"):
        _refuse("rope_scaling type", raw["rope_type"], "only 'default' and 'llama3' are")
    return raw | ({"attention_bias": True} if model_type == "qwen2" else {})


def _config(raw: dict) -> dict:
    """The values that are read, checked one by one and against each other, with the defaults."""
    for key in REQUIRED + ROPE * (raw["rope_type"] == "llama3"):
        if key not in raw:
            raise ValueError(f"the key {key.removeprefix('rope_')!r} is missing")
    given = {key: _checked(key, kind, raw[key]) for key, kind in KINDS.items() if key in raw}
    heads = given["num_attention_heads"]
    config = DEFAULTS | {"num_key_value_heads": heads, "head_dim": given["hidden_size"] // heads} | given
    if heads % config["num_key_value_heads"]:
        _refuse("num_key_value_heads", config["num_key_value_heads"], f"it must divide the {heads} query heads")
    if config["head_dim"] % 2 or not config["head_dim"]:
        _refuse("head_dim", config["head_dim"], "rotary positions turn pairs of features")
    if raw["rope_type"] == "llama3" and config["rope_low_freq_factor"] >= config["rope_high_freq_factor"]:
        _refuse("low_freq_factor", config["rope_low_freq_factor"], "it must be below high_freq_factor")
    return config


def _checked(key: str, kind: str, value: object) -> object:
    """The value, if it is of its kind; a list of token ids becomes a tuple."""
    most = 1024 if key == "num_hidden_layers" else 2**24  # a slip of the pen must not fill the memory
    if kind == "size" and not (type(value) is int and 0 < value <= most):
        _refuse(key, value, f"it must be a whole number from 1 to {most}")
    if kind == "number" and not (type(value) in (int, float) and 0 < value < 1e30):
        _refuse(key, value, "it must be a number above 0")
    if kind == "switch" and type(value) is not bool:
        _refuse(key, value, "it must be true or false")
    several = key == "eos_token_id" and isinstance(value, list)
    if kind == "token" and not all(type(token) is int for token in (value if several else [value])):
        _refuse(key, value, "it must be a token id")
    return tuple(value) if several else value


def read_score_mean(folder: str | Path) -> float:
    """The mean that a saved scalar model subtracts from its scores: config.json's score_mean, 0 without one."""
    path = Path(folder) / "config.json"
    mean = read_object(path).get("score_mean", 0.0)
    if type(mean) not in (int, float) or not math.isfinite(mean):
        raise ValueError(f"{path}: score_mean = {mean!r} is not a number")
    return mean


# ---- weights -------------------------------------------------------------------------------------------------------


def read_tensors(
    folder: str | Path,
    wanted: Mapping[str, torch.Size],
    ignored: set[str],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """The tensors of a folder by name: exactly those `wanted`, in these shapes; those `ignored` may be there or not.

    On the CPU and in the file's own dtype (dtype None) a tensor *is* the mapped file: read when first used, copied page
    by page when written to, and valid even if the file is then renamed or deleted.
    Raises ValueError or FileNotFoundError with one sentence naming the file and the tensor.
    """
    folder, tensors, places = Path(folder), {}, {}
    for path in _weight_files(folder):
        with _open(path) as file:  # maps the file, reads no weight yet
            for name in file.keys():
                if name not in ignored and not name.endswith("rotary_emb.inv_freq"):
                    tensors[name], places[name] = file.get_tensor(name), path
    _require_all(folder, tensors, places, wanted)
    on_cpu = str(device) == "cpu"
    for name in sorted(tensors, key=lambda name: -tensors[name].numel()):  # largest first: memory is still free
        if not on_cpu or dtype not in (None, tensors[name].dtype):
            with _open(places[name]) as file:  # mapped anew: what was read of the file leaves memory with this tensor
                tensors[name] = file.get_tensor(name).to(device, dtype or tensors[name].dtype)
    return tensors


def _require_all(folder: Path, tensors: dict, places: dict, wanted: Mapping[str, torch.Size]) -> None:
    """The tensors found are those wanted, of the right shape and type, and no run that diverged wrote them."""
    if "score.weight" in tensors and "score.weight" not in wanted:
        raise ValueError(f"{folder} is a scalar model (it has score.weight), but a language model is needed here")
    if "score.weight" in wanted and "score.weight" not in tensors:
        where = "give a folder that reward.py wrote, or a new_head for a language model"
        raise ValueError(f"{folder}: the scalar head score.weight is missing; {where}")
    for name, tensor in tensors.items():
        place, shape, dtype = f"{places[name]}: the tensor {name}", tuple(tensor.shape), str(tensor.dtype)
        if name not in wanted:
            raise ValueError(f"{place} has no place in this model")
        if shape != wanted[name]:
            raise ValueError(f"{place} has shape {shape}, config.json asks for {tuple(wanted[name])}")
        if dtype not in ("torch.bfloat16", "torch.float16", "torch.float32"):
            raise ValueError(f"{place} is {dtype}; convert the weights to bf16, fp16 or fp32 first")
        if len(shape) == 1 and not tensor.isfinite().all():  # all weights of a diverged run are NaN, norms are small
            raise ValueError(f"{place} holds NaN or infinity: the run that wrote it diverged")
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise ValueError(f"{folder}: {len(missing)} tensors are missing from the weights, the first is {missing[0]}")


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
        if not isinstance(places, dict) or not places:
            raise ValueError(f"{index}: weight_map must be an object with the shard of every tensor")
        for name in places.values():
            if not isinstance(name, str) or not name.endswith(".safetensors") or Path(name).name != name:
                raise ValueError(f"{index}: weight_map names {name!r}, which is not a .safetensors file of this folder")
        files = [folder / name for name in sorted(set(places.values()))]
    for path in files:
        if not path.is_file():
            pickled = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt*"))
            hint = f"; {pickled[0].name} is a pickle and is never opened: convert it to safetensors" if pickled else ""
            raise FileNotFoundError(f"{path} not found{hint}")
    return files


# ---- writing -------------------------------------------------------------------------------------------------------


def write_folder(folder: str | Path, config: dict, tensors: dict[str, Tensor], max_shard_size: int) -> None:
    """Write config.json and model.safetensors, or shards of at most max_shard_size bytes and their index.

    A write cut short leaves the old weights in place: new shards never take the name of one in use, and one rename (or
    removal) puts the new in the old's place.
    """
    folder, index = Path(folder), "model.safetensors.index.json"
    folder.mkdir(parents=True, exist_ok=True)
    shards = _shards(tensors, max_shard_size)
    names, written = ["model.safetensors"], {"config.json": config}
    if len(shards) > 1:
        in_use = (folder / index).is_file() and '"model-0' in (folder / index).read_text(encoding="utf-8")
        stem = "model-b" if in_use else "model"
        names = [f"{stem}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        places = {name: file for file, shard in zip(names, shards) for name in shard}
        total = sum(tensor.nbytes for tensor in tensors.values())
        written = {index: {"metadata": {"total_size": total}, "weight_map": places}} | written
    for name, shard in zip(names, shards):
        _write_shard(folder / name, shard)
    for name, content in written.items():
        write_json(folder / name, content)
    for path in [folder / "model.safetensors", folder / index, *folder.glob("model-*-of-*.safetensors")]:
        if path.name not in [*names, *written]:  # of an earlier save
            path.unlink(missing_ok=True)


def _shards(tensors: dict[str, Tensor], most: int) -> list[dict[str, Tensor]]:
    """The tensors in their order, cut so that no shard has more than `most` bytes, unless it is one tensor alone."""
    shards, size = [{}], 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > most:
            shards, size = [*shards, {}], 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _write_shard(path: Path, shard: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    with replacing(path, "wb") as file:
        try:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in shard.items()}
            save_file(tensors, file.name, metadata={"format": "pt"})
        except SafetensorError as error:  # such as a full disk
            raise OSError(f"{path} cannot be written: {error}") from None
