"""sft.py: the loss, what it trains (the response and its end token, nothing else), and that it learns."""

import json
import math
import shutil

import pytest
import tokenizers
import torch

import runtime
import sft
from data import Tokenizer, write_jsonl
from generate import generate
from model import Llama, ModelConfig, load_model, save_model
from runtime import checkpoint, steps
from sft import sft_loss


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """The numbers below are compared closely."""
    for module in (runtime, steps):
        monkeypatch.setattr(module, "default_device", lambda: torch.device("cpu"))


def tiny_folder(folder, seed=0):
    """A random Llama of one layer over 20 characters, with a tokenizer that knows one character at a time."""
    folder.mkdir(parents=True)
    vocabulary = {character: i for i, character in enumerate(["<s>", "</s>", *"0123456789+-*=# \n?ab"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    torch.manual_seed(seed)
    model = Llama(ModelConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64, rope_theta=10000.0, eos_token_id=1))
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    save_model(model, folder)
    return str(folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("sft") / "tiny")


# ---- the loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("total", "loss", "slope"), [(2, 1.5, -0.5), (4, 0.75, -0.25)])
def test_loss_is_the_sum_over_the_mask_by_the_tokens_of_the_whole_step(total, loss, slope):
    logprobs = torch.tensor([[-1.0, -2.0, -9.0]], dtype=torch.float64, requires_grad=True)
    value = sft_loss(logprobs, torch.tensor([[True, True, False]]), total)
    value.backward()
    assert value.item() == pytest.approx(loss, abs=1e-12)
    assert logprobs.grad.tolist() == [[slope, slope, 0.0]]


@pytest.mark.parametrize("poison", [float("nan"), float("-inf"), 1e6])
def test_a_masked_cell_may_hold_anything(poison):
    logprobs = torch.tensor([[-1.0, poison], [poison, -3.0]], dtype=torch.float64, requires_grad=True)
    value = sft_loss(logprobs, torch.tensor([[True, False], [False, True]]), 2)
    value.backward()
    assert value.item() == 2.0 and logprobs.grad.tolist() == [[-0.5, 0.0], [0.0, -0.5]]


# ---- the script ----------------------------------------------------------------------------------------------------

EXAMPLES = [("3+4", "7"), ("12+30", "12+30=42\n#### 42"), ("1+1", "1+1=2\n#### 2"), ("9-2", "9-2=7\n#### 7"),
            ("2*3", "2*3=6\n#### 6"), ("8", "8"), ("10-4", "6"), ("5+5+5", "5+5=10\n10+5=15\n#### 15")]


def train(folder, model, rows=EXAMPLES, **flags):
    """Run sft.py; the trained model, its metrics, and done.json."""
    write_jsonl(folder / "data.jsonl", [{"prompt": prompt, "response": response} for prompt, response in rows])
    sft.main(sft.Config(model=model, data=str(folder / "data.jsonl"), out=str(folder / "out"), **flags))
    metrics = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    return load_model(folder / "out"), metrics, json.loads((folder / "out" / "done.json").read_text())


def plain_sgd(monkeypatch, where=torch.optim):
    """SGD instead of AdamW: what a step does can then be written out. Returns what AdamW was asked for, each time."""
    asked = []

    def optimizer(params, **settings):
        asked.append(settings)
        return torch.optim.SGD(params, lr=0.0)

    monkeypatch.setattr(where, "AdamW", optimizer)
    return asked


def descend(model, rate, most=math.inf):
    """One step of plain descent on .grad, its length clipped to `most`; returns the length that it had."""
    with torch.no_grad():
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
        for p in model.parameters():
            p -= rate * min(1, most / (norm + 1e-6)) * p.grad
            p.grad = None
    return norm


def change(before, after):
    """All parameters' movement in one vector."""
    return torch.cat([(a - b).flatten() for b, a in zip(before.parameters(), after.parameters())])


@pytest.mark.parametrize(("flag", "value"), [
    ("micro_tokens", 1), ("gradient_checkpointing", True)])
def test_a_whole_run_is_the_loop_that_is_written_out_here(tiny, tmp_path, monkeypatch, flag, value):
    """Two shuffled epochs with a short last batch, warm-up and decay, clipping, each example read alone.

    And the first example is too long: those after it keep their own responses.
    """
    asked, length = plain_sgd(monkeypatch), 3.5
    rows = [("1+2+3+4+5+6+7+8+9", "1+2=3\n#### 45"), *EXAMPLES]
    trained, metrics, done = train(tmp_path, tiny, rows=rows, epochs=2, batch_size=3, lr=0.2, warmup=2,
                                   max_grad_norm=length, max_tokens=30, weight_decay=0.25, seed=3, **{flag: value})
    assert [(settings["betas"], settings["weight_decay"]) for settings in asked] == [((0.9, 0.95), 0.25)]
    tokenizer, model = Tokenizer(tiny), load_model(tiny)
    losses, norms, rates = [], [], [0.1, 0.2, 0.2, 0.15, 0.1, 0.05]  # six steps
    for epoch in range(2):
        order = steps.permutation(8, 3, "sft", epoch)
        for batch in (order[:3], order[3:6], order[6:]):
            loss, count = 0.0, 0
            for prompt, response in (EXAMPLES[i] for i in batch):
                ids, target = tokenizer.chat(prompt), [*tokenizer.encode(response), tokenizer.end_id]
                logits = model(torch.tensor([ids + target]))[0, len(ids) - 1 : -1]  # (response, V)
                loss = loss + torch.nn.functional.cross_entropy(logits, torch.tensor(target), reduction="sum")
                count += len(target)
            (loss / count).backward()
            losses.append((loss / count).item())
            norms.append(descend(model, rates[len(norms)], length))
    assert min(norms) < length < max(norms)  # some steps are clipped and some are not
    for name, expected in (("loss", losses), ("lr", rates), ("grad_norm", norms)):
        assert [m[name] for m in metrics] == pytest.approx(expected, rel=1e-4), name
    assert [m["step"] for m in metrics] == list(range(6))
    assert change(model, trained).abs().max() < 1e-5 < 1e-2 < change(load_model(tiny), trained).abs().max()
    seen = 2 * sum(len(tokenizer.chat(prompt)) + len(tokenizer.response(response)) for prompt, response in EXAMPLES)
    assert done["tokens"] == seen and done["flops"] == 6 * seen * sum(p.numel() for p in model.parameters())
    assert done["results"] == {"loss": pytest.approx(losses[-1]), "examples": 8, "too_long": 1}


def test_it_learns_the_answers_and_to_end_them(tiny, tmp_path):
    model, metrics, _ = train(tmp_path, tiny, rows=EXAMPLES[:4], epochs=60, batch_size=4, lr=1e-2, warmup=5)
    assert metrics[0]["loss"] > 2 and metrics[-1]["loss"] < 0.05
    tokenizer = Tokenizer(tmp_path / "out")  # saved beside the model
    answers = generate(model, [tokenizer.chat(p) for p, _ in EXAMPLES[:4]], 30, 0.0, tokenizer.stop_ids)
    assert [tokenizer.decode(a.tokens) for a in answers] == [response for _, response in EXAMPLES[:4]]
    assert [a.finish for a in answers] == ["stop"] * 4


@pytest.mark.parametrize("named", [0, [0, 1]])
def test_what_closes_a_turn_ends_a_text_in_transformers_too(named, make_chatml, make_model, tmp_path):
    """A base model with a ChatML template, as Qwen2.5's: its files name <|endoftext|> alone."""
    folder = tmp_path / "base"
    shutil.copytree(make_chatml(), folder)
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    size = Tokenizer(folder).vocab_size
    save_model(make_model(vocab_size=size, eos_token_id=Tokenizer(folder).id("<|endoftext|>")), folder)
    train(tmp_path, str(folder), epochs=1)
    ends = {*([named] if named == 0 else named), *map(Tokenizer(folder).id, ("<|endoftext|>", "<|im_end|>"))}
    for name in ("config.json", "generation_config.json"):
        assert set(json.loads((tmp_path / "out" / name).read_text())["eos_token_id"]) == ends, name
    theirs = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert set(theirs.generation_config.eos_token_id) == ends


def test_examples_that_are_too_long_are_left_out_whole_and_counted(tiny, tmp_path):
    """'3+4' -> '7' is <s>, 3, +, 4, line end, 7, </s>: seven tokens."""
    _, _, done = train(tmp_path / "some", tiny, epochs=1, max_tokens=7)
    assert (done["results"]["examples"], done["results"]["too_long"]) == (2, 6)
    with pytest.raises(ValueError, match="none of its 8 examples fits into --max_tokens 4"):
        train(tmp_path / "none", tiny, epochs=1, max_tokens=4)


def test_a_run_that_diverges_stops_and_says_where(tiny, tmp_path):
    """A step of 1e30 makes weights that compute NaN."""
    with pytest.raises(ValueError, match=r"step 1: .*nan"):
        train(tmp_path, tiny, lr=1e30, warmup=0, batch_size=4)
    assert not (tmp_path / "out" / "done.json").exists()


def test_out_of_memory_names_one_flag_and_goes_on_from_what_is_saved(tiny, tmp_path, monkeypatch, capsys):
    """After two steps; with that flag it ends as a run that was not stopped, and is not done again without it."""
    monkeypatch.setattr(checkpoint, "PAUSE", 0)
    write_jsonl(tmp_path / "data.jsonl", [{"prompt": prompt, "response": response} for prompt, response in EXAMPLES])
    flags = [f"--model={tiny}", f"--data={tmp_path}/data.jsonl", "--batch_size=2", "--micro_tokens=1024"]
    real, calls = sft.masked_logprobs, []

    def fail(*args):
        calls.append(args)
        if len(calls) == 3:
            raise MemoryError
        return real(*args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(sft, "masked_logprobs", fail)
        runtime.launch(sft.main, sft.Config, [*flags, f"--out={tmp_path}/out"])
    assert "--micro_tokens 512 " in capsys.readouterr().err
    for out, more in (("out", ["--micro_tokens=512"]), ("whole", []), ("out", [])):
        runtime.launch(sft.main, sft.Config, [*flags, *more, f"--out={tmp_path}/{out}"])
    said = capsys.readouterr().out
    assert "goes on after step 2" in said and said.count("skipped") == 1 and not list(tmp_path.glob("*.old*"))
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
