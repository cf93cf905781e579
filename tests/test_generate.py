"""generate.py: the text is what the model's own full forward pass says, whoever else is in the batch; draws are
independent; questions are asked as they should be, and every answer stands beside its question."""

import itertools
import json

import pytest
import torch
from conftest import CASES, TEXTS

import generate as generation
from data import Question, Tokenizer, write_jsonl
from generate import KVCache, answers_to, generate, prompts_of, sample_token
from model import load_model, token_logprobs
from runtime import checkpoint
from runtime.checkpoint import Checkpoint
from runtime.files import read_jsonl
from tasks.published import few_shot_prompt

V = 61  # vocabulary of the tiny model
PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [60, 0, 33, 0, 21], [11, 12], [0, 0, 0, 4]]  # 0 is a real token
STOPS = {3, 17, 40, 55, 1, 2, 8, 9}


@pytest.fixture(autouse=True)
def the_cache_grows_often(monkeypatch):
    monkeypatch.setattr(generation, "GROWS_BY", 4)


@torch.no_grad()
def greedy_by_full_forward(model, prompt: list[int], n: int) -> list[int]:
    """No cache, no batch: read everything again for every token."""
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(model(torch.tensor([tokens]))[0, -1].argmax().item())
    return tokens[len(prompt) :]


def assert_same(responses, expected, abs=1e-5):
    """The same text and end; log-probs within the rounding of another batch."""
    assert [(r.tokens, r.finish, r.text) for r in responses] == [(r.tokens, r.finish, r.text) for r in expected]
    for response, other in zip(responses, expected, strict=True):
        assert response.logprobs == pytest.approx(other.logprobs, abs=abs)


# ---- the cache -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CASES)
@torch.no_grad()
def test_a_cache_is_the_full_forward_pass(kind, make_model):
    """Rows of different lengths, with garbage beyond their ends, filled in two parts: several tokens at once and token
    by token; then rows leave, change places, come twice and go different ways."""
    model, rng = make_model(**CASES[kind]), torch.Generator().manual_seed(0)
    texts = torch.randint(V, (4, 24), generator=rng)
    cache = KVCache(model.config, 4, 9, torch.float32, torch.device("cpu"))
    for part in (slice(0, 2), slice(2, 4)):
        logits = model(texts[part, :9], cache.part(part))
        torch.testing.assert_close(logits, model(texts[part])[:, :9], rtol=0, atol=2e-5)
    cache.lengths, cache.used = torch.tensor([9, 4, 1, 6]), 9
    for stored, (row, length) in itertools.product((*cache.keys, *cache.values), enumerate(cache.lengths)):
        stored[row, :, length:] = 1e3

    def go_on(T):
        places = cache.lengths[:, None] + torch.arange(T)  # (B, T)
        expected = model(texts).take_along_dim(places[..., None], 1)  # (B, T, V)
        torch.testing.assert_close(model(texts.gather(1, places), cache), expected, rtol=0, atol=5e-5)

    for T in (3, 1, 1, 2):
        go_on(T)
    rows = torch.tensor([2, 0, 2])
    cache.select(rows)
    texts = texts[rows]
    texts[2, 8:] = torch.randint(V, (16,), generator=rng)
    for T in (1, 2, 1, 1):
        go_on(T)
    assert cache.lengths.tolist() == [13, 21, 13]


def test_prompts_are_read_once_and_in_parts(llama, monkeypatch):
    """Equal ones once, and few at a time, however small: then every row goes its own way from its own prompt."""
    read, forward = [], llama.model.forward
    monkeypatch.setattr(llama.model, "forward", lambda tokens, *args, **kwargs: (
        read.append(tokens.numel()), forward(tokens, *args, **kwargs))[1])
    prompts = [PROMPTS[i] for i in (2, 0, 2, 4, 0, 2, 2, 4, 3, 1)]
    expected = [generate(llama, [prompt], 6, seed=[seed])[0] for seed, prompt in enumerate(prompts)]
    assert len({tuple(r.tokens) for r in expected}) == 10
    for at_once in (99, 20, 2):
        read.clear()
        monkeypatch.setitem(generation.READ_AT_ONCE, "cpu", at_once)
        assert_same(generate(llama, prompts, 6, seed=range(10)), expected)
        assert sum(read) <= 5 * 9 + 5 * 10 and max(read) <= max(at_once, 10)  # 5 prompts, 5 steps of 10 rows


# ---- what is said --------------------------------------------------------------------------------------------------


def test_greedy_is_the_argmax_of_the_full_forward_pass(llama):
    """Every row, token for token, in the order of the prompts; no stop id, so all run to the limit."""
    responses = generate(llama, PROMPTS, 12, temperature=0)
    assert [r.tokens for r in responses] == [greedy_by_full_forward(llama, prompt, 12) for prompt in PROMPTS]
    assert {r.finish for r in responses} == {"length"}
    assert len({tuple(r.tokens) for r in responses}) == len(PROMPTS)  # else a mixed-up order would not show


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_text_does_not_depend_on_the_batch(temperature, llama):
    """A row is what it is alone, whoever shares its batch and whenever the others end; every row is reported."""
    prompts = PROMPTS * 4
    alone = [generate(llama, [prompt], 16, temperature, STOPS, seed=[seed])[0] for seed, prompt in enumerate(prompts)]
    assert len({len(r.tokens) for r in alone}) > 3
    for batch_size in (5, 24):
        order, done = [3, 0, 5, 2, 1, 4, *range(23, 5, -1)], []
        said = generate(llama, [prompts[i] for i in order], 16, temperature, STOPS, seed=order, batch_size=batch_size,
                        progress=done.append)
        assert_same(said, [alone[i] for i in order])
        assert sum(done) == len(prompts)


def test_rows_that_ended_cost_nothing(llama, monkeypatch):
    """A batch shrinks as its rows end: few passes are over a row that has ended."""
    spent, forward = [], llama.model.forward
    monkeypatch.setattr(llama.model, "forward", lambda tokens, *args, **kwargs: (
        spent.append(len(tokens) * (tokens.shape[1] == 1)), forward(tokens, *args, **kwargs))[1])
    responses = generate(llama, [[1, 2], [5, 4], [60, 7]] * 32, 24, stop_ids=STOPS, seed=1, batch_size=32)
    needed = sum(len(r.tokens) - 1 for r in responses)
    assert needed <= sum(spent) < 1.35 * needed


@pytest.mark.slow
def test_compiled_steps_say_the_same(llama):
    """torch.compile, with rows that leave."""
    sampling = (llama, PROMPTS * 4, 12, 1.0, {3, 17, 40}, 2, 9)
    assert_same(generate(*sampling, compile=True), generate(*sampling), abs=1e-4)


# ---- how it ends ---------------------------------------------------------------------------------------------------


def test_a_stop_id_ends_the_text_and_is_kept(llama):
    """The text is cut after the first stop id of several, and is otherwise the text without stop ids."""
    text = greedy_by_full_forward(llama, PROMPTS[2], 10)
    cut = next(i for i in range(2, 10) if text[i] not in text[:i])  # a token that comes up late for the first time
    absent = next(token for token in range(V) if token not in text)
    [stopped] = generate(llama, [PROMPTS[2]], 10, temperature=0, stop_ids={absent, text[cut]})
    assert (stopped.tokens, stopped.finish, len(stopped.logprobs)) == (text[: cut + 1], "stop", cut + 1)
    [last] = generate(llama, [PROMPTS[2]], cut + 1, temperature=0, stop_ids=[text[cut]])
    assert (last.tokens, last.finish) == (text[: cut + 1], "stop")  # on the last token allowed it still is a stop
    [short] = generate(llama, [PROMPTS[2]], cut, temperature=0, stop_ids=[text[cut]])
    assert (short.tokens, short.finish) == (text[:cut], "length")


# ---- chances -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.7, 1.0, 0])
def test_logprobs_are_those_of_the_full_forward_pass(temperature, llama):
    """What comes with a token is token_logprobs of the finished text at the sampling temperature (greedy: at 1)."""
    responses = generate(llama, PROMPTS * 3, 14, temperature, {3, 17}, seed=3, batch_size=7)
    for prompt, r in zip(PROMPTS * 3, responses, strict=True):
        text = torch.tensor([prompt + r.tokens])
        with torch.no_grad():
            expected = token_logprobs(llama(text), text, temperature or 1.0)[0, len(prompt) - 1 :]
        assert r.logprobs == pytest.approx(expected.tolist(), abs=2e-5)


def uniform(n: int) -> torch.Tensor:
    """n chances in [0, 1), float64, the same in every run."""
    return torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampling_follows_the_softmax(temperature):
    """20,000 draws: chi-square over 8 tokens below 29.9, which chance passes once in 10,000 (7 degrees of freedom)."""
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5, -2.0, 1.5, -0.5])
    p = torch.softmax(logits.double() / temperature, -1)
    token, logprob = sample_token(logits.expand(20_000, 8), temperature, uniform(20_000))
    assert ((torch.bincount(token, minlength=8) - 20_000 * p) ** 2 / (20_000 * p)).sum() < 29.9
    torch.testing.assert_close(logprob.double(), p.log()[token], rtol=1e-5, atol=1e-6)


def test_temperature_0_takes_the_largest_logit():
    """The token is the argmax, its log-prob that of softmax(logits); a token of probability 0 is never drawn."""
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, -1.0, 4.9]])
    token, logprob = sample_token(logits, 0, uniform(2))
    assert token.tolist() == [1, 0]
    torch.testing.assert_close(logprob, torch.log_softmax(logits, -1)[[0, 1], [1, 0]])
    never = torch.tensor([[float("-inf"), 0.0]])
    assert sample_token(never, 1.0, torch.zeros(1, dtype=torch.float64))[0].tolist() == [1]  # not even by chance 0
    impossible = torch.tensor([0.0, float("-inf"), 0.0]).expand(1000, 3)
    assert set(sample_token(impossible, 1.0, uniform(1000))[0].tolist()) == {0, 2}


def test_a_token_is_drawn_where_its_share_of_the_chance_lies():
    """The first token whose cumulative probability is above the chance, in float64, among 50,000 rare ones too."""
    logits = torch.randn(1, 50_000, generator=torch.Generator().manual_seed(1)) * 3
    chance = torch.cat([uniform(500), torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)])
    edges = torch.softmax(logits[0], -1).double().cumsum(0)
    expected = (edges[None] <= (chance * edges[-1])[:, None]).sum(1)
    token, _ = sample_token(logits.expand(502, -1), 1.0, chance)
    assert torch.equal(token, expected) and len(token.unique()) > 200


@torch.no_grad()
def test_generated_tokens_follow_the_model_with_chances_of_their_own(llama):
    """2,000 answers of 4 tokens: the place of each in its cumulative softmax is uniform (Kolmogorov-Smirnov), and says
    nothing of the next token's or the next row's place (correlation within 5 standard deviations)."""
    n, prompt, temperature = 2000, PROMPTS[0], 0.6
    tokens = torch.tensor([r.tokens for r in generate(llama, [prompt] * n, 4, temperature, seed=5)])  # (n, 4)
    logits = llama(torch.cat([torch.tensor([prompt]).expand(n, -1), tokens], 1))[:, len(prompt) - 1 : -1]
    p = torch.softmax(logits.double() / temperature, -1)  # (n, 4, V)
    end = p.cumsum(-1).gather(-1, tokens[..., None])[..., 0]
    place = end - p.gather(-1, tokens[..., None])[..., 0] * uniform(4 * n).view(n, 4)  # (n, 4)
    gap = place.flatten().sort().values - (torch.arange(4 * n) + 0.5) / (4 * n)
    assert gap.abs().max() < 2.2 / (4 * n) ** 0.5  # chance passes it once in 8,000
    for one, other in ((place[:, :-1], place[:, 1:]), (place[:-1], place[1:])):
        both = torch.stack([one.flatten(), other.flatten()])
        assert abs(torch.corrcoef(both)[0, 1]) < 5 / both.shape[1] ** 0.5


def test_a_seed_repeats_the_text_and_another_does_not(llama):
    first = generate(llama, PROMPTS, 10, seed=1)
    torch.rand(3)  # the state of torch's own generator plays no part
    assert generate(llama, PROMPTS, 10, seed=1) == first
    assert all(a.tokens != b.tokens for a, b in zip(generate(llama, PROMPTS, 10, seed=2), first))
    twins = generate(llama, [PROMPTS[0]] * 4, 10, seed=1, batch_size=2)
    assert len({tuple(r.tokens) for r in twins}) == 4  # rows and batches of one call draw independently


# ---- limits --------------------------------------------------------------------------------------------------------


def test_nan_is_never_taken_for_text(make_model):
    """One weight of a diverged run: FloatingPointError, sampled and greedy, and no index out of range."""
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    for temperature in (0, 1.0):
        with pytest.raises(FloatingPointError, match="NaN"):
            generate(model, PROMPTS, 4, temperature)


def test_empty_and_too_long_prompts_are_refused(llama):
    """A prompt must have a token and leave room for the new ones; the longest that does is accepted."""
    context = llama.config.max_position_embeddings
    with pytest.raises(ValueError, match="prompt 1 has 0 tokens"):
        generate(llama, [[1], []], 4)
    with pytest.raises(ValueError, match=f"prompt 0 has {context - 3} tokens"):
        generate(llama, [[1] * (context - 3)], 4)
    [response] = generate(llama, [[1] * (context - 4)], 4, temperature=0)
    assert response.tokens == greedy_by_full_forward(llama, [1] * (context - 4), 4)
    assert generate(llama, [], 4) == []


def test_generating_leaves_no_gradient_behind(make_model, monkeypatch):
    """No graph is built, and the weights can be trained afterwards."""
    model, graphs = make_model(rope_theta=777.0), []  # a table of angles that no other test has made already
    monkeypatch.setattr(generation, "sample_token", lambda logits, *rest, **named: (
        graphs.append(logits.requires_grad), sample_token(logits, *rest, **named))[1])
    generate(model, PROMPTS, 5)
    assert graphs == [False] * 5
    model(torch.tensor([PROMPTS[2]])).sum().backward()  # the longest: it meets the angles that generate has made
    assert all(weight.grad is not None for weight in model.parameters())


# ---- questions in, answers out -------------------------------------------------------------------------------------


class Letters:
    """A tokenizer of 61 tokens that say 'a', but for those given: {token: text}. Keeps what it was asked to encode."""

    stop_ids = frozenset()

    def __init__(self, words=()):
        self.words, self.texts, self.chats = dict(words), [], []

    def text(self, text):
        self.texts.append(text)
        return PROMPTS[2]

    def chat(self, text):
        self.chats.append(text)
        return PROMPTS[2]

    def decode(self, ids):
        return "".join(self.words.get(i, "a") for i in ids)


def test_a_stop_text_ends_an_answer_and_is_left_out(llama):
    """It may lie across tokens and begin within one: it is cut off the text, the tokens stay whole."""
    free = greedy_by_full_forward(llama, PROMPTS[2], 14)
    at = next(i for i in range(4, 13) if free[i] not in free[:i] and free[i + 1] not in free[: i + 1])
    tokenizer = Letters({free[at]: "b\nQ", free[at + 1]: ": c"})
    [response] = answers_to(llama, tokenizer, [PROMPTS[2]], 14, 4, stop_text="Q:")
    assert (response.text, response.finish, response.tokens) == ("a" * at + "b\n", "stop", free[: at + 2])
    [response] = answers_to(llama, tokenizer, [PROMPTS[2]], 14, 4)  # a chat may say 'Q:'
    assert (response.text, response.finish, response.tokens) == (tokenizer.decode(free), "length", free)


def test_a_question_is_asked_as_a_chat_or_after_examples_and_must_leave_room(llama):
    """One that does not fit is named, with its length and what to change; one token less and it is asked."""
    tokenizer, config = Letters(), llama.config
    room = config.max_position_embeddings - len(PROMPTS[2])
    questions = [Question("fine", "How many?", "7", instruction="Be brief."), Question("other", "??")]
    assert prompts_of(config, tokenizer, questions, room) == [PROMPTS[2]] * 2
    assert (tokenizer.chats, tokenizer.texts) == ([q.prompt for q in questions], [])
    prompts_of(config, tokenizer, questions[:1], room, shots=2)
    assert tokenizer.texts == [few_shot_prompt(questions[0], 2)]
    for shots in (0, 1):
        with pytest.raises(ValueError, match=f"'fine': a prompt of 9 tokens .*--max_new_tokens {room + 1}") as error:
            prompts_of(config, tokenizer, questions, room + 1, shots)
        assert ("--shots" in str(error.value)) == bool(shots)


# ---- the script ----------------------------------------------------------------------------------------------------


@pytest.fixture
def answers_in_tokens(monkeypatch):
    """samples.jsonl holds all token ids."""
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: " ".join(map(str, ids)))


QUESTIONS = [text[6:40].strip() for text in TEXTS]


def run_script(tmp_path, folder, questions=QUESTIONS, max_new_tokens=24, **flags):
    """The rows of samples.jsonl, and done.json."""
    write_jsonl(tmp_path / "q.jsonl", [{"question": question} for question in questions])
    out = tmp_path / "out"
    generation.main(generation.Config(str(folder), str(tmp_path / "q.jsonl"), str(out), max_new_tokens=max_new_tokens,
                                      **flags))
    return list(read_jsonl(out / "samples.jsonl")), json.loads((out / "done.json").read_text())


@torch.no_grad()
def test_all_draws_are_independent(model_folder, tmp_path, answers_in_tokens, monkeypatch):
    """The first tokens of other seeds, sources, temperatures, samples and questions agree as often as chance has it:
    sum of p_i p_j over questions, within 5 standard deviations. The same seed draws the same."""
    monkeypatch.setattr(generation, "PART", 64)  # 32 questions
    n, model, tokenizer = 120, load_model(model_folder), Tokenizer(model_folder)
    questions = [f"{i} pens?" for i in range(n)]
    p = torch.stack([torch.softmax(model(torch.tensor([tokenizer.chat(q)]))[0, -1], -1) for q in questions])  # (n, V)
    drawn = []
    for seed, source in ((0, "teacher"), (1, "teacher"), (0, "student"), (0, "teacher")):
        rows, _ = run_script(tmp_path, model_folder, questions, 1, seed=seed, source=source, samples=2,
                             temperatures="1.0,1.0")
        drawn.append(torch.tensor([int(row["response"]) for row in rows]).view(2, n, 2))  # (temperatures, n, samples)
    assert torch.equal(drawn[0], drawn[3])
    streams = [draws[index, :, sample] for draws in drawn[:3] for index in (0, 1) for sample in (0, 1)]
    pairs = [(one, other, 0) for one, other in itertools.combinations(streams, 2)]
    pairs += [(stream, stream, shift) for stream in streams for shift in (1, 2, 32)]
    for one, other, shift in pairs:
        agree = (p[: n - shift] * p[shift:]).sum(1)  # (n - shift,)
        count = (one[: n - shift] == other[shift:]).sum()
        assert agree.sum() < n / 5
        assert abs(count - agree.sum()) < 5 * (agree * (1 - agree)).sum().sqrt()


def test_samples_do_not_depend_on_batches_and_parts(model_folder, tmp_path, monkeypatch):
    """Any --batch_size, the whole stage: what is sampled is the same, in the same order."""
    questions, found = [f"{'a pen ' * (i % 5)}{i}?" for i in range(12)], []
    for part, batch_size in ((30, 8), (30, 512), (512, 16)):
        monkeypatch.setattr(generation, "PART", part)
        rows, _ = run_script(tmp_path / f"{part} {batch_size}", model_folder, questions, 12, samples=3,
                             temperatures="0.7,1.0", batch_size=batch_size)
        found.append(rows)
    assert len(found[0]) == 72 and len({row["response"] for row in found[0]}) > 65
    for rows, expected in itertools.product(found[1:], found[:1]):
        for row, other in zip(rows, expected, strict=True):
            assert row == other | {"logprob": pytest.approx(other["logprob"], abs=2e-4)}


def test_a_state_is_as_small_after_many_answers_as_after_few(model_folder, tmp_path, monkeypatch):
    """What was said is in samples.jsonl, part by part, and nowhere else."""
    found, save = [], Checkpoint.save

    def look(self):
        save(self)
        *_, state = sorted(path.stat().st_size for path in self.folder.iterdir())
        found.append((len((self.stage.out / "samples.jsonl").read_text().splitlines()), state))

    monkeypatch.setattr(Checkpoint, "save", look)
    monkeypatch.setattr(checkpoint, "PAUSE", 0)
    monkeypatch.setattr(generation, "PART", 20)
    run_script(tmp_path, model_folder, [f"{i}?" for i in range(40)], 12, samples=4)
    counts, sizes = zip(*found)
    assert counts == tuple(range(20, 161, 20)) and max(sizes) - min(sizes) < 20


def test_every_sample_is_of_its_question_and_temperature(model_folder, tmp_path, answers_in_tokens):
    """The log-prob on each row is the sum that the model gives its tokens after that row's question."""
    rows, done = run_script(tmp_path, model_folder, samples=3, temperatures="1.0,0.5")
    model, tokenizer = load_model(model_folder), Tokenizer(model_folder)
    assert [(row["id"], row["temperature"]) for row in rows] == [
        (f"q-{q}", t) for t in (1.0, 0.5) for q in (1, 2) for _ in range(3)]
    for row in rows:
        prompt = tokenizer.chat(QUESTIONS[int(row["id"][-1]) - 1])
        tokens = torch.tensor([prompt + [int(word) for word in row["response"].split()]])
        with torch.no_grad():
            logprobs = token_logprobs(model(tokens), tokens, row["temperature"])[0, len(prompt) - 1 :]
        assert logprobs.sum().item() == pytest.approx(row["logprob"], abs=1e-2)
        assert row["tokens"] == len(logprobs) == (24 if row["finish"] == "length" else len(logprobs))
    assert done["tokens"] == sum(row["tokens"] for row in rows)


def test_one_question_is_answered_greedily_in_the_room_that_there_is(model_folder):
    model, tokenizer = load_model(model_folder), Tokenizer(model_folder)
    prompt, room = tokenizer.chat("3+4?"), model.config.max_position_embeddings - len(tokenizer.chat("3+4?"))
    for most, new in ((6, 6), (10**6, room)):
        [expected] = generate(model, [prompt], new, 0, tokenizer.stop_ids)
        said = generation.answer(model, tokenizer, Question("mine", "3+4?"), most)
        assert said.tokens == expected.tokens and said.text == tokenizer.decode(expected.tokens)


@pytest.mark.parametrize("flags", [
    {"temperatures": "1.0,hot"}, {"temperatures": "-1"}, {"source": "me"}])
def test_flags_that_make_no_sense_are_named(flags, model_folder, tmp_path):
    with pytest.raises(ValueError, match=f"--{next(iter(flags))}"):
        generation.main(generation.Config(**{"model": str(model_folder), "questions": "arith:test",
                                             "out": str(tmp_path / "out")} | flags))
    assert not (tmp_path / "out").exists()
