"""ppo.py: every number of the algorithm by hand, a known optimum, whole runs against a plain loop, and
what an update must leave alone."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from test_sft import change, descend, on_the_cpu, plain_sgd, tiny_folder  # noqa: F401 (a fixture)

import ppo
from answers import extract_answer
from data import Question, Tokenizer, read_jsonl, write_jsonl
from generate import generate, prompts_of
from model import load_model, load_scalar_model, save_model
from ppo import gae, policy_loss, shape_rewards, value_loss, whiten
from runtime import seed_of, steps


def row(*numbers, grad=False):
    """One row (1, T) in float64."""
    return torch.tensor([numbers], dtype=torch.float64, requires_grad=grad)


def mask_of(bits):
    return torch.tensor([[bit == "1" for bit in bits]])


def near(*numbers):
    return pytest.approx(list(numbers), abs=1e-6)


NAN = float("nan")

# ---- rewards -------------------------------------------------------------------------------------------------------


def test_the_score_enters_once_at_the_end_token_and_the_kl_at_every_token():
    """Differences [1, 2, 3], coefficient .1, score 1: [-.1, -.2, .7, 0, 0], in all .4 = score - .1 * 6."""
    rewards = shape_rewards(torch.tensor([1.0]), row(1, 2, 3, 0, 0), row(0, 0, 0, 0, 0), mask_of("11100"), 0.1)
    assert rewards[0].tolist() == near(-0.1, -0.2, 0.7, 0, 0)
    # the sign is that of the reference: a token likelier under it earns
    rewards = shape_rewards(torch.tensor([-2.0]), row(-3, -1), row(-1, -2), mask_of("11"), 0.5)
    assert rewards[0].tolist() == near(1.0, -0.5 - 2)


def test_rewards_of_rows_of_different_length_and_with_a_prompt():
    scores = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    mask = torch.cat([mask_of("00110"), mask_of("11111"), mask_of("01000")])
    zeros = torch.zeros(3, 5, dtype=torch.float64)
    assert shape_rewards(scores, zeros, zeros, mask, 0.1).tolist() == [
        [0, 0, 0, 1, 0], [0, 0, 0, 0, 2], [0, 3, 0, 0, 0]]
    assert shape_rewards(scores, zeros - 1, zeros, mask, 0.1).sum(1).tolist() == near(1.2, 2.5, 3.1)


# ---- advantages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rewards", "values", "gamma", "lam", "advantages"), [
    ((0, 0, 1), (0.5, 0.5, 0.5), 1, 0.95, (0.45125, 0.475, 0.5)),
    ((0, 0, 1), (0.5, 0.5, 0.5), 1, 1, (0.5, 0.5, 0.5)),
    ((0, 0, 1), (0.5, 0.5, 0.5), 1, 0, (0, 0, 0.5)),
    ((1, 2, 3), (0.5, 1, 1.5), 0.9, 0.8, (3.8696, 3.43, 1.5)),
    ((-0.1, -0.2, 0.7), (0, 0, 0), 1, 0.95, (0.34175, 0.465, 0.7)),
    ((0, 0, 1), (0, 0, 0), 1, 0.95, (0.9025, 0.95, 1)),  # the score at the end token is that token's in full
    ((1, 2, 3), (7, -5, 0.3), 1, 1, (-1, 10, 2.7)),  # lam 1: the returns 6, 5, 3 are the sum to come
])
def test_gae_by_hand(rewards, values, gamma, lam, advantages):
    """After the last token the value is 0: a bootstrap of .5 would give .9025, .95, 1 in the first case.

    Returns come from raw advantages.
    """
    mask = mask_of("111")
    a, returns = gae(row(*rewards), row(*values), mask, gamma, lam)
    assert a[0].tolist() == near(*advantages)
    assert returns[0].tolist() == near(*(x + v for x, v in zip(advantages, values)))


def test_gae_does_not_see_the_padding():
    """The critic says 9 after the end; unmasked, the last advantage would be 1.3775 or more."""
    expected = [0.45125, 0.475, 0.5]
    advantages, returns = gae(row(0, 0, 1, 0, 0), row(0.5, 0.5, 0.5, 9, 9), mask_of("11100"), 1, 0.95)
    assert advantages[0].tolist() == near(*expected, 0, 0) and returns[0].tolist() == near(0.95125, 0.975, 1, 0, 0)
    for poison in (NAN, 1e6):
        advantages, returns = gae(row(poison, 0, 0, 1, poison), row(poison, 0.5, 0.5, 0.5, poison), mask_of("01110"),
                                  1, 0.95)
        assert advantages[0].tolist() == near(0, *expected, 0)
        assert returns[0].tolist() == near(0, 0.95125, 0.975, 1, 0)


def test_whitening_gives_mean_zero_and_biased_variance_one_over_the_mask():
    """[1, 2, 3] -> +-1.2247; with three cells of padding counted it would be [0, .866, 1.732]."""
    assert whiten(row(1, 2, 3), mask_of("111"))[0].tolist() == near(-1.224745, 0, 1.224745)
    for poison in (0.0, NAN, 1e6):
        white = whiten(row(poison, 1, 2, 3, poison, poison), mask_of("011100"))
        assert white[0].tolist() == near(0, -1.224745, 0, 1.224745, 0, 0)
    x, mask = 5 + 3 * torch.randn(4, 6, dtype=torch.float64), torch.rand(4, 6) < 0.6
    white = whiten(x, mask)
    assert white[mask].mean().abs() < 1e-9 and white[mask].var(correction=0).item() == pytest.approx(1, abs=1e-6)


def test_whitening_one_token_or_equal_tokens_gives_zeros():
    assert whiten(row(5), mask_of("1")).tolist() == [[0]]
    assert whiten(row(5, 7), mask_of("10")).tolist() == [[0, 0]]
    assert whiten(row(2, 2, 2), mask_of("111")).tolist() == [[0, 0, 0]]
    assert whiten(row(2, 2), mask_of("00")).tolist() == [[0, 0]]


# ---- the policy's loss ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("advantage", "ratio", "loss", "slope", "clipped"), [
    (1, 1.5, -1.2, 0, 1), (-1, 1.5, 1.5, 1.5, 0), (1, 0.5, -0.5, -0.5, 0), (-1, 0.5, 0.8, 0, 1),
    (1, 1, -1, -1, 0), (-2, 1, 2, 2, 0), (1, 1.1, -1.1, -1.1, 0),  # within the clip it is REINFORCE times the ratio
    (-1, 10, 10, 10, 0),  # no second clip: an unlikely bad token that became likely is pushed down in full
])
def test_clipped_surrogate_by_hand(advantage, ratio, loss, slope, clipped):
    """Loss, gradient in the log-prob, and the count of clipped tokens."""
    logprobs = row(-1 + math.log(ratio), grad=True)
    value, count = policy_loss(logprobs, row(-1), row(advantage), mask_of("1"), 0.2, 1)
    value.backward()
    assert value.item() == pytest.approx(loss, abs=1e-6) and count.item() == clipped
    assert logprobs.grad.item() == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize("log_ratio", [100.0, -100.0, 1e4])
def test_an_absurd_ratio_stays_finite(log_ratio):
    logprobs = row(log_ratio, -1, grad=True)
    value, _ = policy_loss(logprobs, row(0, -1), row(-1, 1), mask_of("11"), 0.2, 2)
    value.backward()
    assert value.isfinite() and logprobs.grad.isfinite().all()
    assert value.item() == pytest.approx((math.exp(20) if log_ratio > 0 else 0.8) / 2 - 0.5)
    assert logprobs.grad[0, 1].item() == pytest.approx(-0.5)  # the other token is not disturbed


# ---- the critic's loss ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "value", "target", "clip", "loss", "slope", "clipped"), [
    (0, 1, 1, 0.2, 0.32, 0, 1), (0, 0.1, 1, 0.2, 0.405, -0.9, 0), (0, 1, 1, math.inf, 0, 0, 0),
    (0, 3, 1, math.inf, 2, 2, 0),  # without a clip: half the squared error
    (0, -1, 1, 0.2, 2, -2, 0),  # moved away from the target: the plain error is the larger
    (2, 1, 0.5, 0.2, 0.5 * 1.3**2, 0, 1),  # moved down past the clip
])
def test_clipped_value_loss_by_hand(old, value, target, clip, loss, slope, clipped):
    values = row(value, grad=True)
    result, count = value_loss(values, row(old), row(target), mask_of("1"), clip, 1)
    result.backward()
    assert result.item() == pytest.approx(loss, abs=1e-6) and count.item() == clipped
    assert values.grad.item() == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize("poison", [NAN, 1e6])
@pytest.mark.parametrize("loss_of", [policy_loss, value_loss])
def test_poison_in_masked_cells_changes_neither_loss_nor_gradient(loss_of, poison):
    clean, results, mask = [(0.5, 1.0, -0.5), (0.4, 0.1, -0.6), (1.0, -1.0, 2.0)], [], mask_of("01110")
    for filler in (0.0, poison):
        tensors = [row(filler, *numbers, filler) for numbers in clean]
        tensors[0].requires_grad_()
        loss, count = loss_of(*tensors, mask, 0.2, 3)
        loss.backward()
        results.append((loss.item(), count.item(), tensors[0].grad.tolist()))
    assert results[0] == results[1]
    assert results[1][2][0][0] == results[1][2][0][4] == 0


# ---- a task with a known optimum -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("kl_coef", "optimum"), [(1.0, 0.4754), (0.5, 0.7112)])
def test_a_bandit_converges_to_its_closed_form_optimum(kl_coef, optimum):
    """One-token answers over four tokens, uniform reference: pi* ~ exp(score / kl_coef), e^(1/kl_coef) / (3 + ...).

    A wrong coefficient, a sign or a doubled KL misses it.
    """
    torch.manual_seed(0)
    logits = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.02)
    mask, reference = torch.ones(512, 1, dtype=torch.bool), torch.full((512, 1), -math.log(4))
    good = []
    for _ in range(120):
        old = logits.detach().log_softmax(0)
        tokens = torch.multinomial(old.exp(), 512, replacement=True)  # (512,)
        rewards = shape_rewards((tokens == 0).float(), old[tokens][:, None], reference, mask, kl_coef)
        advantages, _ = gae(rewards, torch.zeros(512, 1), mask, 1.0, 0.95)
        advantages = whiten(advantages, mask)
        for _ in range(2):
            logprobs = logits.log_softmax(0)[tokens][:, None]
            loss, _ = policy_loss(logprobs, old[tokens][:, None], advantages, mask, 0.2, 512)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        good.append(logits.detach().softmax(0)[0].item())
    assert sum(good[-50:]) / 50 == pytest.approx(optimum, abs=0.015)


# ---- a rollout of real models --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("ppo") / "tiny")


@pytest.fixture(scope="module")
def scorer(tiny, tmp_path_factory):
    """A random reward model's folder."""
    folder = tmp_path_factory.mktemp("ppo") / "scorer"
    model = load_scalar_model(tiny, new_head="normal", seed=1)
    model.score_mean = 0.3
    save_model(model, folder)
    Tokenizer(tiny).save(folder)
    return str(folder)


QUESTIONS = [Question(f"q{i}", "+".join("123456789"[: 1 + i % 5]) + "?") for i in range(8)]  # prompts of five lengths


def config(**changes):
    """One optimiser step of the whole rollout unless a test asks for more."""
    return ppo.Config("p", "q", "o", **dict(rollout_size=8, minibatches=1, micro_tokens=50, max_new_tokens=10,
                                            max_grad_norm=1e9) | changes)


def by_position(questions, prompts, responses, texts):
    return torch.arange(len(texts)) / 4 - 1


def models(tiny, scorer):
    return load_model(tiny), load_model(tiny).requires_grad_(False), load_scalar_model(scorer)


def sample(cfg, tiny, scorer, score=by_position, iteration=3):
    (policy, reference, _), tokenizer = models(tiny, scorer), Tokenizer(tiny)
    asked = list(zip(QUESTIONS, prompts_of(policy.config, tokenizer, QUESTIONS, cfg.max_new_tokens)))
    return ppo.rollout(cfg, policy, reference, score, tokenizer, asked, iteration)


def test_the_rollout_mask_is_the_sampled_tokens_with_the_end_token_and_nothing_after_it(tiny, scorer):
    r, tokenizer = sample(config(), tiny, scorer), Tokenizer(tiny)
    assert 0 < r.ended.sum() < 8  # of both kinds
    for b, question in enumerate(QUESTIONS):
        prompt = tokenizer.chat(question.prompt)
        assert r.tokens[b, : len(prompt)].tolist() == prompt
        response = r.tokens[b, 1:][r.mask[b]].tolist()
        first, last = r.mask[b].nonzero()[[0, -1], 0].tolist()
        assert first == len(prompt) - 1 and last == first + len(response) - 1  # without a gap
        assert (response[-1] == tokenizer.end_id) == r.ended[b] and tokenizer.end_id not in response[:-1]
        assert len(response) == 10 or r.ended[b]
        assert r.texts[b] == tokenizer.decode(response) and r.lengths[b] == len(prompt) + len(response)


def test_the_log_probs_are_those_of_the_tempered_softmax_that_was_sampled(tiny, scorer, monkeypatch, temperature=0.6):
    """Against the sampler's own numbers, and against one unpadded row at a time; the reference likewise."""
    sampled, real = [], ppo.answers_to
    monkeypatch.setattr(ppo, "answers_to", lambda *args, **named: sampled.extend(real(*args, **named)) or sampled)
    r = sample(config(temperature=temperature), tiny, scorer)
    model = load_model(tiny)
    for b in range(8):
        torch.testing.assert_close(r.logprobs[b][r.mask[b]], torch.tensor(sampled[b].logprobs), atol=1e-4, rtol=0)
        row = r.tokens[b, : int(r.mask[b].nonzero()[-1]) + 2]  # up to the last sampled token
        logp = (model(row[None])[0, :-1] / temperature).log_softmax(-1)  # (t, V)
        chosen = logp[torch.arange(len(row) - 1), row[1:]].detach()
        entropy = -(logp.exp() * logp).sum(-1).detach()
        cells = r.mask[b, : len(row) - 1]
        for got, expected in ((r.logprobs, chosen), (r.ref_logprobs, chosen), (r.entropy, entropy)):
            torch.testing.assert_close(got[b, : len(row) - 1][cells], expected[cells], atol=1e-4, rtol=0)
    assert (r.logprobs - r.ref_logprobs).abs().max() == 0  # reference and policy are the same so far


def test_a_value_has_seen_the_tokens_before_its_own_and_no_other(tiny, scorer):
    """The value of cell t is the critic's on tokens up to t, when token t + 1 is not there yet."""
    r, critic = sample(config(), tiny, scorer), load_scalar_model(scorer)
    values = ppo.values_of(config(), critic, r, 3)
    for b, t in r.mask.nonzero().tolist():
        assert values[b, t].item() == pytest.approx(critic(r.tokens[b : b + 1, : t + 1])[0, -1].item(), abs=1e-4)


def test_the_judge_sees_what_was_said_and_unfinished_answers_get_their_own_score(tiny, scorer):
    seen = []
    score = lambda *lists: seen.append(lists) or torch.arange(100.0, 108.0)
    r, tokenizer = sample(config(unfinished_score=-3.0), tiny, scorer, score), Tokenizer(tiny)
    [(questions, prompts, responses, texts)] = seen
    assert questions == QUESTIONS and texts == r.texts == [tokenizer.decode(response) for response in responses]
    assert prompts == [tokenizer.chat(question.prompt) for question in QUESTIONS]
    assert responses == [r.tokens[b, 1:][r.mask[b]].tolist() for b in range(8)]
    assert r.scores.tolist() == [100.0 + b if ended else -3.0 for b, ended in enumerate(r.ended)]


def test_nothing_in_a_rollout_carries_a_gradient_and_its_iteration_repeats_it(tiny, scorer):
    r, again, later = (sample(config(), tiny, scorer, iteration=iteration) for iteration in (3, 3, 4))
    assert not any(value.requires_grad for value in vars(r).values() if isinstance(value, torch.Tensor))
    assert r.texts == again.texts != later.texts


# ---- the script ----------------------------------------------------------------------------------------------------


def run(folder, tiny, scorer, answer=None, **flags):
    """Run ppo.py on six questions; its metrics."""
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "questions.jsonl", [
        {"id": f"q{i}", "question": f"{i}+{i}?", "answer": answer and answer(i)} for i in range(6)])
    flags = dict(policy=tiny, reward_model=scorer, iterations=3, rollout_size=8, minibatches=2, micro_tokens=50,
                 max_new_tokens=8, lr=1e-2, critic_lr=1e-2) | flags
    ppo.main(ppo.Config(questions=str(folder / "questions.jsonl"), out=str(folder / "out"), **flags))
    return list(read_jsonl(folder / "out" / "metrics.jsonl"))


def read(model, tokens, start):
    """Log-probs at temperature .8 of the sampled tokens of one answer (t,)."""
    logp = (model(torch.tensor([tokens]))[0, start - 1 : -1] / 0.8).log_softmax(-1)
    return logp[range(len(logp)), tokens[start:]]


def values_of(critic, tokens, start):
    return critic(torch.tensor([tokens]))[0, start - 1 : -1]  # (t,)


@torch.no_grad()
def keep(policy, reference, critic, tokens, start, score):
    """Of one answer: log-probs, values, advantages and returns, token by token from the right."""
    old, frozen = read(policy, tokens, start).tolist(), read(reference, tokens, start).tolist()
    values, advantages, next_value, next_advantage = values_of(critic, tokens, start).tolist(), [], 0.0, 0.0
    for t in reversed(range(len(old))):
        reward = -0.3 * (old[t] - frozen[t]) + (score if t == len(old) - 1 else 0.0)
        next_advantage = reward + 0.9 * next_value - values[t] + 0.9 * 0.8 * next_advantage
        next_value = values[t]
        advantages.insert(0, next_advantage)
    return old, values, advantages, [a + v for a, v in zip(advantages, values)]


def learn(policy, critic, minibatch, clipped):
    """The gradients of both losses: (tokens, start, old, values, white, returns) of each answer, read alone."""
    count, loss, error = sum(len(white) for *_, white, _ in minibatch), 0.0, 0.0
    for tokens, start, old, old_values, white, returns in minibatch:
        old, old_values, white, target = map(torch.tensor, (old, old_values, white, returns))
        ratio = (read(policy, tokens, start) - old).exp()
        values = values_of(critic, tokens, start)
        near = old_values + (values - old_values).clamp(-0.03, 0.03)
        loss = loss - torch.minimum(white * ratio, white * ratio.clamp(0.95, 1.05)).sum() / count
        error = error + torch.maximum((values - target) ** 2, (near - target) ** 2).sum() / 2 / count
        clipped.append(((ratio - 1).abs() > 0.05).any().item())
    loss.backward()
    error.backward()


def loop(tiny, networks, score_of):
    """Four iterations of two epochs of two minibatches; seven answers to six questions: both uneven.

    The norms of the gradients, the scores, and whether a token of an answer was clipped.
    """
    tokenizer, (policy, _, critic), order, norms, scores, clipped = Tokenizer(tiny), networks, [], [], [], []
    for iteration, share in enumerate((0.5, 1.0, 1.0, 0.5)):
        while len(order) < 7 * (iteration + 1):
            order += steps.permutation(6, 3, "questions", len(order) // 6)
        prompts = [tokenizer.chat(f"{i}+{i}?") for i in order[7 * iteration :][:7]]
        seeds = [seed_of(3, "ppo", iteration, i) for i in range(7)]
        sampled = generate(policy, prompts, 8, 0.8, tokenizer.stop_ids, seeds, 7)
        answers = [(prompt + s.tokens, len(prompt)) for prompt, s in zip(prompts, sampled)]
        scores += [score_of(*answer) if answer[0][-1] == 1 else -1.5 for answer in answers]
        kept = [keep(*networks, *answer, score) for answer, score in zip(answers, scores[-7:])]
        flat = [a for _, _, advantages, _ in kept for a in advantages]
        mean = sum(flat) / len(flat)
        deviation = math.sqrt(sum((a - mean) ** 2 for a in flat) / len(flat))
        rows = [(*answer, old, values, [(a - mean) / deviation for a in advantages], returns)
                for answer, (old, values, advantages, returns) in zip(answers, kept)]
        for epoch in range(2):
            shuffled = steps.permutation(7, 3, "minibatches", iteration, epoch)
            for minibatch in (shuffled[:4], shuffled[4:]):
                learn(policy, critic, [rows[b] for b in minibatch], clipped)
                norms.append((descend(policy, 0.5 * share, 0.4), descend(critic, 0.2 * share, 0.4)))
    return norms, scores, clipped


@pytest.mark.parametrize("judged_by", ["reward_model", "votes", "gold"])
def test_a_whole_run_is_the_loop_that_is_written_out_here(tiny, scorer, tmp_path, monkeypatch, judged_by):
    """Policy, critic, schedule, rewards, advantages and clips, every answer read alone and in plain Python.

    With gold answers the critic is a folder of its own. Held-out questions are asked and never trained.
    """
    asked, critics, real = plain_sgd(monkeypatch, ppo), [], ppo.values_of
    monkeypatch.setattr(ppo, "values_of", lambda *args: critics.append(args[1]) or real(*args))
    flags = dict(iterations=4, rollout_size=7, minibatches=2, epochs=2, lr=0.5, critic_lr=0.2, warmup=2, kl_coef=0.3,
                 temperature=0.8, gamma=0.9, lam=0.8, clip=0.05, value_clip=0.03, unfinished_score=-1.5,
                 max_grad_norm=0.4, seed=3, valid=str(tmp_path / "valid.jsonl"))
    flags |= {"reward_model": {}, "votes": {"votes": str(tmp_path / "votes.jsonl")},
              "gold": {"gold": True, "critic": scorer}}[judged_by]
    if judged_by != "reward_model":
        flags |= {"reward_model": "", "lenient": True}
    write_jsonl(tmp_path / "votes.jsonl", [{"id": f"q{i}", "vote": "7"} for i in range(6)])
    write_jsonl(tmp_path / "valid.jsonl", [{"question": f"{i}-1?", "answer": "1"} for i in range(3)])
    metrics = run(tmp_path, tiny, scorer, answer=lambda i: "7", **flags)
    recipe = {"betas": (0.9, 0.95), "eps": 1e-5, "weight_decay": 0.0}
    assert [{name: settings[name] for name in recipe} for settings in asked] == [recipe, recipe]

    tokenizer, judge, networks = Tokenizer(tiny), load_scalar_model(scorer), models(tiny, scorer)
    if judged_by == "votes":
        networks = (*networks[:2], load_scalar_model(tiny, new_head="zero"))

    @torch.no_grad()
    def score_of(tokens, start):
        if judged_by == "reward_model":
            return judge(torch.tensor([tokens]))[0, -1].item()
        return 1.0 if extract_answer(tokenizer.decode(tokens[start:]), "number", True) == "7" else -1.0

    norms, scores, clipped = loop(tiny, networks, score_of)
    assert any(clipped) and not all(clipped)
    assert change(load_model(tmp_path / "out"), networks[0]).abs().max() < 1e-4
    assert change(critics[0], networks[2]).abs().max() < 1e-4
    assert change(load_model(tiny), networks[0]).abs().max() > 0.03
    for i, name in enumerate(("policy", "critic")):
        expected = [sum(norm[i] for norm in norms[k : k + 4]) / 4 for k in (0, 4, 8, 12)]
        assert [m[f"{name}/grad_norm"] for m in metrics] == pytest.approx(expected, rel=1e-2)
    assert max(norm for norm, _ in norms) > 0.4
    expected = [sum(scores[i : i + 7]) / 7 for i in (0, 7, 14, 21)]
    assert [m["objective/scores"] for m in metrics] == pytest.approx(expected, abs=1e-3)


def test_every_question_comes_once_before_any_comes_again():
    for size in (1, 4, 6, 8, 13):
        asked = [row for i in range(60) for row in ppo.questions_of(i, 6, config(rollout_size=size))]
        assert len(asked) == 60 * size
        passes = [tuple(asked[i : i + 6]) for i in range(0, 60, 6)]
        assert all(sorted(one) == list(range(6)) for one in passes) and len(set(passes)) > 5
    assert ppo.questions_of(0, 6, config(seed=1)) != ppo.questions_of(0, 6, config())


@pytest.mark.parametrize(("flag", "value"), [("micro_tokens", 1), ("batch_size", 3), ("gradient_checkpointing", True)])
def test_flags_of_memory_change_no_result(tiny, scorer, tmp_path, monkeypatch, flag, value):
    """Responses differ in length, so any divisor but the tokens of the whole step shows."""
    plain_sgd(monkeypatch, ppo)
    both = {name: run(tmp_path / name, tiny, scorer, iterations=2, epochs=2, lr=0.1, critic_lr=0.1, **flags)
            for name, flags in (("a", {}), ("b", {flag: value}))}
    for one, other in zip(*both.values()):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4)
    start, first, second = (load_model(folder) for folder in (tiny, tmp_path / "a/out", tmp_path / "b/out"))
    assert change(first, second).abs().max() < 1e-5 < 1e-3 < change(start, first).abs().max()


def test_with_learning_rate_zero_nothing_moves(tiny, scorer, tmp_path):
    """Three rollouts of two epochs: ratio 1, divergence, KL and clipping 0 throughout, parameters equal to the bit."""
    for metrics in run(tmp_path, tiny, scorer, epochs=2, lr=0.0, critic_lr=0.0):
        assert metrics["val/ratio"] == pytest.approx(1, abs=1e-5) and metrics["policy/approxkl_avg"] < 1e-10
        assert {value for name, value in metrics.items() if "clipfrac" in name} == {0} and metrics["objective/kl"] == 0
    assert change(load_model(tiny), load_model(tmp_path / "out")).abs().max() == 0


def test_the_same_seed_gives_the_same_run_whatever_the_gold_answers(tiny, scorer, tmp_path):
    """Gold answers are in the question file and are never read."""
    first = run(tmp_path / "a", tiny, scorer, answer=lambda i: str(2 * i))
    second = run(tmp_path / "b", tiny, scorer, answer=lambda i: str(999 + i))
    other = run(tmp_path / "c", tiny, scorer, seed=1)
    assert json.dumps(first) == json.dumps(second) != json.dumps(other)
    weights = [(tmp_path / name / "out" / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]


def test_the_critic_may_start_from_another_reward_model_than_the_judge(tiny, scorer, tmp_path):
    other = load_scalar_model(scorer)
    other.score_mean = 7.0
    save_model(other, tmp_path / "other")
    Tokenizer(tiny).save(tmp_path / "other")
    plain = run(tmp_path / "a", tiny, scorer, iterations=1)
    moved = run(tmp_path / "b", tiny, scorer, iterations=1, critic=str(tmp_path / "other"))
    assert moved[0]["objective/scores"] == plain[0]["objective/scores"]
    assert moved[0]["val/values_mean"] == pytest.approx(plain[0]["val/values_mean"] - 6.7, abs=1e-4)


@pytest.mark.parametrize("lora", [0, 2])
def test_the_critic_may_start_at_zero_and_the_judge_stays(tiny, scorer, tmp_path, lora):
    plain = run(tmp_path / "a", tiny, scorer, iterations=2, critic_lr=0.1, lora=lora)
    zero = run(tmp_path / "b", tiny, scorer, iterations=2, critic_lr=0.1, lora=lora, zero_values=True)
    assert plain[0]["val/values_mean"] != 0 == zero[0]["val/values_mean"]
    assert zero[0]["objective/scores"] == pytest.approx(plain[0]["objective/scores"], abs=1e-5)
    assert zero[1]["val/values_mean"] != 0  # it learns


def test_now_and_then_held_out_questions_are_asked_and_samples_shown(tiny, scorer, tmp_path, monkeypatch):
    """At the first, every second and the last iteration, before the update: accuracy, and what the judge thinks."""
    looks = []

    def accuracy(policy, tokenizer, questions, *rest, **named):
        looks.append((change(load_model(tiny), policy).abs().max().item(), [question.answer for question in questions]))
        transcripts = [{"response": "7", "finish": "stop"}, {"response": "8", "finish": "length"}]
        return {"strict": len(looks) / 10}, transcripts

    monkeypatch.setattr(ppo, "accuracy", accuracy)
    write_jsonl(tmp_path / "valid.jsonl", [{"question": "3+4?", "answer": "7"}] * 2)
    metrics = run(tmp_path, tiny, scorer, valid=str(tmp_path / "valid.jsonl"), eval_every=2, iterations=4)
    assert [m.get("valid/accuracy") for m in metrics] == [0.1, None, 0.2, 0.3]
    assert looks[0] == (0, ["7", "7"]) and looks[1][0] > 0
    tokenizer, judge = Tokenizer(tiny), load_scalar_model(scorer)
    score = judge(torch.tensor([tokenizer.chat("3+4?") + tokenizer.response("7")]))[0, -1].item()
    assert metrics[0]["valid/score"] == pytest.approx((score - 2) / 2, abs=1e-4)  # the second has no end
    text = (tmp_path / "out" / "samples.txt").read_text(encoding="utf-8")
    assert [int(n) for n in re.findall(r"==== iteration (\d+)", text)] == [0, 2, 3]


def test_what_a_run_costs_is_of_real_tokens_and_not_of_padding(tiny, scorer, tmp_path, monkeypatch):
    """2 for each parameter and token that is sampled, read by three and judged, 6 for each that two networks learn."""
    real, rollouts = ppo.rollout, []

    def spy(*args, **named):
        rollouts.append((args[5], real(*args, **named)))
        return rollouts[-1][1]

    monkeypatch.setattr(ppo, "rollout", spy)
    run(tmp_path, tiny, scorer, epochs=2)
    tokens = sum(int(r.mask.sum()) + sum(len(prompt) for _, prompt in asked) for asked, r in rollouts)
    assert tokens < sum(r.tokens.numel() for _, r in rollouts)
    parameters = sum(p.numel() for p in load_model(tiny).parameters())
    done = json.loads((tmp_path / "out" / "done.json").read_text())
    assert done["flops"] == parameters * tokens * (2 * 5 + 6 * 2 * 2)
    assert done["tokens"] == sum(int(r.mask.sum()) for _, r in rollouts)


# ---- what stops a run ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("bug", ["temperature", "mask"])
def test_an_update_that_disagrees_with_its_rollout_is_an_error(tiny, scorer, tmp_path, monkeypatch, precision, bug):
    monkeypatch.setenv("PRECISION", precision)
    update, logprobs = ppo.update_policy, ppo.masked_logprobs
    moved = lambda model, tokens, mask, T: logprobs(model, tokens, mask.roll(1, 1), T)

    def wrong(cfg, *rest):
        if bug == "temperature":
            return update(replace(cfg, temperature=0.7), *rest)
        with monkeypatch.context() as patch:
            patch.setattr(ppo, "masked_logprobs", moved)
            return update(cfg, *rest)

    monkeypatch.setattr(ppo, "update_policy", wrong)
    with pytest.raises(RuntimeError, match=r"ratios of the first minibatch are \S+ away from 1"):
        run(tmp_path, tiny, scorer)


@pytest.mark.parametrize("logits", [1, 60])
def test_in_bf16_a_healthy_run_is_silent(tiny, scorer, tmp_path, monkeypatch, capsys, logits):
    """Its numbers are not fp32's, and every first ratio is 1; also with logits of 60, which move in steps of 0.25."""
    load = ppo.load_model

    def louder(*args):
        model = load(*args)
        scale = logits / model(torch.arange(4)[None]).abs().max().item() if logits > 1 else 1
        model.lm_head.weight.data *= scale
        return model

    monkeypatch.setattr(ppo, "load_model", louder)
    flags = dict(iterations=1, rollout_size=16, max_new_tokens=16)
    exact = run(tmp_path / "fp32", tiny, scorer, **flags)
    monkeypatch.setenv("PRECISION", "bf16")
    rough = run(tmp_path / "bf16", tiny, scorer, **flags)
    assert "the same tokens differently" not in capsys.readouterr().out
    assert max(m["val/ratio_first_gap"] for m in rough) < 1e-4
    assert 1e-6 < abs(rough[0]["objective/entropy"] / exact[0]["objective/entropy"] - 1) < 0.05


@pytest.mark.parametrize("broken", ["policy_loss", "value_loss", "shape_rewards"])
def test_nan_stops_before_the_step_and_keeps_the_last_good_policy(tiny, scorer, tmp_path, monkeypatch, broken):
    """In the second iteration: the folder has the policy of before it, or of before a rollout that was bad already."""
    real, weights, rollout = getattr(ppo, broken), [], ppo.rollout

    def breaks(*args, **named):
        result = real(*args, **named)
        if len(weights) < 2:
            return result
        return result * NAN if isinstance(result, torch.Tensor) else (result[0] * NAN, result[1])

    def spy(cfg, policy, *rest, **named):
        weights.append([p.detach().clone() for p in policy.parameters()])
        return rollout(cfg, policy, *rest, **named)

    monkeypatch.setattr(ppo, broken, breaks)
    monkeypatch.setattr(ppo, "rollout", spy)
    with pytest.raises(ValueError, match=r"step 1: .*nan"):
        run(tmp_path, tiny, scorer, eval_every=1)
    kept = load_model(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), weights[broken != "shape_rewards"]))
    assert not (tmp_path / "out" / "done.json").exists()
    assert len(list(read_jsonl(tmp_path / "out" / "metrics.jsonl"))) == 1
