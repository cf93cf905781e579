"""reward.py: the Bradley-Terry loss, calibration, held-out questions, and a reward model that learns its pairs."""

import json
import math
import random

import pytest
import torch
from test_sft import change, descend, on_the_cpu, plain_sgd, tiny_folder  # noqa: F401 (a fixture)

import reward
import runtime
from data import Tokenizer, load_questions, read_jsonl, write_jsonl
from eval import score_responses
from model import ModelConfig, ScalarModel, load_scalar_model
from quality import expected_calibration_error
from reward import bradley_terry_loss, held_out_ids


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


def test_loss_is_the_mean_over_pairs():
    value = bradley_terry_loss(double(1, -1, 0), double(0, 0, 0))
    assert value.shape == () and value.item() == pytest.approx(0.773224, abs=1e-6)
    assert bradley_terry_loss(double(2, 0), double(1, 0)).item() == pytest.approx((0.313262 + 0.693147) / 2, abs=1e-6)
    # swapping the sides negates every margin: 1, -1, 0 has the same mean, 1, 0 has not
    assert bradley_terry_loss(double(1, 0), double(2, 0)).item() == pytest.approx((1.313262 + 0.693147) / 2, abs=1e-6)


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


def test_a_constant_on_all_scores_changes_nothing():
    """So training needs no bias: its gradient is 0."""
    bias = double(0.4)
    chosen, rejected = torch.randn(9, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    value = bradley_terry_loss(chosen + bias, rejected + bias)
    value.backward()
    assert value.item() == pytest.approx(bradley_terry_loss(chosen, rejected).item(), abs=1e-12)
    assert abs(bias.grad.item()) < 1e-12


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


def write_inputs(folder, model, swap=False):
    """60 questions 'i+j?'. Chosen answers end in '#### n', rejected ones in '-n': learnable from one token."""
    folder.mkdir(parents=True, exist_ok=True)
    questions, pairs, samples, rng = [], [], [], random.Random(0)
    for i in range(60):
        a, b = rng.randint(0, 50), rng.randint(0, 50)
        questions.append({"id": f"q{i}", "question": f"{a}+{b}?"})
        for n in rng.sample(range(100), 2):
            good, bad = f"{a}+{b}={n}\n#### {n}", f"{a}+{b}=-{n}\n--- {n}"
            chosen, rejected = (bad, good) if swap else (good, bad)
            pairs.append({"id": f"q{i}", "prompt": f"{a}+{b}?", "chosen": chosen, "rejected": rejected, "weight": 0.5})
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
    assert quality["held_out_pairs"] == len(rows) == 24 and quality["ties"] == 0
    lengths = [[len(Tokenizer(trained / "out").response(row[side])) for row in rows] for side in ("chosen", "rejected")]
    longer = [(c > r) + 0.5 * (c == r) for c, r in zip(*lengths)]
    assert quality["longer_wins"] == pytest.approx(sum(longer) / 24)
    equal = [abs(c - r) <= 0.1 * max(c, r) for c, r in zip(*lengths)]
    assert quality["equal_length_pairs"] == sum(equal) > 0
    assert quality["equal_length_accuracy"] == pytest.approx((margin[torch.tensor(equal)] > 0).float().mean().item())
    assert sum(row["count"] for row in quality["reliability"]) == 24
    assert metrics(trained)[0]["loss"] == pytest.approx(math.log(2), abs=0.4)  # a new head knows nothing
    assert metrics(trained)[-1]["loss"] < 0.1 and metrics(trained)[-1]["accuracy"] == 1


def test_the_order_of_the_pair_is_what_is_learned(trained, tiny, tmp_path):
    reward.main(reward.Config(**write_inputs(tmp_path, tiny, swap=True), **SETTINGS))
    rows = held_out_pairs(trained)
    assert results(tmp_path)["pair_accuracy"] > 0.95
    assert (scores_of(tmp_path, rows, "chosen") < scores_of(tmp_path, rows, "rejected")).float().mean() > 0.95


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


def test_the_students_finished_samples_have_mean_zero_and_deviation_one(trained):
    """Those to known questions; the responses that were cut off are no part of it."""
    rows = [row for row in read_jsonl(trained / "samples.jsonl") if row["finish"] == "stop" and row["id"] != "unknown"]
    scores = scores_of(trained, rows, "response")
    assert abs(scores.mean().item()) < 1e-3
    assert scores.std(correction=0).item() == pytest.approx(1, abs=1e-3)
    model = load_scalar_model(trained / "out")
    assert model.score_mean != 0
    lengths = torch.tensor([len(row["response"]) for row in rows]).float()
    correlation = torch.corrcoef(torch.stack([scores, lengths]))[0, 1].item()
    assert results(trained)["length_correlation"] == pytest.approx(correlation, abs=1e-3)


def test_calibration_error_is_measured_at_the_scale_that_was_trained(tiny, tmp_path, monkeypatch):
    """The scores are divided by the deviation of the samples; confidence is that of the undivided margin."""
    raw = []
    monkeypatch.setattr(reward, "score_responses", lambda *args: raw.append(score_responses(*args)) or raw[-1])
    reward.main(reward.Config(**write_inputs(tmp_path, tiny), **SETTINGS))
    rows = held_out_pairs(tmp_path)
    margin = scores_of(tmp_path, rows, "chosen") - scores_of(tmp_path, rows, "rejected")
    trained_margin = margin * raw[0].std(correction=0)  # the first scores are those of the samples, before the division
    ece = results(tmp_path)["ece"]
    assert ece == pytest.approx(expected_calibration_error(trained_margin), abs=1e-4)
    assert results(tmp_path)["score_std"] == pytest.approx(raw[0].std(correction=0).item())
    assert ece != pytest.approx(expected_calibration_error(margin), abs=1e-2)


def test_padding_and_tokens_after_the_end_do_not_change_a_score(trained):
    model = load_scalar_model(trained / "out")
    row = torch.tensor([[0, 5, 6, 18, 7, 1]])
    alone = model(row)[0, -1]
    for filler in (0, 1, 9):  # the end token among them: the first one counts, by length and not by id
        padded = torch.cat([row, torch.full((1, 7), filler)], dim=1)
        torch.testing.assert_close(model(padded)[0, 5], alone, atol=1e-5, rtol=0)
    neighbours = score_responses(model, [[0, 5, 6, 18], [0]], [[7, 1], [9] * 20 + [1]], 99)
    torch.testing.assert_close(neighbours[0], alone.detach(), atol=1e-5, rtol=0)


def test_a_step_is_the_weighted_mean_of_its_pairs_whatever_the_micro_batch(tiny, tmp_path, monkeypatch):
    """Pairs of different weight, so that any divisor but the weight of the whole step shows."""
    plain_sgd(monkeypatch)
    models = {}
    for size in (1, 100, 9999):
        paths = write_inputs(tmp_path / str(size), tiny)
        rows = [row | {"weight": 1 + i % 3} for i, row in enumerate(read_jsonl(paths["pairs"]))]
        write_jsonl(paths["pairs"], rows)
        reward.main(reward.Config(**paths, batch_size=96, lr=0.1, warmup=0, max_grad_norm=1e9, held_out=0.2,
                                  micro_tokens=size))
        models[size] = load_scalar_model(paths["out"])
    # an independent loss at the start: each response alone
    runtime.seed_all(0)
    model, tokenizer, loss, weights = load_scalar_model(tiny, new_head="normal"), Tokenizer(tiny), 0.0, 0
    held = held_out_ids((row["id"] for row in rows), 0.2)
    for row in rows:
        if row["id"] not in held:
            prompt = tokenizer.chat(row["prompt"])
            chosen, rejected = (model(torch.tensor([prompt + tokenizer.response(row[side])]))[0, -1].item()
                                for side in ("chosen", "rejected"))
            loss += row["weight"] * math.log1p(math.exp(rejected - chosen))
            weights += row["weight"]
    for size, model in models.items():
        [step] = metrics(tmp_path / str(size))
        assert step["loss"] == pytest.approx(loss / weights, abs=1e-5)
        assert change(models[9999], model).abs().max() < 1e-6
    assert change(load_scalar_model(tiny, new_head="zero"), models[9999]).abs().max() > 1e-3


def test_a_whole_run_is_the_loop_that_is_written_out_here(tiny, tmp_path, monkeypatch):
    """Two shuffled epochs with a short last batch, warm-up and decay, clipping, then calibration on a draw of samples.

    Every answer is read alone, with the prompt before it and the end token after it, and scored at that token.
    """
    asked, paths, length = plain_sgd(monkeypatch), write_inputs(tmp_path, tiny), 2.5
    rows = [row | {"weight": 1 + i % 3} for i, row in enumerate(list(read_jsonl(paths["pairs"]))[:40])]
    write_jsonl(paths["pairs"], rows)
    reward.main(reward.Config(**paths, epochs=2, batch_size=12, micro_tokens=200, lr=0.2, warmup=2,
                              max_grad_norm=length, held_out=0.2, calibration_samples=25, seed=3))
    assert asked == [{"betas": (0.9, 0.95), "weight_decay": 0.0, "fused": True}]

    runtime.seed_all(3)
    model, tokenizer = load_scalar_model(tiny, new_head="normal"), Tokenizer(tiny)
    rng = torch.Generator().manual_seed(3)

    def score(prompt, response):
        return model(torch.tensor([tokenizer.chat(prompt) + tokenizer.encode(response) + [1]]))[0, -1]

    def margin(row):
        return score(row["prompt"], row["chosen"]) - score(row["prompt"], row["rejected"])

    held = held_out_ids((row["id"] for row in rows), 0.2)
    trained = [row for row in rows if row["id"] not in held]
    losses, norms, accuracies = [], [], []
    for _ in range(2):
        for batch in torch.randperm(32, generator=rng).split(12):
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
    drawn = [samples[i] for i in torch.randperm(len(samples), generator=rng)[:25]]
    with torch.no_grad():
        scores = torch.stack([score(questions[row["id"]], row["response"]) for row in drawn])
        mean, std = scores.mean(), scores.std(correction=0)
        margins = torch.stack([margin(row) for row in rows if row["id"] in held]) / std
        expected = torch.stack([(score(questions[row["id"]], row["response"]) - mean) / std for row in samples])
    torch.testing.assert_close(scores_of(tmp_path, samples, "response"), expected, atol=1e-3, rtol=1e-3)
    assert results(tmp_path)["pair_accuracy"] == pytest.approx((margins > 0).float().mean().item())
    assert results(tmp_path)["margin"] == pytest.approx(margins.mean().item(), abs=1e-3)
    done = json.loads((tmp_path / "out" / "done.json").read_text())
    assert done["flops"] == 6 * done["tokens"] * sum(p.numel() for p in model.parameters())
    read = sum(len(tokenizer.chat(row["prompt"])) + len(tokenizer.response(row[side]))
               for row in trained for side in ("chosen", "rejected"))
    assert done["tokens"] == 2 * read


def test_a_constant_reward_model_is_never_right_and_stays_finite(tiny, tmp_path, monkeypatch):
    """A tie is wrong: accuracy 0 and not one half. Its samples have no deviation to divide by."""
    monkeypatch.setattr(torch.optim, "AdamW", lambda params, **_: torch.optim.SGD(params, lr=0.0))
    monkeypatch.setattr(runtime, "set_lr", lambda optimizer, lr: None)
    monkeypatch.setattr(reward, "load_scalar_model", lambda *_, new_head: load_scalar_model(tiny, new_head="zero"))
    reward.main(reward.Config(**write_inputs(tmp_path, tiny)))
    assert results(tmp_path)["pair_accuracy"] == 0 and results(tmp_path)["ties"] == 1
    assert metrics(tmp_path)[0]["loss"] == pytest.approx(math.log(2)) and metrics(tmp_path)[0]["accuracy"] == 0
    rows = list(read_jsonl(tmp_path / "samples.jsonl"))[:4]
    assert scores_of(tmp_path, rows, "response").tolist() == [0, 0, 0, 0]


def test_scores_that_differ_in_the_third_digit_do_not_tie():
    """Of 10.01 and 10.02 bf16 would make one number, 10; the head is read in fp32 whatever the weights are."""
    model = ScalarModel(ModelConfig(9, 8, 8, 1, 1, 1, 8)).bfloat16()
    hidden = torch.eye(8)[:2].bfloat16()[None]  # (1, 2, D)
    hidden[0, 1, 0] = 1
    del model.model
    model.model = lambda tokens, read: hidden
    model.score.weight.data = torch.tensor([[10.0, 0.01] + [0.0] * 6]).bfloat16()
    first, second = model(torch.zeros(1, 2, dtype=torch.long))[0].tolist()
    assert second - first == pytest.approx(0.01, abs=1e-4)


def test_a_question_set_may_be_named_instead_of_being_a_file(tiny, tmp_path, monkeypatch):
    """'arith:train' is a question set to every script, as load_questions says."""
    paths = write_inputs(tmp_path, tiny)
    questions = load_questions(paths["questions"])
    monkeypatch.setattr(reward, "load_questions", lambda spec: questions)
    reward.main(reward.Config(**paths | {"questions": "arith:train"}))
    assert (tmp_path / "out" / "done.json").is_file()


def test_too_few_samples_to_calibrate_on_is_an_error(tiny, tmp_path):
    paths = write_inputs(tmp_path, tiny)
    write_jsonl(tmp_path / "samples.jsonl", [{"id": "q0", "response": "####", "finish": "length"}] * 5)
    with pytest.raises(ValueError, match="0 finished responses, too few to calibrate on"):
        reward.main(reward.Config(**paths))


def test_pairs_of_a_single_question_cannot_be_both_trained_and_held_out(tiny, tmp_path):
    paths = write_inputs(tmp_path, tiny)
    write_jsonl(tmp_path / "pairs.jsonl", [row for row in read_jsonl(tmp_path / "pairs.jsonl") if row["id"] == "q0"])
    with pytest.raises(ValueError, match="0 pairs to train on and 2 held out"):
        reward.main(reward.Config(**paths))


@pytest.mark.parametrize(("flag", "value"), [("epochs", 0), ("lr", 0.0), ("held_out", 1.0), ("held_out", 0.0)])
def test_a_flag_out_of_range_is_named(tiny, tmp_path, flag, value):
    with pytest.raises(ValueError, match=f"--{flag}"):
        reward.main(reward.Config(**write_inputs(tmp_path, tiny), **{flag: value}))
