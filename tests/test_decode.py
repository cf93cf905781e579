"""decode.py: the text is what the model's own full forward pass says, whoever else is in the batch."""

import numpy as np
import pytest
import torch
from test_model import CASES, random_tokens

import decode
from decode import Decoder, generate, sample_token
from model import KVCache, Trunk, token_logprobs

V = 61  # vocabulary of the tiny model
PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [60, 0, 33, 0, 21], [11, 12], [0, 0, 0, 4]]  # 0 is a real token


@torch.no_grad()
def greedy_by_full_forward(model, prompt: list[int], n: int) -> list[int]:
    """No cache, no batch: read everything again for every token."""
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(model(torch.tensor([tokens]))[0, -1].argmax().item())
    return tokens[len(prompt) :]


# ---- what is said --------------------------------------------------------------------------------------------------


def test_greedy_is_the_argmax_of_the_full_forward_pass(llama):
    """Every row, token for token, in the order of the prompts; no stop id, so all run to the limit."""
    responses = generate(llama, PROMPTS, 12, temperature=0)
    assert [r.tokens for r in responses] == [greedy_by_full_forward(llama, prompt, 12) for prompt in PROMPTS]
    assert {r.finish for r in responses} == {"length"}
    assert len({tuple(r.tokens) for r in responses}) == len(PROMPTS)  # else a mixed-up order would not show


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_greedy_text_does_not_depend_on_the_batch(batch_size, llama):
    """Other batch sizes and another order of prompts: the same text, log-probs within rounding, every row reported."""
    expected = generate(llama, PROMPTS, 10, temperature=0)
    done = []
    order = [3, 0, 5, 2, 1, 4]
    again = generate(llama, [PROMPTS[i] for i in order], 10, temperature=0, batch_size=batch_size, progress=done.append)
    for i, response in zip(order, again, strict=True):
        assert response.tokens == expected[i].tokens
        assert response.logprobs == pytest.approx(expected[i].logprobs, abs=1e-5)
    assert sum(done) == len(PROMPTS)


def test_rows_that_end_early_leave_the_others_unchanged(llama):
    """With stop ids the rows leave at different steps; each row is still what it is alone."""
    free = [greedy_by_full_forward(llama, prompt, 16) for prompt in PROMPTS]
    stops = {free[0][1], free[2][4], free[4][8]}
    together = generate(llama, PROMPTS, 16, temperature=0, stop_ids=stops)
    lengths = {len(r.tokens) for r in together}
    assert len(lengths) >= 3, lengths  # the rows do end at different times
    for prompt, response in zip(PROMPTS, together, strict=True):
        [alone] = generate(llama, [prompt], 16, temperature=0, stop_ids=stops)
        assert (response.tokens, response.finish) == (alone.tokens, alone.finish)
        assert response.logprobs == pytest.approx(alone.logprobs, abs=1e-5)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_step_is_the_forward_pass_of_one_token(name, make_model):
    """Of rows of different lengths, with garbage beyond their ends; then rows leave, and the others go on."""
    model = make_model(**CASES[name])
    for block in model.model.layers:  # norms of a real model are not all ones
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            norm.weight.uniform_(0.5, 2)
    model.model.norm.weight.uniform_(0.5, 2)
    texts, lengths, rows = random_tokens(model.config, 4, 20), [9, 4, 1, 6], torch.arange(4)
    full = model.model(texts)  # (4, 20, D)
    cache = KVCache(model.config, 4, 20, torch.float32, torch.device("cpu"))
    prompts = [text[:length] for text, length in zip(texts.tolist(), lengths)]
    ends = decode.prefill(model, cache, rows, prompts)  # (4, D)
    torch.testing.assert_close(ends, full[rows, torch.tensor(lengths) - 1], rtol=1e-5, atol=2e-5)
    for row, length in enumerate(lengths):
        cache.keys[:, row, :, length:], cache.values[:, row, :, length:] = 1e3, 1e3
    decoder = Decoder(model, cache)
    for step in range(8):
        if step == 3:
            rows = rows[[2, 0]]
            cache.keep(torch.tensor([2, 0]))
            decoder = Decoder(model, cache)
        at = cache.lengths
        hidden = decoder.step(texts[rows, at])  # (B, D)
        torch.testing.assert_close(hidden, full[rows, at], rtol=1e-5, atol=2e-5)
    assert cache.lengths.tolist() == [9, 17]


def test_a_norm_of_small_states_has_its_eps(make_model):
    """The step's norm is that of the modules, where eps decides and where it does not, in bf16 too."""
    for dtype, rtol in ((torch.float32, 1e-6), (torch.bfloat16, 2**-7)):
        model = make_model().to(dtype)
        decoder = Decoder(model, KVCache(model.config, 1, 4, dtype, torch.device("cpu")))
        x = torch.randn(3, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
        x = (x * torch.tensor([[1e-4], [3e-3], [10.0]])).to(dtype)
        norm = model.model.norm.requires_grad_(False)
        norm.weight.uniform_(0.5, 2)
        torch.testing.assert_close(decoder.norm(x, decoder.scale(norm)), norm(x), rtol=rtol, atol=0)


@pytest.fixture
def reads(llama, monkeypatch):
    """The (rows, positions) of every pass through the model, in order."""
    shapes, forward, step = [], llama.model.forward, Decoder.step
    monkeypatch.setattr(llama.model, "forward", lambda tokens, *args, **kwargs: (
        shapes.append(tuple(tokens.shape)), forward(tokens, *args, **kwargs))[1])
    monkeypatch.setattr(Decoder, "step", lambda self, tokens: (shapes.append((len(tokens), 1)), step(self, tokens))[1])
    return shapes


def test_equal_prompts_are_read_once(llama, reads):
    """Eight rows, three prompts: one pass over three rows, then every row goes its own way from its own prompt."""
    order = [2, 0, 2, 4, 0, 2, 2, 4]
    responses = generate(llama, [PROMPTS[i] for i in order], 6, seed=3)
    assert reads == [(3, 9)] + [(8, 1)] * 5
    assert len({tuple(r.tokens) for r in responses}) == 8
    for i, r in zip(order, responses, strict=True):
        text = torch.tensor([PROMPTS[i] + r.tokens])
        with torch.no_grad():
            expected = token_logprobs(llama.lm_head(Trunk.forward(llama.model, text)), text)[0, len(PROMPTS[i]) - 1 :]
        assert r.logprobs == pytest.approx(expected.tolist(), abs=2e-5)


def test_long_groups_are_read_in_parts(llama, reads, monkeypatch):
    """Of 20 tokens at most, longest prompts first, a longer one alone: the same text as if read at once."""
    expected = generate(llama, PROMPTS, 8, seed=3)
    reads.clear()
    monkeypatch.setitem(decode.READ_AT_ONCE, "cpu", 20)
    again = generate(llama, PROMPTS, 8, seed=3)
    assert [shape for shape in reads if shape[1] > 1] == [(2, 9), (2, 4), (2, 2)]
    assert [r.tokens for r in again] == [r.tokens for r in expected]
    assert [r.logprobs for r in again] == [pytest.approx(r.logprobs, abs=1e-5) for r in expected]
    monkeypatch.setitem(decode.READ_AT_ONCE, "cpu", 2)
    assert [r.tokens for r in generate(llama, PROMPTS, 8, seed=3)] == [r.tokens for r in expected]


def test_rows_that_ended_cost_nothing(llama, reads):
    """A batch shrinks as its rows end; while prompts wait, they are refilled. Few passes are over a row that ended."""
    stops = {3, 17, 40, 55, 1, 2, 8, 9}
    responses = generate(llama, PROMPTS * 16, 24, stop_ids=stops, seed=1, batch_size=32)
    needed = sum(len(r.tokens) - 1 for r in responses)
    spent = sum(rows for rows, positions in reads if positions == 1)
    assert len({len(r.tokens) for r in responses}) > 8
    assert needed <= spent < 1.35 * needed
    steps = [rows for rows, positions in reads if positions == 1]
    assert max(steps) == 32 and steps[-1] < 8 and len(reads) - len(steps) > 3


@pytest.mark.parametrize("every", [2, 5, 100])
def test_looking_less_often_changes_nothing(every, llama, monkeypatch):
    """As on a GPU, rows stand still from their end to the next look: the answers are the same, bit for bit but for
    the sums of another batch shape."""
    stops = {3, 17, 40, 55, 1, 2, 8, 9}  # so many that two come between two looks
    expected = generate(llama, PROMPTS * 4, 12, 1.0, stops, seed=2, batch_size=9)
    monkeypatch.setitem(decode.LOOK_EVERY, "cpu", every)
    again = generate(llama, PROMPTS * 4, 12, 1.0, stops, seed=2, batch_size=9)
    assert [(r.tokens, r.finish) for r in again] == [(r.tokens, r.finish) for r in expected]
    assert [r.logprobs for r in again] == [pytest.approx(r.logprobs, abs=1e-5) for r in expected]


def test_rows_that_are_free_stay_in_their_room(llama):
    """One of 16 rows ends after 10 tokens, a step after 13 rows got a new prompt, and is free for 11 steps: neither its
    tokens nor its cache run into the row beside."""
    prompts = [[i] for i in range(29)]  # the last enter first
    whole = generate(llama, prompts, 12, seed=4)
    count = {28 - row: 9 for row in range(16)} | {28 - 5: 10, 28 - 14: 12, 28 - 15: 12}  # of the others: 12
    ends = {tuple(whole[i].tokens[: count[i]]) for i in count}
    responses = generate(llama, prompts, 12, seed=4, batch_size=16, ended=lambda tokens: tuple(tokens) in ends)
    for i, (response, expected) in enumerate(zip(responses, whole, strict=True)):
        n = count.get(i, 12)
        assert response.tokens == expected.tokens[:n]
        assert response.logprobs == pytest.approx(expected.logprobs[:n], abs=1e-5)


@pytest.mark.slow
def test_compiled_steps_say_the_same(llama):
    """torch.compile, with rows that leave and rows that enter: the same text."""
    expected = generate(llama, PROMPTS * 4, 12, 1.0, {3, 17, 40}, seed=2, batch_size=9)
    again = generate(llama, PROMPTS * 4, 12, 1.0, {3, 17, 40}, seed=2, batch_size=9, compile=True)
    assert [(r.tokens, r.finish) for r in again] == [(r.tokens, r.finish) for r in expected]
    assert [r.logprobs for r in again] == [pytest.approx(r.logprobs, abs=1e-4) for r in expected]


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


def test_sampled_rows_end_at_the_first_stop_id_or_at_the_limit(llama):
    """'stop': ends with a stop id and holds none before; 'length': max_new_tokens tokens and no stop id."""
    stops = {3, 17, 40, 55}
    responses = generate(llama, [[9, 8]] * 64, 12, stop_ids=stops, seed=1)
    assert {r.finish for r in responses} == {"stop", "length"}
    assert {r.tokens[-1] for r in responses if r.finish == "stop"} == stops  # every one of them works
    for r in responses:
        assert not stops & set(r.tokens[:-1]) and len(r.tokens) == len(r.logprobs)
        assert r.tokens[-1] in stops if r.finish == "stop" else len(r.tokens) == 12 and r.tokens[-1] not in stops


def test_a_callable_may_end_a_row_and_leaves_the_others_unchanged(llama):
    """It sees every row grow token by token, is not asked again of a row that ended, and that row finishes 'stop'."""
    free = generate(llama, PROMPTS, 12, temperature=0)
    cuts = {0: 1, 2: 12, 3: 7}  # row -> number of tokens after which it ends; 12 is the last one allowed
    ends = {tuple(free[row].tokens[:n]): n for row, n in cuts.items()}
    asked = []

    def ended(tokens: list[int]) -> bool:
        asked.append(tuple(tokens))
        return tuple(tokens) in ends

    responses = generate(llama, PROMPTS, 12, temperature=0, ended=ended)
    for row, (response, whole) in enumerate(zip(responses, free, strict=True)):
        n = cuts.get(row, 12)
        assert (response.tokens, len(response.logprobs)) == (whole.tokens[:n], n)
        assert response.finish == ("stop" if row in cuts else "length")
    assert sorted(asked) == sorted(tuple(r.tokens[:n]) for r in responses for n in range(1, len(r.tokens) + 1))
    stops = {free[1].tokens[2]}
    asked.clear()
    both = generate(llama, PROMPTS, 12, temperature=0, stop_ids=stops, ended=ended)
    assert not any(stops & set(tokens[-1:]) for tokens in asked)  # a stop id ends a row before the callable is asked
    assert both[0].tokens == free[0].tokens[:1]


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_callable_that_ends_nothing_changes_nothing(temperature, llama):
    """Bit for bit, log-probs too."""
    plain = generate(llama, PROMPTS * 4, 12, temperature, {3, 17}, seed=2, batch_size=9)
    assert plain == generate(llama, PROMPTS * 4, 12, temperature, {3, 17}, 2, 9, ended=lambda tokens: False)


# ---- chances -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.7, 1.0, 0])
def test_logprobs_are_those_of_the_full_forward_pass(temperature, llama):
    """What comes with a token is token_logprobs of the finished text at the sampling temperature (greedy: at 1)."""
    stops = {3, 17}
    responses = generate(llama, PROMPTS * 3, 14, temperature, stops, seed=3, batch_size=7)
    assert temperature == 0 or len({len(r.tokens) for r in responses}) > 3
    for prompt, r in zip(PROMPTS * 3, responses, strict=True):
        text = torch.tensor([prompt + r.tokens])
        with torch.no_grad():
            expected = token_logprobs(llama(text), text, temperature or 1.0)[0, len(prompt) - 1 :]
        assert r.logprobs == pytest.approx(expected.tolist(), abs=2e-5)


def chi_square(counts: torch.Tensor, p: torch.Tensor) -> float:
    expected = p * counts.sum()
    return ((counts - expected) ** 2 / expected).sum().item()


def uniform(n: int) -> torch.Tensor:
    """n chances in [0, 1), float64, the same in every run."""
    return torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampling_follows_the_softmax(temperature):
    """20,000 draws: chi-square over 8 tokens below 29.9, which chance passes once in 10,000 (7 degrees of freedom)."""
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5, -2.0, 1.5, -0.5])
    p = torch.softmax(logits.double() / temperature, -1)
    token, logprob = sample_token(logits.expand(20_000, 8), temperature, uniform(20_000))
    assert chi_square(torch.bincount(token, minlength=8), p) < 29.9
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


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_generated_tokens_follow_the_model(temperature, llama):
    """First tokens of 3,000 answers to one prompt fit softmax(logits / T) at the end of that prompt: chi-square over
    the tokens expected at least 5 times and the rest together, within 4 standard deviations of its mean."""
    n, prompt = 3000, PROMPTS[0]
    answers = generate(llama, [prompt] * n, 1, temperature, seed=5)
    with torch.no_grad():
        p = torch.softmax(llama(torch.tensor([prompt]))[0, -1].double() / temperature, -1)
    counts = torch.bincount(torch.tensor([r.tokens[0] for r in answers]), minlength=V)
    often = p * n >= 5
    counts, p = (torch.cat([x[often], x[~often].sum()[None]]) for x in (counts, p))
    freedom = len(p) - 1
    assert freedom > 8
    assert chi_square(counts, p) < freedom + 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("batch_size", [1, 5, 24])
def test_sampled_text_does_not_depend_on_the_batch(batch_size, llama):
    """A prompt has chances of its own: whoever shares its batch, it is answered the same."""
    expected = generate(llama, PROMPTS * 4, 10, 1.0, {3, 17}, seed=1)
    again = generate(llama, PROMPTS * 4, 10, 1.0, {3, 17}, seed=1, batch_size=batch_size)
    assert [r.tokens for r in again] == [r.tokens for r in expected]
    for i, r in enumerate(expected):  # token t is drawn by the t-th chance of its prompt
        with torch.no_grad():
            logits = llama(torch.tensor([(PROMPTS * 4)[i] + r.tokens]))[0, -len(r.tokens) - 1 : -1]  # (T, V)
        chances = torch.from_numpy(np.random.default_rng((1, i)).random(11))[: len(r.tokens)]
        assert sample_token(logits, 1.0, chances)[0].tolist() == r.tokens


def test_a_token_is_drawn_where_its_share_of_the_chance_lies():
    """The first token whose cumulative probability is above the chance, in float64, among 50,000 rare ones too."""
    logits = torch.randn(1, 50_000, generator=torch.Generator().manual_seed(1)) * 3
    chance = torch.cat([uniform(500), torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)])
    edges = torch.softmax(logits[0], -1).double().cumsum(0)
    expected = (edges[None] <= (chance * edges[-1])[:, None]).sum(1)
    token, _ = sample_token(logits.expand(502, -1), 1.0, chance)
    assert torch.equal(token, expected) and len(token.unique()) > 200


def test_nan_is_never_taken_for_text(make_model):
    """One weight of a diverged run: FloatingPointError, sampled and greedy, and no index out of range."""
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    for temperature in (0, 1.0):
        with pytest.raises(FloatingPointError, match="NaN"):
            generate(model, PROMPTS, 4, temperature)


def test_bf16_models_generate(make_model):
    """Greedy in bf16: each token's logit in the full forward pass is within bf16's rounding of the largest."""
    model = make_model().to(torch.bfloat16)
    for prompt, r in zip(PROMPTS, generate(model, PROMPTS, 8, temperature=0), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + r.tokens]))[0, len(prompt) - 1 : -1]  # (8, V)
        chosen = logits.gather(-1, torch.tensor(r.tokens)[:, None])[:, 0]
        assert (logits.amax(-1) - chosen < 0.1).all()
        assert r.logprobs == pytest.approx(logits.log_softmax(-1).amax(-1).tolist(), abs=0.1)


def test_a_seed_repeats_the_text_and_another_does_not(llama):
    first = generate(llama, PROMPTS, 10, seed=1)
    torch.rand(3)  # the state of torch's own generator plays no part
    assert generate(llama, PROMPTS, 10, seed=1) == first
    assert all(a.tokens != b.tokens for a, b in zip(generate(llama, PROMPTS, 10, seed=2), first))
    twins = generate(llama, [PROMPTS[0]] * 4, 10, seed=1, batch_size=2)
    assert len({tuple(r.tokens) for r in twins}) == 4  # rows and batches of one call draw independently


# ---- limits --------------------------------------------------------------------------------------------------------


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


def test_generating_leaves_no_gradient_behind(make_model):
    """No graph is built, the weights stay as they are and can be trained afterwards."""
    model = make_model(rope_theta=777.0)  # a table of angles that no other test has made already
    before = [weight.clone() for weight in model.parameters()]
    generate(model, PROMPTS, 5)
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, model.parameters()))
    model(torch.tensor([PROMPTS[2]])).sum().backward()  # the longest: it meets the angles that generate has made
    assert all(weight.grad is not None for weight in model.parameters())
