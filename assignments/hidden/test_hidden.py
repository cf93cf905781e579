"""Hidden tests: the same properties as the public ones on inputs drawn from a seed, against independent references.

The references are plain loops in double precision, written from the task's formula and not from the solution. Messages
name the property and never a value. SEED comes from grade.py --seed: choose one that is not in a public repository.
"""
# fmt: off

import copy
import functools
import math
import os
import random
from collections import Counter

import numpy as np
import torch
from checks import same

from answers import extract_answer
from data import collate
from generate import sample_token
from model import RMSNorm, last_token, rotate, token_logprobs
from ppo import gae, policy_loss, shape_rewards, value_loss, whiten
from pseudo_reward import Sample, majority_vote, make_pairs, pseudo_rewards, winners
from reward import bradley_terry_loss
from sft import sft_loss

SEED, NAN = int(os.environ.get("SEED", "0")), float("nan")
PURE = "a pure function changes no argument"

def draws(salt):
    """Generators of a test's own: the order of the tests does not matter."""
    return random.Random(SEED * 1000 + salt), torch.Generator().manual_seed(SEED * 1000 + salt)

near = functools.partial(same, tolerance=2e-5)

def spans(rng, B, T):
    """A mask (B, T): one run of True per row; to the last column, from the first one, of a single cell, and drawn."""
    ends = [(T // 2, T), (0, T - 2), (2, 3), *(sorted(rng.sample(range(T + 1), 2)) for _ in range(B))]
    return torch.tensor([[start <= t < end for t in range(T)] for start, end in ends[:B]])

def cells(mask):
    """The columns of the True cells of each row."""
    return [[t for t, inside in enumerate(row) if inside] for row in mask.tolist()]

def filled(x, mask, *values):
    """x with these values in its masked cells, in turns."""
    return torch.where(mask, x, torch.tensor(values).repeat(x.numel())[: x.numel()].reshape(x.shape))

def outlier(x, mask, far):
    """x with one True cell of the first row far out: whoever clamps is found out."""
    return x.index_put((torch.tensor(0), mask[0].int().argmax()), torch.tensor(float(far)))

def pure(function, *arguments):
    """Whether a call leaves its arguments as they were."""
    before = copy.deepcopy(arguments)
    function(*arguments)
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) if isinstance(a, torch.Tensor) else a == b
               for a, b in zip(before, arguments))

def check_masked_cells(function, mask, tensors, gradient=True):
    """Results, and the gradient in the first tensor, stay the same when masked cells hold NaN, infinity or a million.

    function(*tensors) -> a tensor or several, a loss first if there is a gradient. In all tensors, then in each alone.
    """
    def outcome(first, *rest):
        leaf = first.clone().requires_grad_(gradient)
        results = function(leaf, *rest)
        results = results if isinstance(results, tuple) else (results,)
        return [*results, *(torch.autograd.grad(results[0], leaf) if gradient else ())]

    clean = outcome(*(filled(x, mask, 0.0) for x in tensors))
    for bad in ((NAN,), (math.inf, -math.inf), (1e6, -1e6)):
        for chosen in ({0, 1, 2}, {0}, {1}, {2}):
            dirty = [filled(x, mask, *bad) if i in chosen else filled(x, mask, 0.0) for i, x in enumerate(tensors)]
            assert pure(function, *dirty), PURE
            for got, want in zip(outcome(*dirty), clean, strict=True):
                same(got, want.detach(), "what stands in a masked cell changed the result or its gradient")

def check_answers(lenient, *cases):
    for text, want, why in cases:
        kind = "choice" if "(" in text or want in list("ABCDEFGH") else "number"
        assert extract_answer(text, kind, lenient) == want, why

def test_E1_extract_answer__the_forms_in_which_an_answer_is_stated():
    n, letter = draws(1)[0].randrange(1001, 9000, 2), draws(1)[0].choice("BCDEFGH")
    usual = "an answer that is stated in a usual form is found"
    forms = f"#### {n}", f"#### ${n:,}.00", f"The answer is **{n}**.", f"\\boxed{{{n}}}", f"<answer>{n}</answer>"
    check_answers(False, *((form, str(n), usual) for form in forms),
        (f"A: {n}", str(n), "the text begins like a line"),
        (f"Answer: -{n}", f"-{n}", "the sign belongs to the number"),
        (f"x\nA: {n / 8}", f"{n / 8:.3f}", "decimals are canonical"),
        ("\\boxed{\\frac{3}{4}}", "0.75", "what only decorates is read away"),
        (f"The answer is ({letter}).", letter, "a letter in brackets is a choice"),
        (f"so ({letter.lower()})... the answer is ({letter.lower()})", letter, "letters are canonical in upper case"))
    assert extract_answer("#### 5", "choice") is None, "a number is no choice"

def test_E1_extract_answer__the_strongest_mark_and_its_first_statement():
    a, b, c, d = draws(2)[0].sample(range(100, 999), 4)
    check_answers(False,
        (f"Answer: {a}\nThe answer is {b}.\n#### {c}", str(c), "the order of the marks counts"),
        (f"Answer: {a}. So the answer is {b}", str(b), "a sentence is more than a label"),
        (f"#### {c}\nThe answer is {b}.\nAnswer: {a}", str(c), "whatever their places"),
        ("The answer is (B). So the answer is (D).", "B", "the first statement counts, also for letters"))
    for lenient in (False, True):
        text = f"#### {a}\n\nQ: next\n#### {b}\n#### {c} and {d}"
        check_answers(lenient, (text, str(a), "the first statement of a mark counts"))

def test_E1_extract_answer__taken_back():
    a, b, c = draws(3)[0].sample(range(100, 999), 3)
    later = " and so on" * 8 + f" Actually, no. The answer is {b}."
    too_late = " and so on" * 11 + f" Actually, nice. The answer is {b}."
    text = f"The answer is {a}. Wait, that is wrong. The answer is {b}. The answer is {c}."
    check_answers(False,
        (text, str(b), "the first statement that is not taken back counts"),
        (f"The answer is {a}.{later}", str(b), "it may be taken back up to 100 characters later"),
        (f"The answer is {a}.{too_late}", str(a), "what follows after more than 100 characters takes nothing back"),
        (f"The answer is {a}. Wait. The answer is {b}. Sorry", str(b), "if all are taken back the last one counts"))

def test_E1_extract_answer__strict_lenient_and_thoughts():
    a, b = draws(4)[0].sample(range(100, 999), 2)
    check_answers(False,
        (f"first {a}, then {b} pens", None, "strict: a number that is only mentioned is no answer"),
        (f"<think>#### {a}</think>I say {b}", None, "thoughts state nothing"),
        ("#### 3/0 or 5", None, "what has no canonical form is no answer"))
    check_answers(True,
        (f"first {a}, then {b} pens", str(b), "lenient: the last number"),
        (f"3 or ${a},500.50", f"{a}500.5", "the last number is canonical, too"),
        ("It is not B, maybe D or E", "E", "lenient: the last lone letter"),
        (f"#### {a}\n{b}", str(a), "lenient prefers what is stated"),
        (f"<think>{a}</think>", None, "thoughts mention nothing"),
        ("", None, "an empty text has no answer"))

def test_E2_collate__random_batches():
    rng, _ = draws(20)
    for B in (1, 2, 5, 8):
        prompts, responses = ([[rng.randrange(4) for _ in range(rng.randrange(1, 7))] for _ in range(B)] for _ in "pr")
        tokens, mask, _ = collate(prompts, responses)
        T = max(len(p) + len(r) for p, r in zip(prompts, responses))
        assert tuple(tokens.shape) == (B, T), "tokens are as wide as the longest row"
        assert tuple(mask.shape) == (B, T - 1), "the mask has one column less than tokens"
        for b, (p, r) in enumerate(zip(prompts, responses)):
            assert tokens[b].tolist() == p + r + [0] * (T - len(p) - len(r)), "prompt, response, then zeros"
            inside = [len(p) <= t + 1 < len(p) + len(r) for t in range(T - 1)]
            assert mask[b].tolist() == inside, "entry t is True where token t + 1 is of the response"

def test_E2_collate__lengths_and_arguments():
    lists = [[3], [3, 3, 3], [0] * 999], [[0], [0], [4, 0, 0]]
    assert pure(collate, *lists), PURE
    assert collate(*lists)[2].tolist() == [2, 4, 1002], "lengths of prompt and response, whatever their ids"

def test_E3_RMSNorm_forward__against_a_loop():
    _, rng = draws(30)
    for shape in ((3, 8), (2, 3, 5), (6,)):
        x, norm = torch.randn(shape, generator=rng) * 3 + 1, RMSNorm(shape[-1], 0.1)
        x.view(-1)[0] = 300.0  # far out
        norm.weight.data = torch.randn(shape[-1], generator=rng)
        rows, weight = x.double().reshape(-1, shape[-1]).tolist(), norm.weight.tolist()
        want = [[w * v / math.sqrt(sum(u * u for u in r) / len(r) + 0.1) for w, v in zip(weight, r)] for r in rows]
        assert pure(norm, x), PURE
        near(norm(x), np.reshape(want, shape), "weight * x / sqrt(mean square + eps), over the last dimension")
        why = "worked out in fp32, and brought back to the type of x"
        near(norm.half()(x.half()), np.reshape(want, shape), why, tolerance=1e-2, dtype=torch.float16)

def test_E3_rotate__against_complex_numbers():
    _, rng = draws(33)
    for B, T, H, E in ((1, 1, 1, 2), (2, 5, 3, 8), (1, 7, 2, 6), (2, 4, 3, 4)):
        x, rows = torch.randn(B, T, H, E, generator=rng) * 9, (B,) * (E == 4)  # at last, angles of each row
        angle = torch.randn(*rows, T, 1, E // 2, generator=rng).double()
        pair = torch.complex(*x.double().chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)
        wide = torch.cat([angle, angle], -1).float()
        assert pure(rotate, x, wide.cos(), wide.sin()), PURE
        want = torch.cat([pair.real, pair.imag], -1)
        near(rotate(x, wide.cos(), wide.sin()), want, "each pair (i, i + E/2) turns by its angle", tolerance=1e-4)

def log_softmax(row, temperature=1.0):
    scaled = [value / temperature for value in row]
    norm = max(scaled) + math.log(math.fsum(math.exp(value - max(scaled)) for value in scaled))
    return [value - norm for value in scaled]

def test_E4_token_logprobs__against_a_loop():
    _, rng = draws(40)
    for V, temperature, scale in ((3, 1.0, 1), (7, 0.7, 4), (5, 2.5, 300), (4, 1.0, 30), (4, 0.01, 1), (4, 1.0, 9e4)):
        logits, tokens = torch.randn(3, 4, V, generator=rng) * scale, torch.randint(V, (3, 4), generator=rng)
        rows = [[log_softmax(row, temperature) for row in sequence] for sequence in logits.double().tolist()]
        want = [[rows[b][t][tokens[b, t + 1]] for t in range(3)] for b in range(3)]
        why = "entry t is the log softmax of logits[:, t] / temperature at tokens[:, t+1]"
        near(token_logprobs(logits, tokens, temperature), want, why)

def test_E4_token_logprobs__types():
    _, rng = draws(41)
    logits, tokens = torch.randn(2, 4, 9, generator=rng), torch.randint(9, (2, 4), generator=rng)
    exact = torch.log_softmax(logits.bfloat16().double()[:, :-1] / 0.9, -1).gather(-1, tokens[:, 1:, None])[..., 0]
    near(token_logprobs(logits.bfloat16(), tokens, 0.9), exact, "half precision is worked on in fp32")
    assert pure(token_logprobs, logits, tokens, 0.9), PURE
    assert token_logprobs(logits.double(), tokens, 0.9).dtype == torch.float64, "double precision stays"

def test_E4_token_logprobs__gradient():
    _, rng = draws(42)
    leaf, tokens = torch.randn(2, 4, 9, generator=rng).requires_grad_(), torch.randint(9, (2, 4), generator=rng)
    token_logprobs(leaf, tokens).sum().backward()
    want = torch.nn.functional.one_hot(tokens[:, 1:], 9) - torch.softmax(leaf.detach().double()[:, :-1], -1)
    near(leaf.grad[:, :-1], want, "the gradient is one-hot minus softmax")
    near(leaf.grad[:, -1], np.zeros((2, 9)), "the last position predicts nothing")

def sft_case(B, T):
    rng, torch_rng = draws(50 + B)
    mask, logprobs = spans(rng, B, T), -torch.rand(B, T, generator=torch_rng) * 5
    logprobs[2, 2] = 0.0  # a sure token is trained as well
    return mask, outlier(logprobs, mask, -200), int(mask.sum()) + rng.randrange(3, 30)

def test_E5_sft_loss__against_a_loop():
    for B, T in ((3, 6), (4, 9), (6, 5)):
        mask, logprobs, total = sft_case(B, T)
        want = -math.fsum(logprobs[b, t].item() for b, row in enumerate(cells(mask)) for t in row) / total
        leaf = filled(logprobs, mask, -3.0, 2.0).requires_grad_()
        loss = sft_loss(leaf, mask, total)
        near(loss, want, "minus the sum over the True cells, over total")
        loss.backward()
        near(leaf.grad, -mask.double() / total, "the gradient is -1/total on every True cell and 0 elsewhere")

def test_E5_sft_loss__masked_cells():
    mask, logprobs, total = sft_case(4, 6)
    check_masked_cells(lambda x: sft_loss(x, mask, total), mask, [logprobs])

def test_E5_sft_loss__a_fault_inside_the_mask_and_an_empty_mask():
    loss = sft_loss(torch.tensor([[-1.0, NAN]]), torch.tensor([[True, True]]), 2)
    assert bool(loss.isnan()), "a NaN in a True cell is a fault of the model and must show in the loss"
    near(sft_loss(torch.tensor([[-1.0, -2.0]]), torch.tensor([[False, False]]), 7), 0.0, "an empty mask is a loss of 0")

def test_E6_sample_token__against_a_loop():
    _, rng = draws(60)
    for V, temperature in ((5, 0.4), (7, 1.0), (6, 3.0), (4, 0.01), (4, 1e-4)):
        logits = torch.randn(300, V, generator=rng) * min(1.5, temperature * 3)
        chance = torch.rand(300, generator=rng, dtype=torch.float64)
        want = [np.exp(log_softmax(row, temperature)) for row in logits.double().tolist()]
        pairs = list(zip(want, chance.tolist()))
        tokens = [next((v for v in range(V) if math.fsum(p[: v + 1]) > c), V - 1) for p, c in pairs]
        edges = [np.abs(np.cumsum(p) - c).min() < 1e-5 for p, c in pairs]  # rounding decides there
        token, logprob = sample_token(logits, temperature, chance)
        assert token.dtype == torch.long and tuple(token.shape) == (300,), "one token id per row"
        why = "the first token whose cumulative probability, of the tempered softmax, exceeds the row's chance"
        assert all(edge or a == b for edge, a, b in zip(edges, token.tolist(), tokens)), why
        likely = [math.log(p[v]) for p, v in zip(want, token.tolist())]
        near(logprob, likely, "the log-prob is that of the distribution that was drawn from", dtype=torch.float32)

def test_E6_sample_token__rare_tokens_and_the_ends():
    """One token has all but a millionth of the probability, a thousand others share that evenly."""
    logits = torch.cat([torch.tensor([math.log(1e9)]), torch.zeros(1000)]).repeat(9, 1)
    share = torch.arange(0.1, 0.95, 0.1, dtype=torch.float64)
    chance = 1 - (1 - share) * 1000 / (1e9 + 1000)
    assert pure(sample_token, logits, 0.7, chance), PURE
    token, logprob = sample_token(logits, 1.0, chance)
    assert bool(((token - 1 - 1000 * share).abs() < 3).all()), "rare tokens are drawn as often: sums in fp32 lose them"
    near(logprob, np.full(9, -math.log(1e9 + 1000)), "the log-prob of a rare token")
    logits = torch.randn(40, 12, generator=draws(62)[1]).index_fill(1, torch.tensor([0, 5, 11]), -math.inf)
    for chance, want in ((0.0, 1), (1 - 2**-53, 10)):
        token, _ = sample_token(logits, 1.0, torch.full((40,), chance, dtype=torch.float64))
        assert token.tolist() == [want] * 40, "a token of probability 0 is never drawn, at neither end"

def vote(answers, logprobs=None):
    """By sorting counts: the independent reference. Log-probs are multiples of 1/8, so that sums are exact."""
    known = logprobs is not None and None not in logprobs
    ranking = sorted(
        (count, sum(lp for a, lp in zip(answers, logprobs) if a == answer) if known else 0.0, answer)
        for answer, count in Counter(a for a in answers if a is not None).items())
    if not ranking or (len(ranking) > 1 and ranking[-1][:2] == ranking[-2][:2]):
        return None, 0.0
    return ranking[-1][2], ranking[-1][0] / len(answers)

def check_vote(answers, logprobs, why):
    got, want = majority_vote(answers, logprobs), vote(answers, logprobs)
    assert isinstance(got, tuple) and len(got) == 2, "a vote is an answer and its share"
    assert got[0] == want[0] and math.isclose(got[1], want[1], rel_tol=1e-9), why

def test_E7_majority_vote__random_votes():
    rng, _ = draws(70)
    for _ in range(40):
        answers = [rng.choice(["12", "3", "7", None, "2.5"]) for _ in range(rng.randrange(1, 9))]
        check_vote(answers, None, "the most frequent answer, its share of all; ties: nobody")
        logprobs = [-rng.randrange(1, 24) / 8 for _ in answers]
        check_vote(answers, logprobs, "ties go to the greater sum of log-probs")

def test_E7_majority_vote__three_way_ties_and_missing_log_probs():
    tie = ["a", "b", "c", None, "c", "b", "a"]
    for answers, logprobs, why in (
        (tie, None, "a tie of three has no winner"),
        (tie, [-2.0, -1.0, -3.0, -0.1, -1.0, -0.5, -2.0], "of three tied answers the likeliest wins"),
        (tie, [-2.0, -2.0, -0.25, None, -0.25, -2.0, -2.0], "one missing log-prob, even of a None: nobody"),
        (["a", "b"], [0.0, -1.0], "a log-prob of 0 is one: a sure answer's"),
        (["a", "a", "b"], [None, None, None], "no tie: log-probs are not asked"),
        (["a", "b", "b", "a"], [-1.0, -0.5, -1.5, -1.0], "an exact tie: nobody"),
        (["a", "b", "c", "c", "b"], [-0.125, -1.0, -1.0, -1.0, -1.0], "fewer votes take no part in a tie"),
    ):
        check_vote(answers, logprobs, why)

def test_E7_majority_vote__arguments_and_texts():
    assert pure(majority_vote, ["b", "a", None, "b"], [-1.0, -2.0, -3.0, -4.0]), "the lists stay as they were"
    check_vote(["7", "7.0", " 7", "a", "A"], None, "answers are canonical already: equal texts or not")

def samples(rng, count):
    """Random samples with texts that repeat, some of which differ only in case or blanks."""
    return [
        Sample("q", rng.choice(["teacher", "student"]), rng.choice(["b", "a", "a ", " a", "A", "c\n", "c", "b" * 999]),
               rng.choice(["1", "2", None]), rng.random() < 0.8, -rng.random())
        for _ in range(count)]

def test_E8_pseudo_rewards__integers_and_whole_answers():
    answers = ("10", "1", "01", "110", "1.0", " 1", None)
    who = ("teacher", True), ("student", True), ("student", False)
    some = [Sample("q", source, "10 or 1", answer, ended) for answer in answers for source, ended in who]
    why = "1 where the response ended and the answers are equal, not a part of each other, whoever speaks"
    assert pseudo_rewards(some, "1") == [0, 0, 0, 1, 1, 0] + [0] * 15, why
    assert pseudo_rewards(some, "10") == [1, 1, 0] + [0] * 18, why
    assert all(type(reward) is int for reward in pseudo_rewards(some, "1")), "integers, 0 or 1, and no booleans"

def test_E8_winners__random_samples():
    for most in (1, 3, 10, 50):
        rng, _ = draws(90 + most)
        some = samples(rng, 80)
        rewards = [rng.randrange(2) for _ in some]
        repeated = [s.response for s, reward in zip(some, rewards) if reward and s.source == "teacher"]
        different = [text for i, text in enumerate(repeated) if text not in repeated[:i]]
        why = "different winning texts of the teacher, as they are and in their order, at most so many"
        assert winners(some, rewards, most) == different[:most], why
        assert winners(some, rewards, most, True) == repeated[:most], "keep_duplicates: as often as they were sampled"
        assert pure(winners, some, rewards, most), PURE

def texts(pairs):
    return [(chosen.response, rejected.response) for chosen, rejected in pairs]

def test_E9_make_pairs__random_samples():
    for round_ in range(12):
        rng, _ = draws(300 + round_)
        some, most = samples(rng, 14), (2, 5, 500)[round_ % 3]
        rewards = [int(s.ended and rng.random() < 0.5) for s in some]
        good = [s for s, reward in zip(some, rewards) if reward]
        bad = [s for s, reward in zip(some, rewards) if not reward and s.ended]
        possible = {(c.response, r.response) for c in good for r in bad}
        student = {(c.response, r.response) for c in good for r in bad if "student" in (c.source, r.source)}
        pairs = make_pairs(some, rewards, most, random.Random(round_))
        assert all(c in good and r in bad for c, r in pairs), "chosen has reward 1; rejected has 0 and ended"
        assert len(pairs) == len(set(texts(pairs))) == min(most, len(possible)), "all different pairs, at most `most`"
        first = [c.source == r.source == "teacher" for c, r in pairs]
        assert first == sorted(first), "pairs with a response of the student come first"
        assert first.count(False) == min(most, len(student)), "and as many of them as there are"

def test_E9_make_pairs__the_draw():
    some = [Sample("q", "student", f"text {i}", "1", True) for i in range(12)]
    draw = [texts(make_pairs(some, [1, 0] * 6, 6, random.Random(SEED + seed))) for seed in range(120)]
    seen = Counter(pair for pairs in draw for pair in pairs)
    assert draw[7] == texts(make_pairs(some, [1, 0] * 6, 6, random.Random(SEED + 7))), "a seed draws the same again"
    assert len(seen) == 36, "every combination has its chance"
    assert max(seen.values()) < 48, "and no combination more than its share"
    assert len({pairs[0] for pairs in draw}) > 20, "what is drawn is not sorted afterwards"

def test_E9_make_pairs__frequent_texts_and_arguments():
    some = [Sample("q", "student", text, "1", True) for text in ["often"] * 9 + ["rare", "bad"]]
    assert pure(lambda a, b: make_pairs(a, b, 5, random.Random(0)), some[::-1], [0] + [1] * 10), PURE
    draw = [texts(make_pairs(some, [1] * 10 + [0], 1, random.Random(seed))) for seed in range(100)]
    assert draw.count([("often", "bad")]) > 70, "a text that was sampled often is met often"

def test_E10_last_token__random_rows():
    rng, _ = draws(100)
    for B, T in ((1, 1), (3, 7), (7, 3), (5, 5)):
        last = [rng.randrange(T) for _ in range(B)]
        got = last_token(torch.tensor(last) + 1, T)
        assert got.shape == (B, T) and got.dtype == torch.bool, "a mask (B, T)"
        assert got.nonzero().tolist() == [[b, t] for b, t in enumerate(last)], "position length - 1, and no other"

def test_E10_last_token__padding():
    lengths = torch.tensor([1, 4, 2])
    assert pure(last_token, lengths, 6), PURE
    assert last_token(lengths, 6).sum(1).tolist() == [1, 1, 1], "one position a row, padding or not"

def test_E11_bradley_terry_loss__against_a_loop():
    _, rng = draws(110)
    for N, scale in ((1, 1), (4, 2), (9, 60), (30, 0.3), (37, 0)):
        chosen, rejected, weight = (torch.randn(N, generator=rng) for _ in range(3))
        chosen, rejected, weight = chosen * scale, rejected * scale, weight.abs() + 0.1
        chosen += 0 if scale else torch.arange(-9, 9.5, 0.5)
        margins = (chosen - rejected).double().tolist()
        losses = [max(-margin, 0.0) + math.log1p(math.exp(-abs(margin))) for margin in margins]
        near(bradley_terry_loss(chosen, rejected), np.mean(losses), "the mean of -log sigmoid(chosen - rejected)")
        want = np.average(losses, weights=weight.double())
        near(bradley_terry_loss(chosen, rejected, weight), want, "the weighted mean: weights are relative")

def test_E11_bradley_terry_loss__gradients():
    _, rng = draws(111)
    chosen = torch.cat([torch.randn(5, generator=rng), torch.tensor([9.0, -300.0, 300.0])]).requires_grad_()
    rejected = torch.cat([torch.randn(5, generator=rng), torch.tensor([0.0, 300.0, -300.0])]).requires_grad_()
    weight = torch.tensor([1.0, 2.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert pure(bradley_terry_loss, chosen.detach(), rejected.detach(), weight), PURE
    bradley_terry_loss(chosen, rejected, weight).backward()
    margin = (chosen - rejected).detach().double().numpy()
    want = -weight.double().numpy() / 8.5 / (1 + np.exp(np.minimum(margin, 600)))
    near(chosen.grad, want, "chosen is pushed up by weight * sigmoid(-margin)")
    near(rejected.grad, -want, "rejected is pushed down as much")

def rewards_case(B, T):
    rng, torch_rng = draws(120 + T)
    mask, scores = spans(rng, B, T), torch.randn(B, generator=torch_rng) * 9
    logprobs, reference = (-torch.rand(B, T, generator=torch_rng) * 4 for _ in range(2))
    return mask, scores, outlier(logprobs, mask, -90), reference

def test_E12_shape_rewards__against_a_loop():
    for B, T, kl_coef in ((3, 6, 0.05), (5, 9, 0.3), (4, 4, 0.0), (3, 12, 1.5)):
        mask, scores, logprobs, reference = rewards_case(B, T)
        want = np.zeros((B, T))
        for b, row in enumerate(cells(mask)):
            for t in row:
                want[b, t] = -kl_coef * (logprobs[b, t].double() - reference[b, t].double())
            want[b, row[-1]] += scores[b].double()
        got = shape_rewards(scores, filled(logprobs, mask, 5.0), filled(reference, mask, 1.0, -3.0), mask, kl_coef)
        near(got, want, "-kl_coef * (logprob - ref_logprob) on True cells, the score on the last of them, else 0")

def test_E12_shape_rewards__masked_cells():
    mask, scores, *logprobs = rewards_case(4, 6)
    check_masked_cells(lambda a, b: shape_rewards(scores, a, b, mask, 0.2), mask, logprobs, gradient=False)

def gae_case(B, T):
    """mask, rewards, values."""
    rng, torch_rng = draws(130 + T)
    mask = spans(rng, B, T)
    rewards, values = (torch.randn(B, T, generator=torch_rng) for _ in range(2))
    return mask, filled(outlier(rewards, mask, 80), mask, 0.0), outlier(values, mask, -40)

def check_gae(which, why):
    for B, T, gamma, lam in ((3, 6, 1.0, 0.95), (5, 9, 0.9, 0.8), (4, 7, 0.7, 0.0), (3, 8, 0.9, 1.0), (4, 5, 0.0, 0.5)):
        mask, rewards, values = gae_case(B, T)
        advantages, returns = np.zeros((B, T)), np.zeros((B, T))
        for b, row in enumerate(cells(mask)):
            r, v = rewards[b, row].double().tolist(), [*values[b, row].double().tolist(), 0.0]
            deltas = [r[i] + gamma * v[i + 1] - v[i] for i in range(len(r))]
            for i, t in enumerate(row):  # A_i = sum over k of (gamma lam)^k delta_(i+k), written out
                advantages[b, t] = math.fsum((gamma * lam) ** k * deltas[i + k] for k in range(len(r) - i))
                returns[b, t] = advantages[b, t] + v[i]
        got = gae(rewards, filled(values, mask, 3.0, -2.0), mask, gamma, lam)
        near(got[which], (advantages, returns)[which], why)
        assert which == 0 or pure(gae, filled(rewards, mask, 3.0), values, mask, gamma, lam), PURE

def test_E13_gae__against_the_double_sum():
    check_gae(0, "A_t is the sum of (gamma lam)^k delta_(t+k), over the response alone; 0 off the mask")

def test_E13_gae__returns():
    check_gae(1, "the return is the advantage plus the value; 0 off the mask")

def test_E13_gae__masked_values():
    mask, rewards, values = gae_case(4, 6)
    check_masked_cells(lambda x: gae(rewards, x, mask, 0.9, 0.8), mask, [values], gradient=False)

def whiten_case(B, T, scale, shift, far):
    mask = spans(draws(150 + T)[0], B, T)
    return mask, outlier(torch.randn(B, T, generator=draws(150 + T)[1]) * scale + shift, mask, far)

def test_E13_whiten__against_numpy():
    for case in ((3, 7, 1, 0, 0), (5, 4, 30, 10, 9), (4, 9, 0.01, -3, -3), (6, 12, 1, 0, 500)):
        mask, x = whiten_case(*case)
        inside, want = x[mask].double().numpy(), np.zeros(mask.shape)
        want[mask.numpy()] = (inside - inside.mean()) / np.sqrt(inside.var() + 1e-8)
        why = "mean 0, biased variance 1 over the True cells, else 0"
        near(whiten(filled(x, mask, 3.0, -2.0), mask), want, why, tolerance=2e-3)

def test_E13_whiten__masked_cells():
    mask, x = whiten_case(4, 6, 1, 0, 3)
    check_masked_cells(lambda x: whiten(x, mask), mask, [x], gradient=False)

def test_E13_whiten__without_variance():
    for mask in ([[True, False], [True, True]], [[False, False], [True, False]]):
        got = whiten(torch.full((2, 2), 3.0), torch.tensor(mask))
        near(got, np.zeros((2, 2)), "equal cells, or a single one, give 0")

def loss_case(B, T, far):
    """mask, new, old, advantages or returns, total."""
    rng, torch_rng = draws(140 + T)
    mask = spans(rng, B, T)
    old, move, third = (torch.randn(B, T, generator=torch_rng) for _ in range(3))
    return mask, old + move * 0.4, old, outlier(third * 2, mask, far), int(mask.sum()) + rng.randrange(2, 20)

def check_loss(function, of_token, far, *whys):
    """Loss and gradient, or the count, against of_token(new, old, third, clip) -> plain, clipped, slope of plain."""
    for B, T, clip in ((3, 6, 0.2), (5, 9, 0.1), (4, 7, 0.4)):
        mask, new, old, third, total = loss_case(B, T, far)
        loss, grad, count = 0.0, np.zeros(mask.shape), 0
        for b, row in enumerate(cells(mask)):
            for t in row:
                plain, clipped, slope = of_token(*(x[b, t].double().item() for x in (new, old, third)), clip)
                loss += max(plain, clipped) / total
                count += clipped > plain
                grad[b, t] = 0.0 if clipped > plain else slope / total
        leaf = filled(new, mask, 0.5, -0.5).requires_grad_()
        got, clipped = function(leaf, filled(old, mask, 0.1), filled(third, mask, 3.0, -2.0), mask, clip, total)
        if len(whys) == 1:
            assert int(clipped) == count, whys[0]
            continue
        near(got, loss, whys[0])
        got.backward()
        near(leaf.grad, grad, whys[1])

def surrogates(new, old, advantage, clip):
    plain = -advantage * math.exp(new - old)
    return plain, -advantage * min(max(math.exp(new - old), 1 - clip), 1 + clip), plain

def errors(value, old, target, clip):
    return (value - target) ** 2 / 2, (min(max(value, old - clip), old + clip) - target) ** 2 / 2, value - target

def test_E14_policy_loss__against_a_loop():
    check_loss(policy_loss, surrogates, 60,
        "minus the smaller of the two surrogates, summed over True cells, over total",
        "the gradient: -advantage * ratio / total, 0 where clipped or masked")

def test_E14_policy_loss__the_count():
    check_loss(policy_loss, surrogates, 60, "the count of True cells whose clipped surrogate is the smaller")

def test_E14_policy_loss__masked_cells():
    mask, *tensors, total = loss_case(4, 6, 2)
    check_masked_cells(lambda *x: policy_loss(*x, mask, 0.2, total), mask, tensors)

def test_E14_policy_loss__extremes():
    new, mask = torch.tensor([[700.0, -700.0, 700.0, -700.0]]).requires_grad_(), torch.ones(1, 4).bool()
    loss, _ = policy_loss(new, -new.detach(), torch.tensor([[1.0, -1.0, -1.0, 1.0]]), mask, 0.2, 4)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(new.grad).all(), "finite for any ratio, and so its gradient"
    want = (-1.2 + 0.8 + math.exp(20) - math.exp(-20)) / 4
    near(loss, want, "the log of the ratio is kept within +-20, and no closer", tolerance=1e-4)

def test_E14_value_loss__against_a_loop():
    check_loss(value_loss, errors, 50,
        "half of the greater squared error, summed over True cells, over total",
        "the gradient: (value - return) / total, 0 where clipped or masked")

def test_E14_value_loss__the_count():
    check_loss(value_loss, errors, 50, "the count of True cells whose clipped error is the greater")

def test_E14_value_loss__masked_cells():
    mask, *tensors, total = loss_case(4, 6, 2)
    check_masked_cells(lambda *x: value_loss(*x, mask, 0.2, total), mask, tensors)
