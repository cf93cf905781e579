"""How fast, and in how much memory, model.py loads a folder.

    python bench/load.py                   # makes a random Llama of Llama 3.2 1B's shape, deletes it afterwards
    python bench/load.py --folder FOLDER   # any folder that load_model reads

Speed: load_model against safetensors' own load_file, in turns, in one process, from the page cache. Both map the file
and read it at the first use, so every weight is summed before the clock stops; the time of the bare call stands
beside. Memory: the peak of a fresh process that loads and sums, Python and PyTorch (0.2 GB) included, over the size
of the weights.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # memory is then the process's own, not a GPU's

import torch
from safetensors.torch import load_file

from model import Llama, ModelConfig, load_model, save_model
from runtime import peak_memory_mb

LLAMA_1B = ModelConfig(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    tie_word_embeddings=True,
)
ROUNDS = 7


def make_folder(folder: str) -> None:
    with torch.device("meta"):
        model = Llama(LLAMA_1B).to(torch.bfloat16)
    model.to_empty(device="cpu").tie()
    for weight in model.parameters():
        weight.data.uniform_(-0.03, 0.03)
    save_model(model, folder)


def seconds(load) -> tuple[float, float]:
    """Time of load(), which gives back tensors, and time until all of them are read."""
    start = time.perf_counter()
    tensors = load()
    called = time.perf_counter() - start
    for tensor in tensors:
        tensor.detach().sum()
    return called, time.perf_counter() - start


def peak(folder: str, dtype: torch.dtype | None) -> tuple[float, float]:
    """Peak memory of this process and size of the loaded weights, in GB."""
    weights = []
    seconds(lambda: weights.extend(load_model(folder, dtype).parameters()) or weights)
    return peak_memory_mb() * 2**20 / 1e9, sum(weight.nbytes for weight in weights) / 1e9


def in_child(function, *args):
    """Run in a process of its own, whose peak memory then tells of this call alone."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def main(folder: str) -> None:
    for dtype in (None, torch.float32):
        memory, weights = in_child(peak, folder, dtype)
        name = str(dtype or "as stored").removeprefix("torch.")
        print(f"peak memory, {name:9} {memory:6.2f} GB for {weights:.2f} GB of weights: {memory / weights:.2f}")
    files = sorted(Path(folder).glob("*.safetensors"))
    loads = {
        "load_file": lambda: [tensor for file in files for tensor in load_file(file).values()],
        "load_model": lambda: list(load_model(folder).parameters()),
        "load_model, float32": lambda: list(load_model(folder, torch.float32).parameters()),
    }
    times = {name: [] for name in loads}
    for _ in range(ROUNDS):
        for name, load in loads.items():
            times[name].append(seconds(load))
    size = sum(file.stat().st_size for file in files) / 1e9
    for name, rounds in times.items():
        called, read = (statistics.median(column) for column in zip(*rounds))
        print(f"{name:20} {read:6.2f} s until read, {size / read:5.2f} GB/s of file (the call alone {called:.3f} s)")
    ratio = statistics.median(b / a for (_, a), (_, b) in zip(times["load_model"], times["load_file"]))
    print(f"load_model reads at {ratio:.2f} of load_file's rate (median of {ROUNDS} rounds)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="a model folder; left out, a random one is made")
    args = parser.parse_args()
    if args.folder:
        main(args.folder)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            print(f"making a random 1B model under {temporary}: 2.5 GB of disk (TMPDIR chooses another place)")
            in_child(make_folder, temporary)
            main(temporary)
