"""model.py against transformers: the same folder gives the same numbers in both, on random and on real weights."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import CASES as SHAPES
from conftest import real_data, real_model
from test_model import random_tokens

from generate import generate
from model import ScalarModel, load_model, load_scalar_model, save_model

CASES = {  # changes to conftest's config, number of tokens
    "gqa": (SHAPES["gqa"], 13),
    "one token": ({}, 1),
    "one layer, odd sizes": (dict(num_hidden_layers=1, vocab_size=67, hidden_size=30, intermediate_size=37,
                                  num_attention_heads=3, num_key_value_heads=1, head_dim=10), 15),
    "mha, wide heads, theta 500000": (dict(num_key_value_heads=4, head_dim=12, rope_theta=500000.0), 33),
    "mqa, tied": (SHAPES["mqa, tied"], 7),
    "llama3 rope, ten contexts long": (SHAPES["llama3 rope"] | dict(max_position_embeddings=512), 333),
    "both biases, large eps": (SHAPES["both biases"], 8),
    "qwen2, tied": (SHAPES["qwen2, tied"], 23),
    "qwen2, llama3 rope": (SHAPES["llama3 rope"] | dict(model_type="qwen2", attention_bias=True), 45)}
each_case = pytest.mark.parametrize("name", CASES)


def read_by_transformers(folder, kind="AutoModelForCausalLM", dtype=torch.float32, attention="eager"):
    """transformers must find every tensor in the folder and no other."""
    transformers = pytest.importorskip("transformers")
    theirs, info = getattr(transformers, kind).from_pretrained(
        folder, dtype=dtype, attn_implementation=attention, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return theirs.eval()


def to_transformers(model, folder, kind="AutoModelForCausalLM"):
    save_model(model, folder)
    return read_by_transformers(folder, kind)


# ---- random weights, fp32 ------------------------------------------------------------------------------------------


@each_case
def test_logits_and_gradients(name, make_model, tmp_path):
    """The same folder gives the same logits (1e-4) and the gradient of every weight (relative 1e-4) in both."""
    changes, length = CASES[name]
    ours = make_model(**changes)
    theirs = to_transformers(ours, tmp_path)
    tokens = random_tokens(ours.config, 3, length)
    targets = random_tokens(ours.config, 3, length, seed=1)
    logits, expected = ours(tokens), theirs(tokens).logits
    assert expected.std() > 0.1  # else a small difference would mean nothing
    assert (logits - expected).abs().max() <= 1e-4
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    F.cross_entropy(expected.flatten(0, 1), targets.flatten()).backward()
    gradients = {key: weight.grad for key, weight in theirs.named_parameters()}
    assert gradients.keys() == {key for key, _ in ours.named_parameters()}
    # exact zeros, such as q and k of a single token, come out as rounding noise of the whole
    floor = 1e-6 * torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    for key, weight in ours.named_parameters():
        assert (weight.grad - gradients[key]).norm() <= 1e-4 * gradients[key].norm() + floor, key


@each_case
def test_folder_written_by_transformers_is_read(name, make_model, tmp_path):
    """transformers' save_pretrained -> load_model gives back the very same numbers and settings."""
    ours = make_model(seed=1, bos_token_id=3, eos_token_id=(5, 6), **CASES[name][0])
    to_transformers(ours, tmp_path / "ours").save_pretrained(tmp_path / "theirs", max_shard_size="10KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    again = load_model(tmp_path / "theirs")
    assert again.config == ours.config
    assert all(map(torch.equal, again.state_dict().values(), ours.state_dict().values()))


@pytest.mark.parametrize("ids", [(None, None, None), (1, 2, 0), (7, (8, 9), None)])
def test_token_ids_and_dtype_reach_transformers(ids, make_model, tmp_path):
    """Ids that are absent stay absent (transformers would take 1 and 2), and the file's dtype is the one it loads."""
    transformers, names = pytest.importorskip("transformers"), ("bos_token_id", "eos_token_id", "pad_token_id")
    save_model(make_model(**dict(zip(names, ids))).bfloat16(), tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    ids = tuple(list(value) if isinstance(value, tuple) else value for value in ids)
    assert tuple(getattr(theirs.config, name) for name in names) == ids
    assert theirs.dtype == torch.bfloat16


@torch.no_grad()
def test_one_file_comes_before_shards(make_model, tmp_path):
    """Where a folder holds both, we read what transformers reads."""
    single, shards = make_model(seed=0), make_model(seed=1)
    to_transformers(shards, tmp_path / "shards").save_pretrained(tmp_path / "both", max_shard_size="20KB")
    save_model(single, tmp_path / "both")
    assert (tmp_path / "both" / "model.safetensors.index.json").is_file()
    tokens = random_tokens(single.config, 1, 5)
    assert torch.equal(load_model(tmp_path / "both")(tokens), single(tokens))
    assert (read_by_transformers(tmp_path / "both")(tokens).logits - single(tokens)).abs().max() <= 1e-4


# ---- the scalar model ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["gqa", "mqa, tied", "qwen2, tied"])
@torch.no_grad()
def test_scores_of_sequence_classification(name, make_config, randomize, tmp_path):
    """transformers' score of a text is ours at its last token, before score_mean is subtracted; in a batch too."""
    ours = randomize(ScalarModel(make_config(**SHAPES[name], eos_token_id=2, pad_token_id=0)))
    ours.score_mean = 0.75
    theirs = to_transformers(ours, tmp_path, "AutoModelForSequenceClassification")
    lengths = torch.tensor([1, 4, 9])
    tokens = 1 + random_tokens(ours.config, 3, 9) % (ours.config.vocab_size - 1)  # 0 is padding
    tokens[1, 3] = 2  # a text that ends as it should
    scores = ours(tokens)[torch.arange(3), lengths - 1]
    assert scores.std() > 0.1
    batch = torch.where(torch.arange(9) < lengths[:, None], tokens, 0)
    expected = theirs(batch, attention_mask=(batch != 0).long()).logits[:, 0]
    assert (scores + 0.75 - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("eos", [2, (3, 2)])
@torch.no_grad()
def test_an_end_token_is_never_taken_for_padding(eos, make_config, randomize, tmp_path):
    """Where padding and end share an id (SmolLM2), transformers would score one token early: it is told of no padding,
    scores single texts rightly and refuses batches."""
    ours = randomize(ScalarModel(make_config(eos_token_id=eos, pad_token_id=2)))
    theirs = to_transformers(ours, tmp_path, "AutoModelForSequenceClassification")
    tokens = random_tokens(ours.config, 1, 6)
    tokens[0, -1] = 2
    assert theirs(tokens).logits.item() == pytest.approx(ours(tokens)[0, -1].item(), abs=1e-5)
    with pytest.raises(ValueError, match="padding"):
        theirs(tokens.repeat(2, 1))
    assert torch.equal(load_scalar_model(tmp_path)(tokens), ours(tokens))


# ---- bf16 ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_bf16_is_as_close_to_the_truth_as_transformers(make_model, tmp_path):
    """Error (RMS) of all logits over 8 models, against fp32 on the same weights: at most 1.1 times transformers'."""
    ours_squared = theirs_squared = 0.0
    for seed in range(8):
        shape = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=8, head_dim=16)
        folder = tmp_path / str(seed)
        save_model(make_model(seed, **SHAPES["llama3 rope"] | shape).bfloat16(), folder)
        ours = load_model(folder)
        tokens = random_tokens(ours.config, 4, 47, seed)
        truth = read_by_transformers(folder)(tokens).logits
        rough = read_by_transformers(folder, dtype=torch.bfloat16, attention="sdpa")(tokens).logits.float()
        ours_squared += (ours(tokens) - truth).square().mean().item()
        theirs_squared += (rough - truth).square().mean().item()
    assert 0 < ours_squared <= 1.1**2 * theirs_squared
    assert theirs_squared / 8 < 0.1**2  # the comparison means something


# ---- real weights --------------------------------------------------------------------------------------------------


def chatml_prompts(folder, n: int) -> list[list[int]]:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    with open(real_data("gsm8k/test.jsonl"), encoding="utf-8") as lines:
        questions = [json.loads(line)["question"] for line, _ in zip(lines, range(n))]
    return [tokenizer.encode(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n").ids
            for question in questions]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SmolLM2-135M-Instruct", "Qwen2.5-Coder-0.5B-Instruct-qwen2"])
def test_greedy_tokens_of_real_weights(name):
    """64 greedy tokens for each of 20 GSM8K questions, fp32, from generate.py and from transformers: all the same."""
    folder, transformers = real_model(name), pytest.importorskip("transformers")
    prompts, new = chatml_prompts(folder, 20), 64
    model = load_model(folder, torch.float32)
    stop = model.config.eos_token_id
    ours = [response.tokens for response in generate(model, prompts, new, temperature=0, stop_ids=[stop])]
    theirs = read_by_transformers(folder, attention="sdpa")
    width = max(map(len, prompts))
    left_padded = torch.tensor([[stop] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    setting = transformers.GenerationConfig(do_sample=False, max_new_tokens=new, eos_token_id=stop, pad_token_id=stop)
    text = theirs.generate(left_padded, attention_mask=mask, generation_config=setting)[:, width:].tolist()
    expected = [row[: row.index(stop) + 1] if stop in row else row for row in text]
    assert ours == expected
    assert sum(map(len, ours)) > 20 * new / 2
