"""The changes of docs/modify.md: each patch applies, does what it says, and runs for two iterations."""

import re
import shutil
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from mutants import ROOT
from test_chat import conversations, variant
from test_sft import tiny_folder

from data import read_jsonl, write_jsonl

pytestmark = pytest.mark.project
PATCHES = sorted(path.stem for path in ROOT.glob("docs/patches/*.patch"))
PAGE = (ROOT / "docs" / "modify.md").read_text(encoding="utf-8")
ROOMS = [path.parent.name for path in ROOT.glob("*/__init__.py")]
OURS = {*ROOMS, *(path.stem for path in ROOT.glob("*.py"))}  # modules that a patched copy has too
NAN = float("nan")


def forget():
    """Take the project's modules out of sys.modules; what was taken."""
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in OURS}


@pytest.fixture
def patched(tmp_path, monkeypatch):
    """patched(*patches): imports a module from a copy with these patches. Afterwards all is as before."""
    kept = forget()

    def apply(*patches):
        copy = tmp_path / "patched project"
        for room in ROOMS:
            shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
        for script in ROOT.glob("*.py"):
            shutil.copy(script, copy)
        shutil.copy(ROOT / "train_all.sh", copy)
        for patch in patches:
            subprocess.run(["git", "apply", ROOT / "docs" / "patches" / f"{patch}.patch"], cwd=copy, check=True)
        monkeypatch.syspath_prepend(copy)
        return import_module

    yield apply
    forget()
    sys.modules.update(kept)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random model that ends about half of its answers in time."""
    return tiny_folder(tmp_path_factory.mktemp("patches") / "tiny")


def run(module, folder, model, **flags):
    """ppo.py on six questions for two iterations, rewarded for length; its metrics."""
    folder.mkdir()
    write_jsonl(folder / "questions.jsonl", [{"id": f"q{i}", "question": f"{i}+{i}?"} for i in range(6)])
    (folder / "my_reward.py").write_text("def by_length(q, p, responses, t): return [len(r) / 4 for r in responses]\n")
    flags = dict(policy=str(model), questions=str(folder / "questions.jsonl"), out=str(folder / "out"), iterations=2,
                 reward=f"{folder}/my_reward.py:by_length", rollout_size=8, minibatches=2, max_new_tokens=8,
                 lr=1e-2) | flags
    ppo = module("ppo")
    ppo.main(ppo.Config(**flags))
    metrics = list(read_jsonl(folder / "out" / "metrics.jsonl"))
    assert len(metrics) == 2 and metrics[1]["objective/kl"] != 0  # it has learned
    assert metrics[0]["val/ratio_first_gap"] < 1e-4  # rollout and update still agree
    return metrics


@pytest.mark.parametrize("patch", PATCHES)
def test_a_patch_is_short_and_the_page_has_it(patch):
    lines = len((ROOT / "docs" / "patches" / f"{patch}.patch").read_text(encoding="utf-8").splitlines())
    assert lines <= 60 and re.search(rf"\(patches/{patch}\.patch\) \|.*\| {lines} \|", PAGE)


@pytest.mark.parametrize("patches", [["grpo"], ["grpo", "kl_loss"]])
def test_grpo_compares_the_answers_to_one_question(patched, patches, tiny, tmp_path, monkeypatch):
    module = patched(*patches)
    ppo = module("ppo")
    mask = torch.tensor([[True, True, False]] * 4 + [[False, True, True]] * 4)
    rewards = torch.zeros(8, 3).masked_scatter(mask, torch.arange(16.0) ** 2)  # of each row another sum
    rewards[7] = rewards[6]
    advantages = ppo.group_advantages(rewards, mask, 4)
    rows = advantages.sum(1) / 2  # two tokens each
    assert (advantages == torch.where(mask, rows[:, None], 0)).all()
    assert rows.view(2, 4).sum(1).abs().max() < 1e-5 and (rows.view(2, 4).square().mean(1) - 1).abs().max() < 1e-3
    assert rows[0] < rows[1] < rows[2] < rows[3] and rows[4] < rows[5] < rows[6] == rows[7]
    assert ppo.group_advantages(mask * 1.0, mask, 4).abs().max() == 0  # all earn the same
    asked, real = [], ppo.rollout
    monkeypatch.setattr(ppo, "rollout", lambda *args: asked.append([q.id for q, _ in args[5]]) or real(*args))
    for row in run(module, tmp_path / "run", tiny):
        assert not {name for name in row if "value" in name or "critic" in name or "explained" in name}
    assert all(ids[:4] == ids[:1] * 4 and ids[4:] == ids[4:5] * 4 and ids[0] != ids[4] for ids in asked)
    run(module, tmp_path / "odd", tiny, group=3)
    assert len(asked[-1]) == 6


def test_a_length_penalty_is_in_the_score(patched, tiny, tmp_path):
    module = patched("length_penalty")
    plain, short = (run(module, tmp_path / f"{c}", tiny, length_coef=c)[0] for c in (0.0, 0.5))
    lost = 0.5 * plain["response_length/mean"]
    assert short["objective/scores"] == pytest.approx(plain["objective/scores"] - lost) and lost > 0.5


def test_the_kl_is_in_the_loss_and_not_in_the_reward(patched, tiny, tmp_path, monkeypatch):
    module = patched("kl_loss")
    ppo = module("ppo")
    logprobs = torch.tensor([[NAN, -1.0, -1.0, NAN]], requires_grad=True)
    reference, mask = torch.tensor([[0.0, -0.3068528, -1.6931472, NAN]]), torch.tensor([[False, True, True, False]])
    loss = ppo.kl_loss(logprobs, reference, mask, 2)  # the reference gives twice and half the probability
    loss.backward()
    assert loss.item() == pytest.approx((0.3068528 + 0.1931472) / 2)
    assert logprobs.grad[0].tolist() == pytest.approx([0, -0.5, 0.25, 0])  # towards the reference
    assert ppo.kl_loss(torch.randn(9, 9), torch.randn(9, 9), torch.ones(9, 9) > 0, 1) > 0
    earned, real = [], ppo.shape_rewards
    monkeypatch.setattr(ppo, "shape_rewards", lambda *a, **k: earned.append((a[0], real(*a, **k))) or earned[-1][1])
    free, held = (run(module, tmp_path / f"{c}", tiny, kl_coef=c, epochs=8, lr=1e-3)[0] for c in (0.0, 50.0))
    assert free["loss/policy_avg"] < 0.05 < held["loss/policy_avg"]  # a KL is positive, and it is added
    assert all(torch.equal(rewards.sum(1), scores) for scores, rewards in earned)


def test_top_p_draws_from_the_nucleus_alone(patched, tiny, tmp_path):
    module = patched("top_p")
    generate = module("generate")
    logits = torch.tensor([[0.3, 0.5, 0.2], [0.05, 0.05, 0.9]]).log()
    kept = lambda top_p, temperature=1.0: generate.nucleus(logits, temperature, top_p).isfinite().int().tolist()
    assert kept(0.6) == [[1, 1, 0], [0, 0, 1]] and kept(0.99) == [[1, 1, 1], [1, 1, 1]]
    assert kept(0.0) == kept(0.4) == [[0, 1, 0], [0, 0, 1]]
    assert kept(0.6, 0.1) == [[0, 1, 0], [0, 0, 1]]  # of the probabilities at that temperature
    token, logprob = generate.sample_token(generate.nucleus(logits[:1], 1.0, 0.6), 1.0, torch.tensor([0.9]).double())
    assert (token.item(), logprob.item()) == (1, pytest.approx(-0.4700036))  # ln(0.5 / 0.8)
    write_jsonl(tmp_path / "questions.jsonl", [{"question": f"{i}+{i}?"} for i in range(2)])
    said = {}
    for top_p in (1e-6, 0.5, 1.0):
        out = tmp_path / f"{top_p}"
        generate.main(generate.Config(str(tiny), str(tmp_path / "questions.jsonl"), str(out), samples=4,
                                      max_new_tokens=8, top_p=top_p))
        said[top_p] = list(read_jsonl(out / "samples.jsonl"))
    assert {row["logprob"] for row in said[1e-6]} == {0} and len({row["response"] for row in said[1e-6]}) <= 2
    assert sum(row["logprob"] for row in said[0.5]) > sum(row["logprob"] for row in said[1.0])
    run(module, tmp_path / "ppo", tiny)


def test_margin_and_smoothing_keep_the_gap_finite(patched, tiny, tmp_path):
    module = patched("margin_and_smoothing")
    reward = module("reward")
    gap = torch.tensor([2.0, 0.0], requires_grad=True)
    loss_of = lambda **options: reward.bradley_terry_loss(gap, torch.zeros(2), **options)
    assert loss_of().item() == pytest.approx((0.1269280 + 0.6931472) / 2)
    assert loss_of(margin=1.0).item() == pytest.approx((0.3132617 + 1.3132617) / 2)
    assert loss_of(smoothing=0.25).item() == pytest.approx((0.75 * 0.126928 + 0.25 * 2.126928 + 0.6931472) / 2)
    best = torch.tensor([2.1972246], requires_grad=True)  # ln(0.9 / 0.1): no lead is worth more
    reward.bradley_terry_loss(best, torch.zeros(1), smoothing=0.1).backward()
    assert best.grad.abs() < 1e-6
    write_jsonl(tmp_path / "questions.jsonl", [{"id": f"q{i}", "question": f"{i}+{i}?"} for i in range(4)])
    write_jsonl(tmp_path / "pairs.jsonl", [
        {"id": f"q{i % 4}", "prompt": f"{i}+{i}?", "chosen": f"#### {2 * i}", "rejected": "no"} for i in range(16)])
    write_jsonl(tmp_path / "samples.jsonl", [
        {"id": f"q{i % 4}", "response": f"#### {i}", "finish": "stop"} for i in range(8)])
    losses = {}
    for margin, smoothing in ((0.0, 0.0), (2.0, 0.0), (0.0, 0.5)):
        out = tmp_path / f"{margin} {smoothing}"
        reward.main(reward.Config(str(tiny), *(str(tmp_path / f"{name}.jsonl") for name in (
            "pairs", "samples", "questions")), str(out), batch_size=6, margin=margin, smoothing=smoothing))
        losses[margin, smoothing] = [row["loss"] for row in read_jsonl(out / "metrics.jsonl")]
    assert len(losses[0.0, 0.0]) == 2 and losses[2.0, 0.0][0] > losses[0.0, 0.0][0]


TULU = (  # open-instruct's
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ '<|system|>\n' + message['content'] + '\n' }}"
    "{% elif message['role'] == 'user' %}{{ '<|user|>\n' + message['content'] + '\n' }}"
    "{% elif message['role'] == 'assistant' %}{% if not loop.last %}"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token + '\n' }}{% else %}"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}{% endif %}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}")


@pytest.mark.parametrize("begin", ["", "{{ bos_token }}"])
def test_the_template_of_another_family(patched, begin, model_folder, tmp_path):
    """Token for token as transformers renders it; and PPO answers in it."""
    transformers = pytest.importorskip("transformers")
    module = patched("tulu_template")
    config = {"chat_template": begin + TULU, "eos_token": "<|end_of_text|>"}
    folder = variant(model_folder, tmp_path / "tulu", config=config)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(model_folder / name, folder)
    ours, theirs = module("hf.tokenizer").Tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for messages, opened in conversations():
        expected = theirs.apply_chat_template(messages, add_generation_prompt=opened, return_dict=False)
        assert ours.render(messages, opened) == expected, (messages, opened)
    run(module, tmp_path / "run", folder, max_new_tokens=40)


def test_the_page_s_own_reward(tiny, tmp_path):
    """The function of docs/modify.md, and a run that climbs it."""
    [code] = re.findall(r"```python\n(import re\n.*?)```", PAGE, re.DOTALL)
    (tmp_path / "days.py").write_text(code)
    found = {}
    exec(code, found)
    from data import Question
    question = Question("q", "Ava has 3 pens. On Monday Ava buys 2. On Friday Ava loses 1. How many pens?")
    texts = ["Monday 3+2=5\nFriday 5-1=4\n#### 4", "Friday 3-1=2\n#### 2", "Friday 3-1=2\nMonday 2+2=4\n#### 4", ""]
    assert found["days"]([question] * 4, None, None, texts) == [1, 0, 0, 0]
    metrics = run(import_module, tmp_path / "run", tiny, reward=f"{tmp_path}/days.py:days")
    assert metrics[0]["objective/scores_max"] <= 1
