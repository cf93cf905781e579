"""reward.py: the Bradley-Terry loss, calibration, held-out questions, and a reward model that learns its pairs."""

import json
import random

import pytest
import torch
from test_sft import change, descend, on_the_cpu, plain_sgd, tiny_folder  # noqa: F401 (a fixture)

import ppo
import reward
from data import Question, Tokenizer, read_jsonl, write_jsonl
from model import ModelConfig, ScalarModel, load_scalar_model
from quality import expected_calibration_error
from reward import bradley_terry_loss, held_out_ids, make_score, score_responses
from runtime import flags, seed_of, steps


def double(*numbers):
    return torch.tensor(numbers, dtype=torch.float64, requires_grad=True)


# ---- the loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("margin", "loss", "slope"), [
    (1.0, 0.313262, -0.268941), (-1.0, 1.313262, -0.731059), (0.0, 0.693147, -0.5)])
def test_loss_and_gradient_of_one_pair(margin, loss, slope):
    """-log sigmoid of the margin; the two scores are pulled apart by the same force."""
    chosen, rejected = double(margin + 0.7), double(0.7)
    value = bradley_terry_loss(chosen, rejected)
    value.backward()
    assert value.item() == pytest.approx(loss, abs=1e-6)
    assert chosen.grad.item() == pytest.approx(slope, abs=1e-6)
    assert rejected.grad.item() == pytest.approx(-slope, abs=1e-6)


def test_a_hopeless_margin_has_a_finite_loss_and_a_full_gradient():
    chosen = double(-1000)
    value = bradley_terry_loss(chosen, double(0))
    value.backward()
    assert value.item() == pytest.approx(1000) and chosen.grad.item() == pytest.approx(-1)
    assert bradley_terry_loss(double(1000), double(0)).item() == 0


def test_weights_make_questions_count_alike():
    """Question A has one pair with margin 0, B six pairs with margin 1: by question .503205, by pair .367531."""
    chosen, rejected = double(0, 1, 1, 1, 1, 1, 1), torch.zeros(7, dtype=torch.float64)
    by_question = bradley_terry_loss(chosen, rejected, torch.tensor([1.0] + [1 / 6] * 6, dtype=torch.float64))
    assert by_question.item() == pytest.approx(0.503205, abs=1e-6)
    assert bradley_terry_loss(chosen, rejected).item() == pytest.approx(0.367531, abs=1e-6)
    by_question.backward()
    assert chosen.grad[:2].tolist() == pytest.approx([-0.5 / 2, -0.268941 / 12], abs=1e-6)


# ---- measuring -----------------------------------------------------------------------------------------------------


def test_held_out_questions_are_a_share_of_the_different_ids_whatever_their_order():
    ids = [f"q{i}" for i in range(50)]
    held = held_out_ids(ids, 0.2)
    assert len(held) == 10 and held < set(ids)
    shuffled = ids * 3 + sorted(held)[:1] * 60  # questions with many pairs count once
    random.Random(0).shuffle(shuffled)
    assert held_out_ids(shuffled, 0.2) == held
    assert held_out_ids(ids, 0.1) < held  # the smaller share is a part of the larger
    assert held not in [set(order[:10]) for order in (ids, ids[::-1], sorted(ids), sorted(ids)[::-1])]
    assert len(held_out_ids(["a", "b"], 0.01)) == 1


# ---- the script ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("reward") / "tiny")


def write_inputs(folder, model):
    """60 questions 'i+j?'. Chosen answers end in '#### n', rejected ones in '-n': learnable from one token."""
    folder.mkdir(parents=True, exist_ok=True)
    questions, pairs, samples, rng = [], [], [], random.Random(0)
    for i in range(60):
        a, b = rng.randint(0, 50), rng.randint(0, 50)
        questions.append({"id": f"q{i}", "question": f"{a}+{b}?"})
        for n in rng.sample(range(100), 2):
            good, bad = f"{a}+{b}={n}\n#### {n}", f"{a}+{b}=-{n}\n--- {n}"
            pairs.append({"id": f"q{i}", "prompt": f"{a}+{b}?", "chosen": good, "rejected": bad, "weight": 0.5})
        samples.append({"id": f"q{i}", "response": good if i % 3 else bad, "finish": "stop"})
        samples.append({"id": f"q{i}", "response": "=" * 20, "finish": "length"})  # cut off: PPO never scores one
    samples.append({"id": "unknown", "response": "####", "finish": "stop"})
    for name, rows in (("questions", questions), ("pairs", pairs), ("samples", samples)):
        write_jsonl(folder / f"{name}.jsonl", rows)
    return {"model": model, "pairs": str(folder / "pairs.jsonl"), "calibrate": str(folder / "samples.jsonl"),
            "questions": str(folder / "questions.jsonl"), "out": str(folder / "out")}


def results(folder):
    return json.loads((folder / "out" / "done.json").read_text())["results"]


def metrics(folder):
    return [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]


def scores_of(folder, rows, key):
    """By the saved model, one row at a time."""
    model, tokenizer = load_scalar_model(folder / "out"), Tokenizer(folder / "out")
    questions = {row["id"]: row["question"] for row in read_jsonl(folder / "questions.jsonl")}
    with torch.no_grad():
        ids = [tokenizer.chat(questions[row["id"]]) + tokenizer.response(row[key]) for row in rows]
        return torch.stack([model(torch.tensor([row]))[0, -1] for row in ids])


SETTINGS = {"epochs": 4, "batch_size": 16, "lr": 3e-3, "held_out": 0.2}


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward") / "run"
    reward.main(reward.Config(**write_inputs(folder, tiny), **SETTINGS))
    return folder


def held_out_pairs(folder):
    rows = list(read_jsonl(folder / "pairs.jsonl"))
    held = held_out_ids((row["id"] for row in rows), 0.2)
    return [row for row in rows if row["id"] in held]


def test_chosen_outscores_rejected_on_questions_that_were_not_trained(trained):
    """By the saved model, loaded again: it gives the same margins that were reported."""
    rows = held_out_pairs(trained)
    margin = scores_of(trained, rows, "chosen") - scores_of(trained, rows, "rejected")
    quality = results(trained)
    assert (margin > 0).float().mean() > 0.95
    assert quality["pair_accuracy"] == pytest.approx((margin > 0).float().mean().item())
    assert quality["margin"] == pytest.approx(margin.mean().item(), abs=1e-4)
    assert quality["held_out_pairs"] == len(rows) == 24
    assert metrics(trained)[-1]["loss"] < 0.1 and metrics(trained)[-1]["accuracy"] == 1


def test_held_out_questions_measure_and_do_not_train(trained, tiny, tmp_path):
    """With their pairs turned round, the weights are the same to the bit and every verdict is the opposite."""
    paths, held = write_inputs(tmp_path, tiny), {row["id"] for row in held_out_pairs(trained)}
    turned = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} if row["id"] in held else row
              for row in read_jsonl(paths["pairs"])]
    write_jsonl(paths["pairs"], turned)
    reward.main(reward.Config(**paths, **SETTINGS))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (trained / "out" / "model.safetensors").read_bytes()
    assert results(tmp_path)["pair_accuracy"] == pytest.approx(1 - results(trained)["pair_accuracy"])
    assert results(tmp_path)["margin"] == pytest.approx(-results(trained)["margin"])


@pytest.mark.parametrize(("flag", "value"), [
    ("micro_tokens", 1), ("gradient_checkpointing", True)])
def test_a_whole_run_is_the_loop_that_is_written_out_here(tiny, tmp_path, monkeypatch, flag, value):
    """Two shuffled epochs with a short last batch, warm-up and decay, clipping, then calibration on a draw of samples.

    Every answer is read alone, with the prompt before it and the end token after it, and scored at that token. Pairs
    differ in weight, so that any divisor but the weight of the whole step shows.
    """
    asked, paths, length = plain_sgd(monkeypatch), write_inputs(tmp_path, tiny), 2.5
    rows = [row | {"weight": 1 + i % 3} for i, row in enumerate(list(read_jsonl(paths["pairs"]))[:40])]
    write_jsonl(paths["pairs"], rows)
    reward.main(reward.Config(**paths, epochs=2, batch_size=12, lr=0.2, warmup=2, max_grad_norm=length, held_out=0.2,
                              calibration_samples=25, seed=3, **{flag: value}))
    assert [(settings["betas"], settings["weight_decay"]) for settings in asked] == [((0.9, 0.95), 0.0)]

    model, tokenizer = load_scalar_model(tiny, new_head="normal", seed=seed_of(3, "head")), Tokenizer(tiny)

    def score(prompt, response):
        return model(torch.tensor([tokenizer.chat(prompt) + tokenizer.encode(response) + [1]]))[0, -1]

    def margin(row):
        return score(row["prompt"], row["chosen"]) - score(row["prompt"], row["rejected"])

    held = held_out_ids((row["id"] for row in rows), 0.2)
    trained = [row for row in rows if row["id"] not in held]
    losses, norms, accuracies = [], [], []
    for epoch in range(2):
        order = steps.permutation(32, 3, "reward", epoch)
        for batch in (order[:12], order[12:24], order[24:]):
            batch = [trained[i] for i in batch]
            margins, weights = torch.stack([margin(row) for row in batch]), [row["weight"] for row in batch]
            loss = (torch.log1p((-margins).exp()) * torch.tensor(weights)).sum() / sum(weights)
            loss.backward()
            losses.append(loss.item())
            accuracies.append((margins > 0).float().mean().item())
            norms.append(descend(model, 0.2 * [0.5, 1, 1, 0.75, 0.5, 0.25][len(norms)], length))
    assert min(norms) < length < max(norms)  # some steps are clipped and some are not
    for name, expected in (("loss", losses), ("accuracy", accuracies), ("grad_norm", norms)):
        assert [m[name] for m in metrics(tmp_path)] == pytest.approx(expected, rel=1e-3), name

    samples = [row for row in read_jsonl(paths["calibrate"]) if row["finish"] == "stop" and row["id"] != "unknown"]
    questions = {row["id"]: row["question"] for row in read_jsonl(paths["questions"])}
    drawn = [samples[i] for i in steps.permutation(len(samples), 3, "calibrate")[:25]]
    with torch.no_grad():
        scores = torch.stack([score(questions[row["id"]], row["response"]) for row in drawn])
        mean, std = scores.mean(), scores.std(correction=0)
        margins = torch.stack([margin(row) for row in rows if row["id"] in held])
        expected = torch.stack([(score(questions[row["id"]], row["response"]) - mean) / std for row in samples])
    torch.testing.assert_close(scores_of(tmp_path, samples, "response"), expected, atol=1e-3, rtol=1e-3)
    found = results(tmp_path)
    assert found["pair_accuracy"] == pytest.approx((margins > 0).float().mean().item())
    assert found["margin"] == pytest.approx((margins / std).mean().item(), abs=1e-3)
    assert found["score_std"] == pytest.approx(std.item(), rel=1e-3)
    # confidence is that of the margin as it was trained, before it was divided
    assert found["ece"] == pytest.approx(expected_calibration_error(margins), abs=1e-3)
    assert found["ece"] != pytest.approx(expected_calibration_error(margins / std), abs=1e-2)
    done = json.loads((tmp_path / "out" / "done.json").read_text())
    assert done["flops"] == 6 * done["tokens"] * sum(p.numel() for p in model.parameters())
    read = sum(len(tokenizer.chat(row["prompt"])) + len(tokenizer.response(row[side]))
               for row in trained for side in ("chosen", "rejected"))
    assert done["tokens"] == 2 * read


def test_a_constant_reward_model_stays_finite(tiny):
    """Its samples have no deviation to divide by."""
    model = load_scalar_model(tiny, new_head="zero")
    reward.calibrate(model, torch.full((4,), 0.5))
    assert score_responses(model, [[0, 5]] * 2, [[7, 1], [8, 9, 1]], 99).isfinite().all()


# ---- scores --------------------------------------------------------------------------------------------------------


def test_padding_and_tokens_after_the_end_do_not_change_a_score(trained):
    model = load_scalar_model(trained / "out")
    row = torch.tensor([[0, 5, 6, 18, 7, 1]])
    alone = model(row)[0, -1].item()
    for filler in (0, 1, 9):  # the end token among them: the first one counts, by length and not by id
        padded = torch.cat([row, torch.full((1, 7), filler)], dim=1)
        assert model(padded)[0, 5].item() == pytest.approx(alone, abs=1e-5)
    for micro_tokens in (1, 99):
        scores = score_responses(model, [[0], [0, 5, 6, 18]], [[9] * 20 + [1], [7, 1]], micro_tokens)
        assert scores[1].item() == pytest.approx(alone, abs=1e-5) and scores[0].item() != pytest.approx(alone, abs=1e-3)


def test_scores_that_differ_in_the_third_digit_do_not_tie():
    """Of 10.01 and 10.02 bf16 would make one number, 10; the head is read in fp32 whatever the weights are."""
    model = ScalarModel(ModelConfig(9, 8, 8, 1, 1, 1, 8)).bfloat16()
    hidden = torch.eye(8)[:2].bfloat16()[None]  # (1, 2, D)
    hidden[0, 1, 0] = 1
    del model.model
    model.model = lambda tokens, keep: hidden
    model.score.weight.data = torch.tensor([[10.0, 0.01] + [0.0] * 6]).bfloat16()
    first, second = model(torch.zeros(1, 2, dtype=torch.long))[0].tolist()
    assert second - first == pytest.approx(0.01, abs=1e-4)


@pytest.mark.parametrize(("flags", "known", "expected"), [
    ({"votes": True}, "q0 q1 q2", [1, -1, -1, -1, 1, 1, -1, -1]),
    ({"votes": True, "lenient": True}, "q0 q1 q2", [1, 1, -1, -1, 1, 1, -1, -1]),  # a bare 7 too
    ({"gold": True}, "q1 q3", [-1, -1, 1, -1, -1, -1, -1, -1]),
])
def test_without_a_reward_model_an_answer_scores_plus_or_minus_one(tmp_path, flags, known, expected):
    """By the vote, 7, or by the gold answer, 8. Only questions whose answer is known are asked."""
    if flags.pop("votes", False):
        flags["votes"] = str(tmp_path / "votes.jsonl")
        write_jsonl(tmp_path / "votes.jsonl", [{"id": f"q{i}", "vote": "7"} for i in (2, 1, 0, 0)])
    questions = [Question(f"q{i}", "?", "8" if i % 2 else None) for i in range(5)]
    score, asked = make_score(ppo.Config("p", "q", "o", **flags), questions, None)
    assert [question.id for question in asked] == known.split()
    texts = ["#### 7", "7", "#### 8", "no idea", "#### 7.0", "A: 7", "", "#### 77"]
    assert score([asked[1]] * 8, None, None, texts).tolist() == expected


def test_a_reward_may_be_the_users_own_function(tmp_path):
    """It gets questions, token ids and texts of each answer; another number of scores than answers is refused."""
    (tmp_path / "mine.py").write_text(
        "def score(questions, prompts, responses, texts):\n"
        "    return [len(q.id) + 10 * p[0] + 100 * len(r) + 1000 * len(t)\n"
        "            for q, p, r, t in zip(questions, prompts, responses, texts)]\n"
        "def one(*_): return [1.0]\n")
    questions = [Question("q", "?"), Question("qq", "?")]
    asked = (questions, [[1], [2]], [[5], [5, 5]], ["a", "bcd"])
    cfg = ppo.Config("p", "q", "o", reward=f"{tmp_path}/mine.py:score")
    assert flags.inputs(cfg)["reward"] == f"{tmp_path}/mine.py"  # so that a changed file redoes the stage
    score, kept = make_score(cfg, questions, None)
    assert kept == questions and score(*asked).tolist() == [1111, 3222]
    score, _ = make_score(ppo.Config("p", "q", "o", reward=f"{tmp_path}/mine.py:one"), questions, None)
    with pytest.raises(ValueError, match=r"mine\.py:one.*2 answers"):
        score(*asked)
