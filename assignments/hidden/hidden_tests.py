"""Hidden tests: the same properties as the public ones on inputs drawn from a seed, against independent references.

The references are plain loops in double precision, written from the task's formula and not from the solution. grade.py
runs this file in the grader's process; the student's functions, imported here, live in another one. A message names
the property and never a value. SEED is set by grade.py --seed: choose one that is not in a public repository.
"""

import copy
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch

from answers import extract_answer
from data import collate
from generate import sample_token
from model import RMSNorm, last_value, rotate, token_logprobs
from ppo import gae, policy_loss, shape_rewards, value_loss, whiten
from pseudo_reward import Sample, majority_vote, make_pairs, pseudo_rewards, winners
from reward import bradley_terry_loss
from sft import sft_loss

SEED = 0
NAN = float("nan")


def draws(salt: int) -> tuple[random.Random, torch.Generator]:
    """Generators of a test's own: the order of the tests does not matter."""
    return random.Random(SEED * 1000 + salt), torch.Generator().manual_seed(SEED * 1000 + salt)


def near(got, want, tolerance: float = 2e-5, dtype=torch.float32) -> bool:
    """Same shape, same type, no NaN, and every value within `tolerance` of its size or of 1, whichever is greater."""
    want = np.asarray(want, float)
    if not isinstance(got, torch.Tensor) or got.dtype != dtype or tuple(got.shape) != want.shape:
        return False
    return bool(np.all(np.abs(got.detach().double().numpy() - want) <= tolerance * np.maximum(1, np.abs(want))))


def spans(rng: random.Random, B: int, T: int) -> torch.Tensor:
    """A mask (B, T) as batches have it: one run of True per row, after a prompt and before padding, none of them empty.

    The first row reaches the last column, the second begins in the first, the third holds a single token.
    """
    mask = torch.zeros(B, T, dtype=torch.bool)
    for b in range(B):
        start, end = sorted(rng.sample(range(T + 1), 2))
        start, end = {0: (T // 2, T), 1: (0, T - 2), 2: (2, 3)}.get(b, (start, end))
        mask[b, start:end] = True
    return mask


def poison(x: torch.Tensor, mask: torch.Tensor, turn: int = 0) -> torch.Tensor:
    """x with NaN, infinity or a million in the masked cells, in turns; `turn` is where it begins."""
    bad = torch.tensor([NAN, math.inf, 1e6, -1e6]).roll(turn).repeat(x.numel())[: x.numel()].reshape(x.shape)
    return torch.where(mask, x, bad.to(x.dtype))


def pure(function, *arguments) -> bool:
    """Whether a call leaves its arguments as they were."""
    before = copy.deepcopy(arguments)
    function(*arguments)
    return all(a.equal(b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(before, arguments))


# ---- E1: read the final answer -------------------------------------------------------------------------------------


@pytest.mark.E1("extract_answer")
def test_E1_the_forms_in_which_an_answer_is_stated():
    rng, _ = draws(1)
    for _ in range(8):
        n = rng.randrange(1000, 9000)
        for text in (
            f"#### {n}",
            f"#### ${n:,}.00",
            f"so the answer is {n}.",
            f"The answer is **{n}**.",
            f"\\boxed{{{n}}}",
            f"<answer>{n}</answer>",
        ):
            assert extract_answer(text, "number") == str(n), "an answer that is stated in a usual form is found"
        assert extract_answer(f"Answer: -{n}", "number") == f"-{n}", "the sign belongs to the number"
        assert extract_answer(f"x\nA: {n / 8}", "number") == f"{n / 8:.3f}".rstrip("0").rstrip("."), (
            "decimals are canonical"
        )
    letter = rng.choice("BCDEFGH")
    assert extract_answer(f"The answer is ({letter}).", "choice") == letter, "a letter in brackets is a choice"
    assert extract_answer(f"so ({letter.lower()})... the answer is ({letter.lower()})", "choice") == letter, (
        "upper case"
    )
    assert extract_answer("#### 5", "choice") is None, "a number is no choice"


@pytest.mark.E1("extract_answer")
def test_E1_the_strongest_mark_and_its_first_statement():
    rng, _ = draws(2)
    a, b, c, d = rng.sample(range(100, 999), 4)
    assert extract_answer(f"Answer: {a}\nThe answer is {b}.\n#### {c}", "number") == str(c), (
        "the order of the marks counts"
    )
    assert extract_answer(f"Answer: {a}. So the answer is {b}", "number") == str(b), (
        "a sentence is stronger than a label"
    )
    assert extract_answer(f"#### {c}\nThe answer is {b}.\nAnswer: {a}", "number") == str(c), "whatever their places"
    text = f"#### {a}\n\nQ: next\n#### {b}\n#### {c} and {d}"
    for lenient in (False, True):
        assert extract_answer(text, "number", lenient) == str(a), "the first statement of a mark counts"
    assert extract_answer("The answer is (B). So the answer is (D).", "choice") == "B", "also for letters"


@pytest.mark.E1("extract_answer")
def test_E1_taken_back():
    rng, _ = draws(3)
    a, b, c = rng.sample(range(100, 999), 3)
    text = f"The answer is {a}. Wait, that is wrong. The answer is {b}. The answer is {c}."
    assert extract_answer(text, "number") == str(b), "the first statement that is not taken back counts"
    text = f"The answer is {a}." + " and so on" * 8 + f" Actually, no. The answer is {b}."
    assert extract_answer(text, "number") == str(b), "it may be taken back up to 100 characters later"
    text = f"The answer is {a}." + " and so on" * 11 + f" Actually, nice. The answer is {b}."
    assert extract_answer(text, "number") == str(a), "what follows after more than 100 characters takes nothing back"
    text = f"The answer is {a}. Wait. The answer is {b}. Sorry, I do not know"
    assert extract_answer(text, "number") == str(b), "if all are taken back the last one counts"


@pytest.mark.E1("extract_answer")
def test_E1_strict_lenient_and_thoughts():
    rng, _ = draws(4)
    a, b, c = rng.sample(range(100, 999), 3)
    text = f"first {a}, then {b} pens"
    assert extract_answer(text, "number") is None, "strict: a number that is only mentioned is no answer"
    assert extract_answer(text, "number", lenient=True) == str(b), "lenient: the last number"
    assert extract_answer(f"3 or ${a},500.50", "number", lenient=True) == f"{a}500.5", (
        "the last number is canonical, too"
    )
    assert extract_answer("It is not B, maybe D or E", "choice", lenient=True) == "E", "lenient: the last lone letter"
    assert extract_answer(f"#### {a}\n{b}", "number", lenient=True) == str(a), "lenient prefers what is stated"
    assert extract_answer(f"<think>#### {a}</think>I say {b}", "number") is None, "thoughts state nothing"
    assert extract_answer(f"<think>{a}</think>", "number", lenient=True) is None, "thoughts mention nothing"
    assert extract_answer(f"#### {a}</think>#### {b}</think>#### {c}", "number") == str(b), (
        "only the first </think> ends it"
    )
    assert extract_answer(f"A: {a}", "number") == str(a), "the text begins like a line"
    assert extract_answer("\\boxed{\\frac{3}{4}}", "number") == "0.75", "what only decorates is read away"
    assert extract_answer("", "number", lenient=True) is None, "an empty text has no answer"
    for lenient in (False, True):
        assert extract_answer("#### 3/0 or 5", "number", lenient) is None, "what has no canonical form is no answer"


# ---- E2: a batch and its mask --------------------------------------------------------------------------------------


@pytest.mark.E2("collate")
def test_E2_random_batches():
    rng, _ = draws(20)
    for B in (1, 2, 5, 8):
        prompts = [[rng.randrange(0, 4) for _ in range(rng.randrange(1, 6))] for _ in range(B)]
        responses = [[rng.randrange(0, 4) for _ in range(rng.randrange(1, 7))] for _ in range(B)]
        before = [list(p) for p in prompts], [list(r) for r in responses]
        tokens, mask, lengths = collate(prompts, responses)
        T = max(len(p) + len(r) for p, r in zip(prompts, responses))
        assert (prompts, responses) == before, "the lists that came in are not changed"
        assert tokens.dtype == torch.long and lengths.dtype == torch.long, "tokens and lengths are torch.long"
        assert mask.dtype == torch.bool, "the mask is boolean"
        assert tuple(tokens.shape) == (B, T), "tokens are as wide as the longest row"
        assert tuple(mask.shape) == (B, T - 1), "the mask has one column less than tokens"
        assert lengths.tolist() == [len(p) + len(r) for p, r in zip(prompts, responses)], (
            "lengths of prompt and response"
        )
        for b, (p, r) in enumerate(zip(prompts, responses)):
            assert tokens[b].tolist() == p + r + [0] * (T - len(p) - len(r)), "prompt, response, then zeros"
            for t in range(T - 1):
                inside = len(p) <= t + 1 < len(p) + len(r)
                assert bool(mask[b, t]) == inside, "entry t is True where token t + 1 is of the response"


@pytest.mark.E2("collate")
def test_E2_one_token_prompts_and_responses():
    tokens, mask, lengths = collate([[3], [3, 3, 3]], [[0], [0]])
    assert mask.tolist() == [[True, False, False], [False, False, True]], "a response of one token is one True"
    assert lengths.tolist() == [2, 4] and tokens.tolist() == [[3, 0, 0, 0], [3, 3, 3, 0]], "short rows are padded"


# ---- E3: two parts of Llama ----------------------------------------------------------------------------------------


@pytest.mark.E3("RMSNorm.forward")
def test_E3_rms_norm_against_a_loop():
    _, rng = draws(30)
    for shape in ((3, 8), (2, 3, 5), (6,)):
        x = torch.randn(shape, generator=rng) * 3 + 1
        norm = RMSNorm(shape[-1], 0.1)
        norm.weight.data = torch.randn(shape[-1], generator=rng)
        rows = x.double().reshape(-1, shape[-1]).tolist()
        want = [
            [w * v / math.sqrt(sum(u * u for u in r) / len(r) + 0.1) for w, v in zip(norm.weight.tolist(), r)]
            for r in rows
        ]
        assert near(norm(x), np.reshape(want, shape)), "weight * x / sqrt(mean square + eps), over the last dimension"


@pytest.mark.E3("RMSNorm.forward")
def test_E3_rms_norm_types_and_gradient():
    _, rng = draws(31)
    x = (torch.randn(4, 16, generator=rng) * 200).half()
    norm = RMSNorm(16, 1e-5)
    assert pure(norm, x.float()), "the input stays as it was"
    norm.weight.data = norm.weight.data.half()
    want = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert near(norm(x), want, 1e-3, torch.float16), "worked out in fp32 and brought back to the type of x"
    x = torch.randn(1, 6, generator=rng).requires_grad_()
    norm = RMSNorm(6, 0.5)
    norm(x)[0, 2].backward()
    scale, v = (x.detach().double().square().mean() + 0.5).item(), x.detach().double()[0]
    want = [(float(i == 2) - (v[2] * v[i]).item() / (6 * scale)) / math.sqrt(scale) for i in range(6)]
    assert near(x.grad[0], want), "the gradient goes through the norm, too"
    assert norm.weight.grad is not None, "the weight is trained"


@pytest.mark.E3("rotate")
def test_E3_rotate_against_complex_numbers():
    _, rng = draws(32)
    for B, T, H, E in ((1, 1, 1, 2), (2, 5, 3, 8), (1, 7, 2, 6)):
        x, angle = torch.randn(B, T, H, E, generator=rng), torch.randn(T, 1, E // 2, generator=rng)
        half = E // 2
        turned = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.polar(
            torch.ones(T, 1, half, dtype=torch.float64), angle.double()
        )
        wide = torch.cat([angle, angle], -1)
        got = rotate(x, wide.cos(), wide.sin())
        assert near(got, torch.cat([turned.real, turned.imag], -1)), "each pair (i, i + E/2) turns by its angle"


@pytest.mark.E3("rotate")
def test_E3_rotate_batched_angles():
    _, rng = draws(33)
    args = torch.randn(1, 3, 1, 4, generator=rng), *(torch.rand(3, 1, 4, generator=rng) for _ in range(2))
    assert pure(rotate, *args), "a pure function changes no argument"
    x, angle = torch.randn(2, 4, 3, 4, generator=rng), torch.randn(2, 4, 1, 2, generator=rng)
    wide = torch.cat([angle, angle], -1)
    got = rotate(x, wide.cos(), wide.sin())
    for b in range(2):
        alone = rotate(x[b : b + 1], wide[b].cos(), wide[b].sin())
        assert near(got[b : b + 1], alone.double()), "cos and sin broadcast to x"
    assert near(got.square().sum(-1), x.double().square().sum(-1)), "a rotation changes no length"


# ---- E4: log-probabilities of tokens -------------------------------------------------------------------------------


def log_softmax(row: list[float], temperature: float) -> list[float]:
    scaled = [value / temperature for value in row]
    top = max(scaled)
    norm = top + math.log(math.fsum(math.exp(value - top) for value in scaled))
    return [value - norm for value in scaled]


@pytest.mark.E4("token_logprobs")
def test_E4_against_a_loop():
    rng, torch_rng = draws(40)
    for B, T, V, temperature, scale in ((1, 2, 3, 1.0, 1), (3, 5, 7, 0.7, 4), (2, 6, 5, 2.5, 300), (4, 3, 4, 1.0, 30)):
        logits = torch.randn(B, T, V, generator=torch_rng) * scale
        tokens = torch.tensor([[rng.randrange(V) for _ in range(T)] for _ in range(B)])
        got = token_logprobs(logits, tokens, temperature)
        want = [
            [log_softmax(logits[b, t].double().tolist(), temperature)[tokens[b, t + 1]] for t in range(T - 1)]
            for b in range(B)
        ]
        assert near(got, want), "entry t is the log softmax of logits[:, t] / temperature at tokens[:, t+1]"


@pytest.mark.E4("token_logprobs")
def test_E4_precision_and_gradient():
    _, rng = draws(41)
    logits, tokens = torch.randn(2, 4, 9, generator=rng), torch.randint(9, (2, 4), generator=rng)
    exact = torch.log_softmax(logits.bfloat16().double()[:, :-1] / 0.9, -1).gather(-1, tokens[:, 1:, None])[..., 0]
    assert near(token_logprobs(logits.bfloat16(), tokens, 0.9), exact), "half precision is worked on in fp32"
    assert pure(token_logprobs, logits, tokens, 0.9), "a pure function changes no argument"
    wide = token_logprobs(logits.double(), tokens, 0.9)
    assert wide.dtype == torch.float64, "double precision stays"
    leaf = logits.clone().requires_grad_()
    token_logprobs(leaf, tokens).sum().backward()
    want = torch.nn.functional.one_hot(tokens[:, 1:], 9) - torch.softmax(logits.double()[:, :-1], -1)
    assert near(leaf.grad[:, :-1], want), "the gradient is one-hot minus softmax"
    assert near(leaf.grad[:, -1], np.zeros((2, 9))), "the last position predicts nothing"


# ---- E5: the loss of supervised fine-tuning ------------------------------------------------------------------------


@pytest.mark.E5("sft_loss")
def test_E5_against_a_loop():
    rng, torch_rng = draws(50)
    for B, T in ((3, 6), (4, 9), (6, 5)):
        mask, logprobs = spans(rng, B, T), -torch.rand(B, T, generator=torch_rng) * 5
        total = int(mask.sum()) + rng.randrange(3, 30)
        logprobs[2, 2] = 0.0  # a sure token is trained as well
        cells = [(b, t) for b in range(B) for t in range(T) if mask[b, t]]
        want = -math.fsum(logprobs[cell].item() for cell in cells) / total
        leaf = poison(logprobs, mask).requires_grad_()
        loss = sft_loss(leaf, mask, total)
        assert near(loss, want), "minus the sum over the True cells, over total"
        loss.backward()
        assert near(leaf.grad, -mask.double() / total), "the gradient is -1/total on every True cell and 0 elsewhere"


@pytest.mark.E5("sft_loss")
def test_E5_a_fault_inside_the_mask_shows():
    loss = sft_loss(torch.tensor([[-1.0, NAN]]), torch.tensor([[True, True]]), 2)
    assert bool(loss.isnan()), "a NaN in a True cell is a fault of the model and must show in the loss"


@pytest.mark.E5("sft_loss")
def test_E5_a_micro_batch_without_response_tokens_adds_nothing():
    assert pure(sft_loss, torch.tensor([[-1.0, -2.0]]), torch.tensor([[True, False]]), 7), "no argument is changed"
    loss = sft_loss(torch.tensor([[-1.0, -2.0]]), torch.tensor([[False, False]]), 7)
    assert near(loss, 0.0), "an empty mask is a loss of 0"


# ---- E6: draw a token ----------------------------------------------------------------------------------------------


@pytest.mark.E6("sample_token")
def test_E6_against_a_loop():
    _, rng = draws(60)
    for V, temperature in ((5, 0.4), (7, 1.0), (6, 3.0)):
        logits = torch.randn(300, V, generator=rng) * 1.5
        chance = torch.rand(300, generator=rng, dtype=torch.float64)
        want = [np.exp(log_softmax(row, temperature)) for row in logits.double().tolist()]
        pairs = list(zip(want, chance.tolist()))
        tokens = [next((v for v in range(V) if math.fsum(p[: v + 1]) > c), V - 1) for p, c in pairs]
        edges = [np.abs(np.cumsum(p) - c).min() < 1e-5 for p, c in pairs]  # rounding decides there
        token, logprob = sample_token(logits, temperature, chance)
        assert token.dtype == torch.long and tuple(token.shape) == (300,), "one token id per row"
        assert all(edge or a == b for edge, a, b in zip(edges, token.tolist(), tokens)), (
            "the first token whose cumulative probability, of the tempered softmax, exceeds the row's chance"
        )
        assert near(logprob, [math.log(p[v]) for p, v in zip(want, token.tolist())]), (
            "the log-prob is that of the distribution that was drawn from"
        )


@pytest.mark.E6("sample_token")
def test_E6_rows_do_not_mix():
    _, rng = draws(61)
    logits = torch.full((30, 30), -60.0) + torch.eye(30)[torch.randperm(30, generator=rng)] * 120
    for temperature in (0.0, 1.0):
        token, logprob = sample_token(logits, temperature, torch.rand(30, generator=rng, dtype=torch.float64))
        assert token.tolist() == logits.argmax(-1).tolist(), "each row draws from its own logits"
        assert near(logprob, np.zeros(30)), "a sure token has a log-prob of 0"


@pytest.mark.E6("sample_token")
def test_E6_greedy_log_probs():
    _, rng = draws(62)
    logits, chance = torch.randn(6, 8, generator=rng) * 2, torch.rand(6, generator=rng, dtype=torch.float64)
    assert pure(sample_token, logits, 0.7, chance), "a pure function changes no argument"
    token, logprob = sample_token(logits, 0.0, chance)
    rows = [log_softmax(row, 1.0) for row in logits.double().tolist()]
    assert token.tolist() == [max(range(8), key=row.__getitem__) for row in rows], (
        "temperature 0 takes the largest logit"
    )
    assert near(logprob, [max(row) for row in rows]), "its log-prob is that of the softmax at temperature 1"


@pytest.mark.E6("sample_token")
def test_E6_rare_tokens():
    """One token has all but a millionth of the probability, a thousand others share that evenly."""
    logits = torch.cat([torch.tensor([math.log(1e9)]), torch.zeros(1000)]).repeat(9, 1)
    share = torch.arange(1, 10, dtype=torch.float64) / 10
    token, logprob = sample_token(logits, 1.0, 1 - (1 - share) * 1000 / (1e9 + 1000))
    off = token.double() - (1 + 1000 * share)
    assert bool((off.abs() < 3).all()), "rare tokens are drawn as often as they should: sums in fp32 lose them"
    assert near(logprob, np.full(9, -math.log(1e9 + 1000))), "the log-prob of a rare token"


@pytest.mark.E6("sample_token")
def test_E6_the_ends():
    _, rng = draws(63)
    logits = torch.randn(40, 12, generator=rng)
    logits[:, [0, 5, 11]] = -math.inf
    for chance, want in ((0.0, 1), (1 - 2**-53, 10)):
        token, _ = sample_token(logits, 1.0, torch.full((40,), chance, dtype=torch.float64))
        assert token.tolist() == [want] * 40, "a token of probability 0 is never drawn, at neither end"


# ---- E7: the majority vote -----------------------------------------------------------------------------------------


def vote(answers, logprobs=None):
    """By sorting counts: the independent reference. Log-probs are multiples of 1/8, so that sums are exact."""
    counts = Counter(a for a in answers if a is not None)
    ranking = sorted(
        (
            (count, sum(lp for a, lp in zip(answers, logprobs) if a == answer))
            if logprobs and None not in logprobs
            else (count, 0),
            answer,
        )
        for answer, count in counts.items()
    )
    if not ranking or (len(ranking) > 1 and ranking[-1][0] == ranking[-2][0]):
        return None, 0.0
    return ranking[-1][1], ranking[-1][0][0] / len(answers)


def same_vote(got, want) -> bool:
    return (
        isinstance(got, tuple) and len(got) == 2 and got[0] == want[0] and math.isclose(got[1], want[1], rel_tol=1e-9)
    )


@pytest.mark.E7("majority_vote")
def test_E7_random_votes():
    rng, _ = draws(70)
    for _ in range(40):
        answers = [rng.choice(["12", "3", "7", None, "2.5"]) for _ in range(rng.randrange(1, 9))]
        assert same_vote(majority_vote(answers), vote(answers)), (
            "the most frequent answer, its share of all; ties: nobody"
        )
        logprobs = [-rng.randrange(1, 24) / 8 for _ in answers]
        assert same_vote(majority_vote(answers, logprobs), vote(answers, logprobs)), (
            "ties go to the greater sum of log-probs"
        )


@pytest.mark.E7("majority_vote")
def test_E7_three_way_ties_and_missing_log_probs():
    answers = ["a", "b", "c", None, "c", "b", "a"]
    assert same_vote(majority_vote(answers), (None, 0.0)), "a tie of three has no winner"
    logprobs = [-2.0, -1.0, -3.0, -0.1, -1.0, -0.5, -2.0]
    assert same_vote(majority_vote(answers, logprobs), ("b", 2 / 7)), "of three tied answers the likeliest wins"
    logprobs = [-2.0, -2.0, -0.25, -0.1, -0.25, -2.0, -2.0]
    assert same_vote(majority_vote(answers, logprobs), ("c", 2 / 7)), "whichever of the three it is"
    assert same_vote(majority_vote(["a", "b"], [0.0, -1.0]), ("a", 0.5)), "a log-prob of 0 is one: a sure answer's"
    logprobs[3] = None
    assert same_vote(majority_vote(answers, logprobs), (None, 0.0)), "a single missing log-prob, even of a None: nobody"
    assert same_vote(majority_vote(["a", "a", "b"], [None, None, None]), ("a", 2 / 3)), (
        "no tie: log-probs are not asked"
    )
    assert same_vote(majority_vote(["a", "b", "b", "a"], [-1.0, -0.5, -1.5, -1.0]), (None, 0.0)), "an exact tie: nobody"
    assert same_vote(majority_vote(["a", "b", "c", "c", "b"], [-0.125, -1.0, -1.0, -1.0, -1.0]), (None, 0.0)), (
        "an answer with fewer votes takes no part in a tie"
    )


@pytest.mark.E7("majority_vote")
def test_E7_the_order_does_not_matter():
    rng, _ = draws(71)
    assert pure(majority_vote, ["b", "a", None, "b"], [-1.0, -2.0, -3.0, -4.0]), "the lists stay as they were"
    answers, logprobs = ["x", "y", "y", "x", "z", None], [-1.0, -0.25, -1.0, -0.5, -0.125, -4.0]
    for _ in range(8):
        order = rng.sample(range(6), 6)
        got = majority_vote([answers[i] for i in order], [logprobs[i] for i in order])
        assert same_vote(got, ("y", 2 / 6)), "an answer's place in the list does not matter"


# ---- E8: rewards without labels ------------------------------------------------------------------------------------


def samples(rng: random.Random, count: int, suffix: str = "") -> list[Sample]:
    """Random samples with texts that repeat."""
    return [
        Sample(
            "q",
            rng.choice(["teacher", "student"]),
            rng.choice("abcd") * rng.randrange(1, 4) + suffix,
            rng.choice(["1", "2", None]),
            rng.random() < 0.8,
            -rng.random(),
        )
        for _ in range(count)
    ]


@pytest.mark.E8("pseudo_rewards")
def test_E8_random_rewards():
    rng, _ = draws(80)
    for _ in range(10):
        some = samples(rng, 9)
        want = [1 if s.ended and s.answer is not None and s.answer == "1" else 0 for s in some]
        got = pseudo_rewards(some, "1")
        assert got == want, "1 where the response ended and its answer is the vote, else 0"
        assert all(type(reward) is int for reward in got), "rewards are integers, 0 or 1, and no booleans"
    assert pseudo_rewards([], "1") == [], "no sample, no reward"
    some = [Sample("q", "student", "t", answer) for answer in ("10", "1", "01", "110")]
    assert pseudo_rewards(some, "1") == [0, 1, 0, 0], "answers are equal or not: no part of one counts"
    assert pseudo_rewards(some, "10") == [1, 0, 0, 0], "answers are equal or not: no part of the vote counts"
    assert pseudo_rewards([Sample("q", "student", "7 or 8? 8", "8")], "7") == [0], "the text was read already"


@pytest.mark.E8("winners")
def test_E8_random_winners():
    rng, _ = draws(81)
    some = [Sample("q", "teacher", text, "1") for text in ("x", "x", "x", "longer", "y")]
    assert winners(some, [1] * 5, 2) == ["x", "longer"], "the cap is on different texts"
    for most in (1, 2, 3, 50):
        some = samples(rng, 25)
        rewards = [rng.randrange(2) for _ in some]
        repeated, different = [], []
        for s, reward in zip(some, rewards):
            if reward and s.source == "teacher":
                repeated.append(s.response)
                if s.response not in different:
                    different.append(s.response)
        assert winners(some, rewards, most) == different[:most], (
            "different winning texts of the teacher, in order, at most so many"
        )
        assert pure(winners, some, rewards, most), "the lists that came in are not changed"
        assert winners(some, rewards, most, True) == repeated[:most], (
            "with keep_duplicates as often as they were sampled"
        )


# ---- E9: pairs for the reward model --------------------------------------------------------------------------------


def texts(pairs) -> list[tuple[str, str]]:
    return [(chosen.response, rejected.response) for chosen, rejected in pairs]


def kind(pair) -> bool:
    """True: both sides are the teacher's."""
    return pair[0].source == "teacher" and pair[1].source == "teacher"


@pytest.mark.E9("make_pairs")
def test_E9_random_pairs():
    rng, _ = draws(90)
    for round_ in range(12):
        some = samples(rng, 14)
        rewards = [int(s.ended and rng.random() < 0.5) for s in some]
        most = (2, 5, 500)[round_ % 3]
        good = [s for s, reward in zip(some, rewards) if reward]
        bad = [s for s, reward in zip(some, rewards) if not reward and s.ended]
        possible = {(c.response, r.response) for c in good for r in bad}
        with_student = {(c.response, r.response) for c in good for r in bad if not kind((c, r))}
        before = list(some), list(rewards)
        pairs = make_pairs(some, rewards, most, random.Random(round_))
        assert (some, rewards) == before, "the lists that came in are not changed"
        assert isinstance(pairs, list) and len(pairs) == min(most, len(possible)), "all different pairs, at most `most`"
        assert all(c in good and r in bad for c, r in pairs), "chosen has reward 1; rejected has 0 and ended"
        assert len(set(texts(pairs))) == len(pairs), "no two pairs with the same two texts"
        first = [kind(pair) for pair in pairs]
        assert first == sorted(first), "pairs with a response of the student come first"
        assert first.count(False) == min(most, len(with_student)), "and as many of them as there are"


@pytest.mark.E9("make_pairs")
def test_E9_the_draw():
    some = [Sample("q", "student", f"text {i}", "1", True) for i in range(12)]
    rewards, seen = [1, 0] * 6, Counter()
    for seed in range(120):
        pairs = texts(make_pairs(some, rewards, 6, random.Random(SEED + seed)))
        assert pairs == texts(make_pairs(some, rewards, 6, random.Random(SEED + seed))), (
            "a seed draws the same pairs again"
        )
        seen.update(pairs)
    assert len(seen) == 36, "every combination has its chance"
    assert max(seen.values()) < 48, "and no combination more than its share"


@pytest.mark.E9("make_pairs")
def test_E9_frequent_texts_and_the_order_of_sets():
    some = [Sample("q", "student", "often", "1", True)] * 9 + [Sample("q", "student", "rare", "1", True)]
    some += [Sample("q", "student", "bad", "2", True)]
    hits = sum(
        texts(make_pairs(some, [1] * 10 + [0], 1, random.Random(seed))) == [("often", "bad")] for seed in range(100)
    )
    assert hits > 70, "a text that was sampled often is met often"
    base = [Sample("q", "student", f"{i:02}", "1", True) for i in range(12)]
    draw = make_pairs(base, [1, 0] * 6, 6, random.Random(SEED))
    renamed = [Sample("q", "student", f"{i:02} again", "1", True) for i in range(12)]
    other = make_pairs(renamed, [1, 0] * 6, 6, random.Random(SEED))
    assert [(a + " again", b + " again") for a, b in texts(draw)] == texts(other), "the hash of a text decides nothing"


# ---- E10: the score of a whole answer ------------------------------------------------------------------------------


@pytest.mark.E10("last_value")
def test_E10_random_rows():
    rng, torch_rng = draws(100)
    assert pure(last_value, torch.ones(2, 3), torch.tensor([1, 3])), "a pure function changes no argument"
    for B, T in ((1, 1), (3, 7), (7, 3), (5, 5)):
        values, lengths = torch.randn(B, T, generator=torch_rng), [rng.randrange(1, T + 1) for _ in range(B)]
        real = torch.arange(T) < torch.tensor(lengths)[:, None]
        leaf = poison(values, real).requires_grad_()
        got = last_value(leaf, torch.tensor(lengths))
        assert near(got, [values[b, n - 1].item() for b, n in enumerate(lengths)]), "the value at position length - 1"
        weight = torch.randn(B, generator=torch_rng)
        (got * weight).sum().backward()
        want = np.zeros((B, T))
        want[range(B), [n - 1 for n in lengths]] = weight.double()
        assert near(leaf.grad, want), "the gradient goes there and nowhere else"


# ---- E11: the Bradley-Terry loss -----------------------------------------------------------------------------------


def minus_log_sigmoid(margin: float) -> float:
    return max(-margin, 0.0) + math.log1p(math.exp(-abs(margin)))


@pytest.mark.E11("bradley_terry_loss")
def test_E11_against_a_loop():
    _, rng = draws(110)
    for N, scale in ((1, 1), (4, 2), (9, 60)):
        chosen, rejected = torch.randn(N, generator=rng) * scale, torch.randn(N, generator=rng) * scale
        weight = torch.rand(N, generator=rng) + 0.1
        losses = [minus_log_sigmoid(c - r) for c, r in zip(chosen.double().tolist(), rejected.double().tolist())]
        assert near(bradley_terry_loss(chosen, rejected), np.mean(losses)), (
            "the mean of -log sigmoid(chosen - rejected)"
        )
        want = np.average(losses, weights=weight.double())
        assert near(bradley_terry_loss(chosen, rejected, weight), want), "the weighted mean: weights are relative"
        assert near(bradley_terry_loss(chosen, rejected, 7 * weight), want), "all weights times seven change nothing"


@pytest.mark.E11("bradley_terry_loss")
def test_E11_gradients():
    _, rng = draws(111)
    chosen = torch.cat([torch.randn(4, generator=rng), torch.tensor([-300.0, 300.0])]).requires_grad_()
    rejected = torch.cat([torch.randn(4, generator=rng), torch.tensor([300.0, -300.0])]).requires_grad_()
    weight = torch.tensor([1.0, 2.0, 0.5, 1.0, 1.0, 1.0])
    args = chosen.detach(), rejected.detach(), weight
    assert pure(bradley_terry_loss, *args), "a pure function changes no argument"
    bradley_terry_loss(chosen, rejected, weight).backward()
    margin = (chosen - rejected).detach().double().numpy()
    want = -weight.double().numpy() / 6.5 / (1 + np.exp(np.minimum(margin, 600)))
    assert near(chosen.grad, want), "chosen is pushed up by weight * sigmoid(-margin)"
    assert near(rejected.grad, -want), "rejected is pushed down as much"


# ---- E12: the reward of every token --------------------------------------------------------------------------------


@pytest.mark.E12("shape_rewards")
def test_E12_against_a_loop():
    rng, torch_rng = draws(120)
    for B, T, kl_coef in ((3, 6, 0.05), (5, 9, 0.3), (4, 4, 0.0), (3, 12, 1.5)):
        mask, scores = spans(rng, B, T), torch.randn(B, generator=torch_rng) * 2
        logprobs, ref_logprobs = (-torch.rand(B, T, generator=torch_rng) * 4 for _ in range(2))
        want = np.zeros((B, T))
        for b in range(B):
            cells = [t for t in range(T) if mask[b, t]]
            for t in cells:
                want[b, t] = -kl_coef * (logprobs[b, t].double() - ref_logprobs[b, t].double())
            want[b, cells[-1]] += scores[b].double()
        got = shape_rewards(scores, poison(logprobs, mask), poison(ref_logprobs, mask, 1), mask, kl_coef)
        assert near(got, want), (
            "-kl_coef * (logprob - ref_logprob) on True cells, the score on the last of them, else 0"
        )


@pytest.mark.E12("shape_rewards")
def test_E12_arguments_stay_as_they_were():
    rng, torch_rng = draws(121)
    mask, scores, logprobs = spans(rng, 3, 5), torch.ones(3), torch.randn(3, 5, generator=torch_rng)
    assert pure(shape_rewards, scores, logprobs, logprobs + 1, mask, 0.1), "a pure function changes no argument"


# ---- E13: advantages -----------------------------------------------------------------------------------------------


@pytest.mark.E13("gae")
def test_E13_gae_against_the_double_sum():
    rng, torch_rng = draws(130)
    for B, T, gamma, lam in (
        (3, 6, 1.0, 0.95),
        (5, 9, 0.9, 0.8),
        (4, 7, 0.7, 0.0),
        (3, 8, 0.95, 1.0),
        (4, 5, 0.0, 0.5),
    ):
        mask = spans(rng, B, T)
        rewards = torch.where(mask, torch.randn(B, T, generator=torch_rng), 0.0)
        values = torch.randn(B, T, generator=torch_rng)
        advantages, returns = np.zeros((B, T)), np.zeros((B, T))
        for b in range(B):
            cells = [t for t in range(T) if mask[b, t]]
            r, v = rewards[b, cells].double().tolist(), [*values[b, cells].double().tolist(), 0.0]
            deltas = [r[i] + gamma * v[i + 1] - v[i] for i in range(len(r))]
            for i, t in enumerate(cells):  # A_i = sum over k of (gamma lam)^k delta_(i+k), written out
                advantages[b, t] = math.fsum((gamma * lam) ** k * deltas[i + k] for k in range(len(r) - i))
                returns[b, t] = advantages[b, t] + v[i]
        got = gae(rewards, poison(values, mask), mask, gamma, lam)
        assert near(got[0], advantages), (
            "A_t is the sum of (gamma lam)^k delta_(t+k), over the response alone; 0 off the mask"
        )
        assert near(got[1], returns), "the return is the advantage plus the value; 0 off the mask"


@pytest.mark.E13("gae")
def test_E13_gae_rewards_off_the_mask_and_arguments():
    rng, torch_rng = draws(131)
    mask = spans(rng, 4, 6)
    rewards, values = torch.randn(4, 6, generator=torch_rng), torch.randn(4, 6, generator=torch_rng)
    clean = gae(torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0), mask, 0.9, 0.9)
    assert pure(gae, rewards, values, mask, 0.9, 0.9), "a pure function changes no argument"
    dirty = gae(rewards, values, mask, 0.9, 0.9)
    for a, b in zip(clean, dirty):
        assert near(b, a.double()), "what stands off the mask changes nothing"


@pytest.mark.E13("whiten")
def test_E13_whiten_against_numpy():
    rng, torch_rng = draws(132)
    for B, T, scale, shift in ((3, 7, 1, 0), (5, 4, 30, 10), (4, 9, 0.01, -3)):
        mask, x = spans(rng, B, T), torch.randn(B, T, generator=torch_rng) * scale + shift
        cells = x[mask].double().numpy()
        want = np.zeros((B, T))
        want[mask.numpy()] = (cells - cells.mean()) / np.sqrt(cells.var() + 1e-8)
        assert near(whiten(poison(x, mask), mask), want, 2e-3), "mean 0, biased variance 1 over the True cells, else 0"


@pytest.mark.E13("whiten")
def test_E13_whiten_without_variance():
    mask = torch.tensor([[True, False], [True, True]])
    assert pure(whiten, torch.arange(4.0).reshape(2, 2), mask), "a pure function changes no argument"
    assert near(whiten(torch.full((2, 2), 3.0), mask), np.zeros((2, 2))), "equal cells give 0"
    mask[1] = False
    assert near(whiten(torch.tensor([[3.0, NAN], [1.0, 2.0]]), mask), np.zeros((2, 2))), "a single cell gives 0"


# ---- E14: the clipped losses ---------------------------------------------------------------------------------------


def spoiled(mask: torch.Tensor, *tensors: torch.Tensor):
    """The tensors with poison in all of them, then in one at a time; the first one as a leaf."""
    for which in ((0, 1, 2), (0,), (1,), (2,)):
        first, *rest = (poison(x, mask, i) if i in which else x for i, x in enumerate(tensors))
        yield first.clone().requires_grad_(), *rest


def slopes(loss, leaf) -> torch.Tensor:
    loss.backward()
    return leaf.grad


@pytest.mark.E14("policy_loss")
def test_E14_policy_loss_against_a_loop():
    rng, torch_rng = draws(140)
    for B, T, clip in ((3, 6, 0.2), (5, 9, 0.1), (4, 7, 0.3)):
        mask = spans(rng, B, T)
        old, move = -torch.rand(B, T, generator=torch_rng) * 3, torch.randn(B, T, generator=torch_rng) * 0.4
        advantages, total = torch.randn(B, T, generator=torch_rng) * 2, int(mask.sum()) + rng.randrange(2, 20)
        new = old + move
        loss, grad, count = 0.0, np.zeros((B, T)), 0
        for b in range(B):
            for t in range(T):
                if mask[b, t]:
                    ratio, a = math.exp((new[b, t].double() - old[b, t].double()).item()), advantages[b, t].item()
                    gain, limited = a * ratio, a * min(max(ratio, 1 - clip), 1 + clip)
                    loss -= min(gain, limited) / total
                    count += limited < gain
                    grad[b, t] = 0.0 if limited < gain else -gain / total
        for leaf, spoiled_old, spoiled_advantages in spoiled(mask, new, old, advantages):
            got, clipped = policy_loss(leaf, spoiled_old, spoiled_advantages, mask, clip, total)
            assert near(got, loss), "minus the smaller of the two surrogates, summed over True cells, over total"
            assert int(clipped) == count, "the count of True cells whose clipped surrogate is the smaller"
            assert near(slopes(got, leaf), grad), "the gradient: -advantage * ratio / total, 0 where clipped or masked"


@pytest.mark.E14("policy_loss")
def test_E14_policy_loss_extremes():
    mask = torch.tensor([[True, True, True, True]])
    new = torch.tensor([[700.0, -700.0, 700.0, -700.0]]).requires_grad_()
    advantages = torch.tensor([[1.0, -1.0, -1.0, 1.0]])
    loss, clipped = policy_loss(new, -new.detach(), advantages, mask, 0.2, 4)
    assert torch.isfinite(loss) and torch.isfinite(slopes(loss, new)).all(), "finite for any ratio, and so its gradient"
    assert near(loss, (-1.2 + 0.8 + math.exp(20) - math.exp(-20)) / 4, 1e-4), "the log of the ratio is kept within +-20"
    assert int(clipped) == 2, "clipping does not depend on the size of the ratio"
    new = torch.zeros(1, 4).requires_grad_()
    loss, clipped = policy_loss(new, torch.zeros(1, 4), advantages, mask, 0.2, 4)
    assert int(clipped) == 0, "at a ratio of 1 nothing is clipped"
    assert near(slopes(loss, new), -advantages.double() / 4), "at a ratio of 1 the gradient is the policy gradient"


@pytest.mark.E14("policy_loss")
def test_E14_policy_loss_trains_the_policy_alone():
    new, old, advantages = (torch.full((1, 2), v).requires_grad_() for v in (-1.0, -1.0, 0.5))
    mask = torch.tensor([[True, True]])
    args = new.detach(), old.detach(), advantages.detach(), mask
    assert pure(policy_loss, *args, 0.2, 2), "a pure function changes no argument"
    loss, _ = policy_loss(new, old.detach(), advantages.detach(), mask, 0.2, 2)
    assert loss.requires_grad, "the loss has a gradient"
    parts = [
        policy_loss(new[:, i : i + 1], old[:, i : i + 1], advantages[:, i : i + 1], mask[:, :1], 0.2, 2)[0]
        for i in (0, 1)
    ]
    assert near(parts[0] + parts[1], loss.item()), "micro-batches add up to the loss of the whole step"


@pytest.mark.E14("value_loss")
def test_E14_value_loss_against_a_loop():
    rng, torch_rng = draws(142)
    for B, T, clip in ((3, 6, 0.2), (5, 9, 0.5), (4, 7, 0.05)):
        mask = spans(rng, B, T)
        old, returns = (torch.randn(B, T, generator=torch_rng) for _ in range(2))
        new, total = old + torch.randn(B, T, generator=torch_rng) * 0.4, int(mask.sum()) + rng.randrange(2, 20)
        loss, grad, count = 0.0, np.zeros((B, T)), 0
        for b in range(B):
            for t in range(T):
                if mask[b, t]:
                    v, o, r = (x[b, t].double().item() for x in (new, old, returns))
                    limited = min(max(v, o - clip), o + clip)
                    plain, other = (v - r) ** 2, (limited - r) ** 2
                    loss += 0.5 * max(plain, other) / total
                    count += other > plain
                    grad[b, t] = 0.0 if other > plain else (v - r) / total
        for leaf, spoiled_old, spoiled_returns in spoiled(mask, new, old, returns):
            got, clipped = value_loss(leaf, spoiled_old, spoiled_returns, mask, clip, total)
            assert near(got, loss), "half of the greater squared error, summed over True cells, over total"
            assert int(clipped) == count, "the count of True cells whose clipped error is the greater"
            assert near(slopes(got, leaf), grad), "the gradient: (value - return) / total, 0 where clipped or masked"


@pytest.mark.E14("value_loss")
def test_E14_value_loss_micro_batches_and_empty_masks():
    _, rng = draws(143)
    new, old, returns = (torch.randn(2, 4, generator=rng) for _ in range(3))
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    assert pure(value_loss, new, old, returns, mask, 0.2, 4), "a pure function changes no argument"
    whole, _ = value_loss(new, old, returns, mask, 0.2, 4)
    parts = [value_loss(new[i : i + 1], old[i : i + 1], returns[i : i + 1], mask[i : i + 1], 0.2, 4)[0] for i in (0, 1)]
    assert near(parts[0] + parts[1], whole.item()), "micro-batches add up to the loss of the whole step"
    loss, clipped = value_loss(new, old, returns, mask & False, 0.2, 4)
    assert near(loss, 0.0) and int(clipped) == 0, "an empty mask is a loss of 0"
