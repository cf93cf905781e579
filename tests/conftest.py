"""Fixtures shared by all tests: every model and tokenizer is made here from nothing, no test reaches the network."""

import json
import os
import signal
import socket
import sys
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PRECISION": ""}
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from model import Llama, ModelConfig, save_model

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as behind nohup: what a test starts would ignore it too
    signal.signal(signal.SIGINT, signal.default_int_handler)

LLAMA_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CHATML_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEXTS = ["user\n\nAva has 3 pens. Ben gives Ava 4. How many pens does Ava have now?assistant\n\n3+4=7\n#### 7",
         "user\n\nKai has 12 coins. Kai doubles them. How many coins does Kai have now?assistant\n\n12*2=24\n#### 24"]
LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")
CHATML_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
LLAMA3_ROPE = dict(rope_type="llama3", rope_factor=8.0, rope_low_freq_factor=1.0, rope_high_freq_factor=4.0,
                   rope_original_max_position_embeddings=32)
CASES = {  # changes to make_config's; test_parity.py holds these and more against transformers
    "gqa": {},
    "mqa, tied": dict(num_key_value_heads=1, tie_word_embeddings=True),
    "llama3 rope": dict(LLAMA3_ROPE, head_dim=16, rope_theta=5000.0),
    "both biases": dict(attention_bias=True, mlp_bias=True, rms_norm_eps=0.1),
    "qwen2, tied": dict(model_type="qwen2", attention_bias=True, tie_word_embeddings=True),
}


def real_data(name: str) -> Path:
    """A file of $DATA_DIR, such as gsm8k/test.jsonl; the test is skipped where it is not there."""
    return _outside("DATA_DIR", name)


def real_model(name: str) -> Path:
    """A model folder of $MODELS_DIR, such as SmolLM2-135M-Instruct; the test is skipped where it is not there."""
    return _outside("MODELS_DIR", name)


def _outside(variable: str, name: str) -> Path:
    path = Path(os.environ.get(variable, "nowhere")) / name
    return path if path.exists() else pytest.skip(f"{variable} names no folder with {name}")


@pytest.fixture(autouse=True, scope="session")
def no_network():
    """A connection or a name look-up beyond this machine fails the test that asks for it."""

    def guarded(real, host_of):
        def call(*args, **kwargs):
            host = host_of(*args)
            host = host.decode() if isinstance(host, bytes) else host
            if host not in (None, "", "localhost", "127.0.0.1", "::1", socket.gethostname()):
                raise RuntimeError(f"a test wants the network: {host}")
            return real(*args, **kwargs)
        return call

    host_of_address = lambda self, address: address[0] if isinstance(address, tuple) else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded(socket.socket.connect, host_of_address))
        patch.setattr(socket, "getaddrinfo", guarded(socket.getaddrinfo, lambda host, *rest: host))
        yield


@pytest.fixture(scope="session")
def make_config():
    """make_config(**changes): a tiny Llama with 2 layers, hidden size 32, 4 query heads on 2 key/value heads."""

    def make(**changes) -> ModelConfig:
        return ModelConfig(**dict(
            vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=128, rope_theta=10000.0) | changes)

    return make


@pytest.fixture(scope="session")
def randomize():
    """randomize(module, seed): every parameter random, norms and biases too, so that none can be left out unseen."""

    def fill(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in module.named_parameters():
                noise = torch.randn(weight.shape, generator=rng)
                if weight.dim() == 1:
                    weight.copy_(1 + 0.3 * noise if "norm" in name else 0.5 * noise)
                else:
                    weight.copy_(noise * (1.0 if "embed" in name else 1.5 * weight.shape[1] ** -0.5))
        return module

    return fill


@pytest.fixture(scope="session")
def make_model(make_config, randomize):
    """make_model(seed=0, **config changes): a tiny random Llama whose logits have a size of about one."""

    def make(seed: int = 0, **changes) -> Llama:
        model = Llama(make_config(**changes))
        randomize(model, seed)
        if model.config.tie_word_embeddings:
            with torch.no_grad():
                model.lm_head.weight *= 0.3  # a tied head of size-one embeddings would be far too sure of itself
        return model.eval()

    return make


@pytest.fixture(scope="session")
def llama(make_model) -> Llama:
    """One tiny random Llama for tests that only read it."""
    return make_model()


def make_tokenizer(folder: Path, special: list[str], special_first: bool, config: dict, generation: dict) -> Path:
    """A byte-level BPE of a few hundred tokens, with the files that a Hugging Face folder has."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(
        vocab_size=320, special_tokens=special if special_first else [], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if special_first:  # as in Llama 3's own file, where plain encoding would put a BOS before every text
        backend.post_processor = processors.TemplateProcessing(f"{special[0]} $A", special_tokens=[(special[0], 0)])
    else:
        backend.add_special_tokens(special)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory) -> Path:
    """Tokenizer folder with Llama 3's special tokens; <|begin_of_text|> has id 0, <|eot_id|> id 4."""
    return make_tokenizer(
        tmp_path_factory.mktemp("llama_tokenizer"), LLAMA_SPECIAL, True,
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "chat_template": LLAMA_TEMPLATE},
        {"bos_token_id": 0, "eos_token_id": [1, 4]})


@pytest.fixture(scope="session")
def make_chatml(tmp_path_factory):
    """make_chatml(template): a ChatML tokenizer folder; its special tokens come last, so id 0 is plain text."""

    def make(template: str = CHATML_TEMPLATE) -> Path:
        return make_tokenizer(
            tmp_path_factory.mktemp("chatml_tokenizer"), CHATML_SPECIAL, False,
            {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": template}, {})

    return make


@pytest.fixture(scope="session")
def chatml_folder(make_chatml) -> Path:
    return make_chatml()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, make_model, llama_folder) -> Path:
    """A whole Hugging Face folder to start stages from: a tiny random Llama and the Llama 3 tokenizer. Read only."""
    folder = tmp_path_factory.mktemp("tiny_model")
    for file in llama_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    size = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size(with_added_tokens=True)
    save_model(make_model(vocab_size=size, max_position_embeddings=256, tie_word_embeddings=True,
                          bos_token_id=0, eos_token_id=4), folder)
    return folder
