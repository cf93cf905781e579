"""model.py against formulas written out again in float64, and against broken files."""

import contextlib
import itertools
import json
import math
import os
import weakref
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from conftest import CASES
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_file
from hf.folder import read_config
from model import Llama, ModelConfig, ScalarModel, load_model, load_scalar_model, masked_logprobs, save_model
from runtime import chunked
from runtime.chunked import ChunkedLogprobs

each_case = pytest.mark.parametrize("name", CASES)


def random_tokens(config: ModelConfig, rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


# ---- formulas, written out again in float64 ------------------------------------------------------------------------


def test_rmsnorm_squares_in_fp32_for_bf16():
    """With bf16 input the result is within two roundings of the exact one: the mean of 4096 squares is not bf16's."""
    norm = model_file.RMSNorm(4096, eps=1e-5).to(torch.bfloat16)
    x = (1 + torch.rand(3, 4096, generator=torch.Generator().manual_seed(0))).to(torch.bfloat16)
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    assert norm(x).dtype == torch.bfloat16 and ((norm(x).double() - exact) / exact).abs().max() <= 2**-8


def turned(config: ModelConfig, x: torch.Tensor) -> torch.Tensor:
    """x (..., T, E) in float64: feature i and i + E/2 as one complex number, times exp(1j * position * speed_i)."""
    T, E = x.shape[-2:]
    speeds = []
    for i in range(E // 2):
        speed = config.rope_theta ** (-2 * i / E)
        if config.rope_type == "llama3":  # Llama 3.1's rule, told by wavelength
            wavelength, context = 2 * math.pi / speed, config.rope_original_max_position_embeddings
            if wavelength > context / config.rope_low_freq_factor:
                speed /= config.rope_factor
            elif wavelength > context / config.rope_high_freq_factor:
                blend = (context / wavelength - config.rope_low_freq_factor) / (
                    config.rope_high_freq_factor - config.rope_low_freq_factor)
                speed = (1 - blend) * speed / config.rope_factor + blend * speed
        speeds.append(speed)
    angles = torch.arange(T, dtype=torch.float64)[:, None] * torch.tensor(speeds, dtype=torch.float64)  # (T, E/2)
    number = torch.complex(x[..., : E // 2], x[..., E // 2 :]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([number.real, number.imag], -1)


@each_case
@torch.no_grad()
def test_the_logits_are_those_of_the_formulas(name, make_model):
    """The whole network once more in float64, one head at a time."""
    model = make_model(**CASES[name])
    config, weights = model.config, {key: weight.double() for key, weight in model.state_dict().items()}
    E, T = config.head_dim, 300  # bf16 knows no odd number above 256
    tokens = random_tokens(config, 1, T)
    future = torch.ones(T, T).triu(1).bool()

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weights[f"{name}.weight"]

    x = weights["model.embed_tokens.weight"][tokens[0]]  # (T, D)
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        h = norm(x, f"{layer}.input_layernorm")
        queries, keys, values = (linear(h, f"{layer}.self_attn.{name}_proj").split(E, -1) for name in "qkv")  # (T, E)
        heads, group = [], config.num_attention_heads // config.num_key_value_heads
        for j, q in enumerate(queries):
            scores = turned(config, q) @ turned(config, keys[j // group]).T / math.sqrt(E)  # (T, T)
            heads.append(scores.masked_fill(future, -math.inf).softmax(-1) @ values[j // group])
        x = x + linear(torch.cat(heads, -1), f"{layer}.self_attn.o_proj")
        h = norm(x, f"{layer}.post_attention_layernorm")
        gate = linear(h, f"{layer}.mlp.gate_proj")
        x = x + linear(gate / (1 + (-gate).exp()) * linear(h, f"{layer}.mlp.up_proj"), f"{layer}.mlp.down_proj")
    expected = linear(norm(x, "model.norm"), "lm_head")
    torch.testing.assert_close(model(tokens)[0].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs_are_minus_the_cross_entropy(temperature):
    """Entry t is log softmax(logits[t] / temperature) at token t + 1; finite at logits of 500; fp32 from bf16."""
    rng = torch.Generator().manual_seed(0)
    logits, tokens = 4 * torch.randn(3, 6, 11, generator=rng), torch.randint(11, (3, 6), generator=rng)
    logits[0, 2, 4] = 500.0
    logits[1, 1, 3] = -500.0
    expected = -F.cross_entropy((logits[:, :-1].double() / temperature).flatten(0, 1), tokens[:, 1:].flatten(),
                                reduction="none").view(3, 5)
    short, long = (model_file.token_logprobs(x, tokens, temperature) for x in (logits, logits.double()))
    torch.testing.assert_close(short.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(long, expected, rtol=1e-12, atol=1e-12)
    rough = logits.bfloat16()
    assert model_file.token_logprobs(rough, tokens).dtype == torch.float32
    assert torch.equal(model_file.token_logprobs(rough, tokens), model_file.token_logprobs(rough.float(), tokens))


MASK = torch.tensor([[0, 1, 1, 0, 1, 0], [0] * 6, [1, 0, 0, 1, 1, 1]]).bool()  # (B, T-1)


def test_masked_logprobs_equal_token_logprobs(make_model):
    """The short way gives the values, entropies and gradients of the long way, and 0 where masked."""
    short, long = make_model(), make_model()
    tokens = random_tokens(short.config, 3, 7)
    weights = torch.linspace(-1, 2, 18).view(3, 6)
    logprobs, entropies = masked_logprobs(short, tokens, MASK, temperature=0.7)
    logits = long(tokens)
    expected = torch.where(MASK, model_file.token_logprobs(logits, tokens, 0.7), 0.0)
    p = torch.softmax(logits[:, :-1].detach().double() / 0.7, -1)
    torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropies.double(), torch.where(MASK, -(p * p.log()).sum(-1), 0.0), rtol=1e-5, atol=1e-5)
    assert not entropies.requires_grad and logprobs.shape == MASK.shape
    (logprobs * weights).sum().backward()
    (expected * weights).sum().backward()
    for (key, a), b in zip(short.named_parameters(), long.parameters()):
        assert (a.grad - b.grad).norm() <= 1e-4 * b.grad.norm(), key


def plain_logprobs(hidden, weight, targets, temperature):
    """The formula, with all logits at once: log-probs and entropies (N,)."""
    log_p = (hidden @ weight.T / temperature).log_softmax(-1)  # (N, V)
    return log_p[range(len(targets)), targets], -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("at_once", [1, 41 * 3, 10**6])  # logits: 1 row, 3, all 20
def test_logprobs_in_chunks_are_the_plain_formula(monkeypatch, at_once):
    """Values, entropies, and gradients of the hidden states and of a weight that made them too, as if tied."""
    monkeypatch.setattr(chunked, "LOGITS_AT_ONCE", at_once)
    rng = torch.Generator().manual_seed(0)
    start, table = torch.randn(20, 6, generator=rng), torch.randn(41, 6, generator=rng)
    targets, factor = torch.randint(41, (20,), generator=rng), torch.randn(20, generator=rng)
    results = []
    for function in (ChunkedLogprobs.apply, plain_logprobs):
        x, weight = start.clone().requires_grad_(), table.clone().requires_grad_()
        logprobs, entropies = function(x + weight[targets.flip(0)], weight, targets, 0.7)
        (logprobs * factor).sum().backward()
        results.append([logprobs.detach(), entropies.detach(), x.grad, weight.grad])
    for ours, plain in zip(*results):
        assert plain.abs().max() > 0.1
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=4e-6)


class Memory(TorchDispatchMode):
    """Bytes of tensors alive that were made under it, the most there ever were, and the numbers of the largest."""

    live = most = largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if not hasattr(storage, "counted"):
                    storage.counted = True
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self.free, storage.nbytes())
                self.most, self.largest = max(self.most, self.live), max(self.largest, tensor.numel())
        return out

    def free(self, size):
        self.live -= size


@pytest.mark.parametrize("grad", [False, True])
def test_no_more_logits_than_a_chunk_are_ever_in_memory(make_model, monkeypatch, grad):
    """4 x 63 positions of which half count, 5,000 tokens: 0.64M logits. Of 40,000 at once there are never four."""
    chunk = weight = 8 * 5000
    monkeypatch.setattr(chunked, "LOGITS_AT_ONCE", chunk)
    model = make_model(vocab_size=5000, hidden_size=8, head_dim=2, num_hidden_layers=1, tie_word_embeddings=True)
    tokens, mask = random_tokens(model.config, 4, 64), (torch.arange(63) % 2 == 0).expand(4, 63)
    with torch.set_grad_enabled(grad), Memory() as memory:
        logprobs, _ = masked_logprobs(model, tokens, mask)
        if grad:
            logprobs.sum().backward()
    assert memory.largest <= chunk
    numbers = 3 * chunk + weight + 30_000  # the activations are the rest
    numbers += 3 * weight * grad  # its gradient as head and as embedding, and one chunk's share
    assert memory.most <= 4 * numbers < 4 * 10 * chunk


def test_gradient_checkpointing_changes_memory_and_not_the_result(make_model):
    """Same log-probs and gradients, bit for bit; of 8 blocks' insides only one is in memory at a time."""
    results = []
    for checkpointing in (False, True):
        model = make_model(num_hidden_layers=8)
        model.model.gradient_checkpointing = checkpointing
        tokens, mask = random_tokens(model.config, 4, 33), torch.ones(4, 32, dtype=torch.bool)
        with Memory() as memory:
            logprobs, _ = masked_logprobs(model, tokens, mask)
            kept = memory.live
            logprobs.square().sum().backward()
        results.append((kept, memory.most, [logprobs.detach(), *(p.grad for p in model.parameters())]))
    (kept, most, exact), (fewer, lower, same) = results
    assert all(map(torch.equal, exact, same)) and fewer < kept / 5 and lower < most / 2


def test_under_autocast_products_are_bf16_and_log_probs_and_values_are_not(make_model, make_config, randomize):
    """A bf16 result has 8 bits: few of fp32 log-probs, values and entropies can be written with them."""
    model, critic = make_model(), randomize(ScalarModel(make_config()))
    tokens, mask = random_tokens(model.config, 4, 33), torch.ones(4, 32, dtype=torch.bool)
    numbers = lambda: [*masked_logprobs(model, tokens, mask), critic(tokens)]
    exact = numbers()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = numbers()
    mixed[0].sum().backward()
    for a, b in zip(exact, mixed):
        assert b.dtype == torch.float32 and (b != b.bfloat16()).float().mean() > 0.9
        assert 1e-4 < (a - b).abs().mean() < 0.05
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in model.parameters())


def test_masked_mean_sees_only_the_mask():
    """The mean over True cells; NaN elsewhere is harmless forwards and backwards; an empty mask gives 0."""
    x = torch.tensor([[1.0, float("nan"), 4.0], [1e6, -2.0, float("inf")]], requires_grad=True)
    mask = torch.tensor([[True, False, True], [False, True, False]])
    mean = model_file.masked_mean(x, mask)
    mean.backward()
    assert mean.item() == pytest.approx(1.0)
    torch.testing.assert_close(x.grad, mask / 3.0)
    assert model_file.masked_mean(x, torch.zeros(2, 3, dtype=torch.bool)).item() == 0.0


def test_the_last_token_is_the_last_real_one():
    mask = model_file.last_token(torch.tensor([4, 2, 1]), 4)
    assert mask.tolist() == [[False, False, False, True], [False, True, False, False], [True, False, False, False]]


# ---- what a position may see ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_right_padding_never_changes_a_real_position(llama, make_config, randomize):
    """A short row in a batch, padded with anything, gives what it gives alone; so does the scalar model."""
    scalar, lengths = randomize(ScalarModel(make_config())), torch.tensor([3, 8, 1, 5])
    texts = random_tokens(llama.config, 4, 10)
    for padding in (0, 60):
        batch = texts.where(torch.arange(10) < lengths[:, None], padding)
        logits, last = llama(batch), scalar(batch, keep=model_file.last_token(lengths, 10))
        for i, length in enumerate(lengths):
            alone = texts[i : i + 1, :length]
            torch.testing.assert_close(logits[i, :length], llama(alone)[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(last[i], scalar(alone)[0, -1], rtol=1e-5, atol=1e-5)


# ---- files ---------------------------------------------------------------------------------------------------------


@each_case
def test_saved_model_comes_back_bit_for_bit(name, make_model, tmp_path):
    """Every tensor, the dtype and the settings survive; a tied head is not stored and is tied again; nothing else lies
    in the folder."""
    model = make_model(**CASES[name], bos_token_id=1, eos_token_id=(2, 3)).bfloat16()
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert again.config == model.config
    for (key, a), (other, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert key == other and a.dtype == b.dtype and torch.equal(a, b)
    tied = model.config.tie_word_embeddings
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert ("lm_head.weight" not in load_file(tmp_path / "model.safetensors")) == tied
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_dtype_can_be_chosen_when_loading(llama, tmp_path):
    save_model(llama, tmp_path)
    loaded = load_model(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(loaded.lm_head.weight, llama.lm_head.weight.bfloat16())
    assert loaded(torch.tensor([[1, 2]])).dtype == torch.float32  # logits are fp32 always


def test_loaded_weights_outlive_their_file_and_never_write_to_it(llama, tmp_path):
    """The file may be replaced or deleted under a loaded model, and a step of the optimizer stays in memory."""
    save_model(llama, tmp_path)
    written = (tmp_path / "model.safetensors").read_bytes()
    first, second = load_model(tmp_path), load_model(tmp_path)
    first.lm_head.weight.data += 1
    assert (tmp_path / "model.safetensors").read_bytes() == written
    save_model(second.bfloat16(), tmp_path)  # over the file that both were loaded from
    for file in tmp_path.iterdir():
        file.unlink()
    assert torch.equal(first.lm_head.weight, llama.lm_head.weight + 1)
    assert torch.equal(second.lm_head.weight, llama.lm_head.weight.bfloat16())


def test_a_save_cut_short_leaves_the_old_or_the_new_weights(make_model, tmp_path, monkeypatch):
    """Cut before every single file operation: never a mixture, never nothing."""
    models = [make_model(seed) for seed in (0, 1)]
    weights = [[tensor.clone() for tensor in model.parameters()] for model in models]

    real, found = {(owner, name): getattr(owner, name) for owner, name in (
        (Path, "replace"), (Path, "unlink"), (Path, "open"), (safetensors.torch, "save_file"))}, []
    for last in range(200):
        save_model(models[0], tmp_path)
        done = itertools.count()

        def counted(function, done=done, last=last):
            def call(*args, **kwargs):
                if next(done) >= last:
                    raise KeyboardInterrupt
                return function(*args, **kwargs)
            return call

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            for (owner, name), function in real.items():
                patch.setattr(owner, name, counted(function))
            save_model(models[1], tmp_path)
        loaded = list(load_model(tmp_path).parameters())
        same = [all(map(torch.equal, loaded, kept)) for kept in weights]
        assert sum(same) == 1
        found.append(same[1])
        if next(done) <= last:  # it was not cut
            break
    assert found == sorted(found) and not found[0] and found[-1]  # first the old, from one moment on the new


def edit_config(**changes):
    def edit(folder):
        path = folder / "config.json"
        raw = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))
    return edit


def edit_tensors(change):
    def edit(folder):
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
    return edit


def write_index(content):
    return lambda folder: ((folder / WEIGHTS).unlink(), (folder / f"{WEIGHTS}.index.json").write_text(content))


NORM, WEIGHTS = "model.layers.1.input_layernorm.weight", "model.safetensors"
CONFIGS = [  # changes to config.json, a word of the sentence
    (dict(model_type="mamba"), "model_type"), (dict(hidden_size=...), "hidden_size"), (dict(hidden_act="gelu"), "gelu"),
    (dict(quantization_config={"bits": 4}), "quantization_config"), (dict(sliding_window=4096), "sliding_window"),
    (dict(model_type="qwen2", sliding_window=4096, use_sliding_window=True), "use_sliding_window"),
    (dict(num_local_experts=8), "num_local_experts"), (dict(rope_scaling=["llama3"]), "rope_scaling"),
    (dict(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}), "partial_rotary_factor"),
    (dict(rope_scaling={"type": "yarn"}), "yarn"), (dict(rope_scaling={"rope_type": "llama3"}), "factor"),
    (dict(rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=4.0, high_freq_factor=4.0,
                            original_max_position_embeddings=32)), "low_freq_factor"),
    (dict(layer_types=["full_attention", "sliding_attention"]), "layer_types"), (dict(is_causal=False), "is_causal"),
    (dict(rope_parameters={"rope_type": "default"}, rope_scaling={"type": "linear", "factor": 2.0}), "linear"),
    (dict(num_key_value_heads=3), "num_key_value_heads"), (dict(head_dim=7), "head_dim"),
    (dict(head_dim=None, num_attention_heads=64), "head_dim"),
    *[({key: value}, key) for key, value in [
        ("vocab_size", "61"), ("vocab_size", 0), ("hidden_size", 32.0), ("num_hidden_layers", 10**9),
        ("rms_norm_eps", "1e-5"), ("rope_theta", math.inf), ("tie_word_embeddings", "false"),
        ("max_position_embeddings", 10**30), ("eos_token_id", [1, "2"]), ("bos_token_id", [1])]]]
TENSORS = [  # what becomes of the tensors, words
    (lambda tensors: tensors.pop(NORM), [NORM]), (lambda tensors: tensors.update(ghost=torch.ones(2)), ["ghost"]),
    (lambda tensors: tensors.update({NORM: torch.ones(31)}), [WEIGHTS, NORM, "(31,)", "(32,)"]),
    (lambda tensors: tensors.update({NORM: torch.ones(32, dtype=torch.int8)}), [WEIGHTS, NORM, "int8"]),
    (lambda tensors: tensors[NORM].fill_(math.nan), [WEIGHTS, NORM, "NaN"]),
    (lambda tensors: tensors[NORM].fill_(math.inf), [WEIGHTS, NORM, "infinity"]),
    (lambda tensors: tensors.update({"score.weight": torch.ones(1, 32)}), ["scalar model", "score.weight"]),
    (lambda tensors: tensors.pop("lm_head.weight"), ["lm_head.weight"]),
    (lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}), ["q_proj.bias"])]
def make_adapter(*names):
    return lambda folder: (folder / "adapter_config.json").write_text("{}") and [
        (folder / name).unlink() for name in names]


def split_with_a_copy(folder):
    """Two shards, both with the head."""
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors, folder / "a.safetensors")
    save_file({"lm_head.weight": 2 * tensors["lm_head.weight"]}, folder / "b.safetensors")
    write_index(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))(folder)


FAULTS = [
    (lambda folder: (folder / "config.json").unlink(), ["config.json"]),
    *[(make_adapter(*names), ["an adapter: merge it"]) for names in ((WEIGHTS,), ("config.json", WEIGHTS))],
    (edit_config(tie_word_embeddings=True), [WEIGHTS, "lm_head.weight", "tie_word_embeddings"]),
    (split_with_a_copy, ["lm_head.weight", "a.safetensors", "b.safetensors"]),
    *[(lambda folder, content=content: (folder / "config.json").write_bytes(content), ["config.json"])
      for content in (b"{nope", b"[1]", b"\xff\x00{")],
    *[(edit_config(**changes), ["config.json", word]) for changes, word in CONFIGS],
    *[(edit_tensors(change), words) for change, words in TENSORS],
    (lambda folder: os.truncate(folder / WEIGHTS, 1000), [WEIGHTS]),
    (lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"), [WEIGHTS, "pickle"]),
    (write_index('{"weight_map": {"a": "model-00002.safetensors"}}'), ["model-00002.safetensors"]),
    *[(write_index(content), [f"{WEIGHTS}.index.json"])  # paths out of the folder: test_security.py
      for content in ("[]", "{nope", '{"weight_map": {}}', '{"weight_map": {"a": 1}}')]]


@pytest.mark.parametrize("break_it, words", FAULTS)
def test_a_broken_folder_is_refused_by_name(break_it, words, llama, tmp_path):
    """ValueError or FileNotFoundError, in one line that names the file and what is wrong in it."""
    save_model(llama, tmp_path)
    break_it(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load_model(tmp_path)
    message = str(error.value)
    assert all(word in message for word in [*words, str(tmp_path)]) and "\n" not in message


def test_keys_that_change_nothing_are_accepted(llama, tmp_path):
    """As real folders have them: null, switched off, or of no meaning for the numbers."""
    save_model(llama, tmp_path)
    edit_config(pretraining_tp=1, rope_scaling=None, head_dim=None, num_local_experts=None, sliding_window=None,
                use_sliding_window=False, partial_rotary_factor=1.0, quantization_config=None, bos_token_id=None,
                use_cache=True, attention_dropout=0.0, initializer_range=0.02)(tmp_path)
    assert load_model(tmp_path).config == llama.config
    edit_config(model_type="qwen2", sliding_window=32768, max_window_layers=21, rope_parameters=dict(
        rope_type="default", rope_theta=5e6))(tmp_path)
    config = ModelConfig(**read_config(tmp_path))
    assert config.attention_bias and config.rope_theta == 5e6 and config.rope_type == "default"


def test_config_defaults_are_those_of_hugging_face(tmp_path):
    """Keys that old config.json files leave out mean what transformers takes them to mean."""
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "llama", "vocab_size": 9, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 3, "eos_token_id": [1, 2]}))
    config = ModelConfig(**read_config(tmp_path))
    assert (config.num_key_value_heads, config.head_dim, config.rope_theta) == (3, 8, 10000.0)
    assert (config.rms_norm_eps, config.max_position_embeddings) == (1e-6, 2048)
    assert config.eos_token_id == (1, 2)
    assert not (config.tie_word_embeddings or config.attention_bias or config.mlp_bias)


def test_a_tied_head_that_is_in_the_file_too_changes_nothing_if_it_is_the_same(make_model, tmp_path):
    model = make_model(tie_word_embeddings=True)
    save_model(model, tmp_path)
    edit_tensors(lambda tensors: tensors.update({"lm_head.weight": 1 * tensors["model.embed_tokens.weight"]}))(tmp_path)
    tokens = random_tokens(model.config, 2, 5)
    assert torch.equal(load_model(tmp_path)(tokens), model(tokens))
    edit_tensors(lambda tensors: tensors["lm_head.weight"][-1, -1].add_(1e-3))(tmp_path)
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        load_model(tmp_path)
    scalar = load_scalar_model(tmp_path, new_head="zero")  # it has no use for either
    assert torch.equal(scalar.model(tokens), model.model(tokens))


@pytest.mark.parametrize("own", [None, 3, (3, 9)])
def test_tokens_that_stop_are_saved_beside_the_models_own(own, make_model, make_config, tmp_path):
    for model in (make_model(eos_token_id=own), ScalarModel(make_config(eos_token_id=own, pad_token_id=7))):
        save_model(model, tmp_path, stop_ids=frozenset([7, 5]))
        saved = ModelConfig(**read_config(tmp_path))
        assert set(saved.eos_token_id) == {5, 7, 3 if own else 5, 9 if own == (3, 9) else 5}
        assert saved.pad_token_id is None  # or transformers would take the last token of a text for padding


@pytest.mark.parametrize("tied", [False, True])
def test_a_scalar_model_needs_a_head_or_the_wish_for_a_new_one(tied, make_model, tmp_path):
    """A language model's folder is refused as a reward model unless new_head is given; then the trunk is the same."""
    model = make_model(tie_word_embeddings=tied)
    save_model(model, tmp_path)
    with pytest.raises(ValueError, match=r"score\.weight.* is missing.*reward\.py"):
        load_scalar_model(tmp_path)
    scalar = load_scalar_model(tmp_path, new_head="normal")
    tokens = random_tokens(model.config, 2, 5)
    assert torch.equal(scalar.model(tokens), model.model(tokens)) and scalar(tokens).std() > 0
    assert not load_scalar_model(tmp_path, new_head="zero")(tokens).any()


def test_normal_head_has_variance_one_over_d_plus_one(make_config, tmp_path):
    """300 heads of D = 3: standard deviation 1/2 (1/sqrt(3) would be 15% more), mean 0, both within 4 sigma."""
    save_model(Llama(make_config(hidden_size=3, head_dim=2, num_attention_heads=1, num_key_value_heads=1,
                                 num_hidden_layers=1, vocab_size=4, intermediate_size=2)), tmp_path)
    draw = lambda seed: load_scalar_model(tmp_path, new_head="normal", seed=seed).score.weight.detach()
    heads = torch.cat([draw(seed) for seed in range(300)])
    assert torch.equal(draw(0), heads[:1]) and len(heads.unique()) == heads.numel()
    n = heads.numel()
    assert heads.mean().abs() < 4 * 0.5 / n**0.5
    assert abs(heads.std() - 0.5) < 4 * 0.5 / (2 * n) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_scalar_model_comes_back(dtype, make_config, randomize, tmp_path):
    """Weights bit for bit, and the mean that every score is lowered by; a new head starts from mean 0 again."""
    model = randomize(ScalarModel(make_config())).to(dtype)
    tokens = random_tokens(model.config, 2, 5)
    raw = model(tokens)
    model.score_mean = -1.234567890123
    save_model(model, tmp_path)
    again = load_scalar_model(tmp_path)
    assert again.score_mean == -1.234567890123
    assert torch.equal(again(tokens), raw + 1.234567890123) and again(tokens).dtype == torch.float32
    assert load_scalar_model(tmp_path, new_head="zero").score_mean == 0.0
    with pytest.raises(ValueError, match=r"scalar model.*score\.weight"):
        load_model(tmp_path)
    for wrong in ("1", math.nan):
        edit_config(score_mean=wrong)(tmp_path)
        with pytest.raises(ValueError, match=r"config\.json: score_mean"):
            load_scalar_model(tmp_path)
