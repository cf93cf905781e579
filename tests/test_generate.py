"""generate.py: every question is asked as it should be, and every answer stands beside its question."""

import json

import pytest
import torch
from conftest import TEXTS
from test_decode import PROMPTS, greedy_by_full_forward

import generate as generation
from data import Question, Tokenizer, write_jsonl
from generate import answer_questions, generate
from model import token_logprobs
from tasks.published import STOP_TEXT, few_shot_prompt


class Letters:
    """A tokenizer of 61 tokens that say 'a', but for those given: {token: text}. Keeps what it was asked to encode."""

    stop_ids = frozenset()

    def __init__(self, **words: str):
        self.words, self.texts, self.chats = {int(key[1:]): text for key, text in words.items()}, [], []

    def text(self, text):
        self.texts.append(text)
        return PROMPTS[2]

    def chat(self, text):
        self.chats.append(text)
        return PROMPTS[2]

    def decode(self, ids):
        return "".join(self.words.get(i, "a") for i in ids)


def fresh(tokens: list[int], start: int) -> int:
    """The first place from start on whose token and the next have not come up before."""
    return next(i for i in range(start, len(tokens) - 1)
                if tokens[i] not in tokens[:i] and tokens[i + 1] not in tokens[: i + 1])


def test_with_shots_a_model_is_asked_to_complete_and_stops_at_its_own_question(llama):
    """The stop text may lie across tokens and begin within one: it is cut off the text, the tokens stay whole."""
    free = greedy_by_full_forward(llama, PROMPTS[2], 14)
    at = fresh(free, 4)
    tokenizer = Letters(**{f"t{free[at]}": "b\nQ", f"t{free[at + 1]}": ": c"})
    question = Question("x", "How many?", "7", instruction="Be brief.")
    [[response]] = answer_questions(llama, tokenizer, [question], 14, 0.0, 0, 4, shots=2)
    assert (response.text, response.finish) == ("a" * at + "b\n", "stop")
    assert response.tokens == free[: at + 2]
    assert tokenizer.texts == [few_shot_prompt(question, 2)] and tokenizer.chats == []
    [[response]] = answer_questions(llama, tokenizer, [question], 14, 0.0, 0, 4)  # a chat may say 'Q:'
    assert (response.tokens, response.finish) == (free, "length")
    assert response.text == tokenizer.decode(free) and tokenizer.chats == [question.prompt]


@pytest.mark.parametrize(("kind", "other"), [("number", "choice"), ("choice", "number")])
def test_the_stop_text_is_that_of_the_kind(kind, other, llama, monkeypatch):
    monkeypatch.setattr(generation, "few_shot_prompt", lambda question, shots: f"{question.id} {shots}")
    free = greedy_by_full_forward(llama, PROMPTS[2], 14)
    at = fresh(free, 2)
    for said, cut in ((kind, True), (other, False)):
        tokenizer = Letters(**{f"t{free[at]}": STOP_TEXT[said]})
        [[a, b]] = answer_questions(llama, tokenizer, [Question("x", "?", kind=kind)], 14, 0.0, 0, 4, "", 2, 3)
        assert a == b and len(a.tokens) == (at + 1 if cut else 14) and a.text.startswith("a" * at)
        assert (STOP_TEXT[said] not in a.text) == cut and tokenizer.texts == ["x 3"]


@pytest.mark.parametrize("text", ["é 3+4=7\nQ: How", "Ava has 3 pens.\n\nQ:", "##Q:Q:"])
def test_a_real_tokenizer_completes_the_stop_text_once(text, llama_folder):
    """says() is true first at the token that completes the text, whatever the tokens before."""
    tokenizer = Tokenizer(llama_folder)
    ids = tokenizer.encode(text)
    ended = generation.says(tokenizer, "Q:")
    first = next(n for n in range(1, len(ids) + 1) if ended(ids[:n]))
    assert "Q:" in tokenizer.decode(ids[:first]) and "Q:" not in tokenizer.decode(ids[: first - 1])


def test_a_question_that_does_not_fit_is_named(llama):
    """Its id, its length and what to change; one token less and it is answered."""
    context = llama.config.max_position_embeddings
    room = context - len(PROMPTS[2])
    questions = [Question("fine", "?"), Question("long one", "??")]
    said = rf"'fine': a prompt of 9 tokens .*{room + 1} exceed .*{context}: lower --max_new_tokens, or leave it out$"
    with pytest.raises(ValueError, match=said):
        answer_questions(llama, Letters(), questions, room + 1, 0.0, 0, 4)
    with pytest.raises(ValueError, match="lower --max_new_tokens or --shots, or"):
        answer_questions(llama, Letters(), questions, room + 1, 0.0, 0, 4, shots=1)
    assert len(answer_questions(llama, Letters(), questions, room, 0.0, 0, 4)) == 2


@pytest.fixture
def completing(monkeypatch):
    """Prompts as a completion, short enough for a tiny model."""
    monkeypatch.setattr(generation, "few_shot_prompt", lambda question, shots: f"{shots} {question.question}")
    monkeypatch.setattr(Tokenizer, "text", lambda self, text: [0, *self.encode(text)], raising=False)


def run_script(tmp_path, folder, **flags):
    cfg = generation.Config(str(folder), str(tmp_path / "q.jsonl"), str(tmp_path / "out"), max_new_tokens=24, **flags)
    write_jsonl(tmp_path / "q.jsonl", [{"question": TEXTS[0][6:40]}, {"question": TEXTS[1][6:40]}])
    generation.main(cfg)
    rows = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    return rows, json.loads((tmp_path / "out" / "done.json").read_text())


def test_the_script_asks_with_shots_and_says_so(completing, model_folder, tmp_path, monkeypatch):
    """done.json holds the shots and counts the tokens of the prompts as asked; the rows are cut at the stop text."""
    tokenizer = Tokenizer(model_folder)
    rows, done = run_script(tmp_path, model_folder, samples=30, shots=3, temperatures="3.0")
    assert done["config"]["shots"] == 3
    read = sum(len(tokenizer.text(f"3 {text[6:40]}".strip())) for text in TEXTS) * 30
    parameters = done["flops"] / 2 / (done["tokens"] + read)
    assert parameters == round(parameters) and len(rows) == 60
    assert not any("Q:" in row["response"] for row in rows)
    monkeypatch.setitem(generation.STOP_TEXT, "number", "e")  # a stop text that a random model does write
    rows, done = run_script(tmp_path, model_folder, samples=30, shots=3, temperatures="3.0", seed=1)
    cut = [row for row in rows if row["finish"] == "stop"]
    assert len(cut) > 5 and not any("e" in row["response"] for row in rows)
    assert sum(row["tokens"] for row in rows) == done["tokens"]


def test_every_sample_is_of_its_question_and_temperature(model_folder, tmp_path, monkeypatch):
    """The log-prob on each row is the sum that the model gives its tokens after that row's question; seeds differ."""
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: " ".join(map(str, ids)))
    rows, done = run_script(tmp_path, model_folder, samples=3, temperatures="1.0,1.0,0.5")
    model, tokenizer = generation.load_model(str(model_folder)), Tokenizer(model_folder)
    assert [(row["id"], row["temperature"]) for row in rows] == [
        (f"q-{q}", t) for t in (1.0, 1.0, 0.5) for q in (1, 2) for _ in range(3)]
    assert len({row["response"] for row in rows}) == 18
    for row in rows:
        prompt = tokenizer.chat(TEXTS[int(row["id"][-1]) - 1][6:40].strip())
        tokens = torch.tensor([prompt + [int(word) for word in row["response"].split()]])
        with torch.no_grad():
            logprobs = token_logprobs(model(tokens), tokens, row["temperature"])[0, len(prompt) - 1 :]
        assert logprobs.sum().item() == pytest.approx(row["logprob"], abs=1e-2)
        assert row["tokens"] == len(logprobs) == (24 if row["finish"] == "length" else len(logprobs))
    assert done["tokens"] == sum(row["tokens"] for row in rows)


def test_asking_one_question_prints_its_answer(completing, model_folder, capsys):
    for shots in (0, 2):
        generation.main(generation.Config(str(model_folder), ask="3+4?", shots=shots, max_new_tokens=6))
        tokenizer = Tokenizer(model_folder)
        prompt = tokenizer.text("2 3+4?") if shots else tokenizer.chat("3+4?")
        [response] = generate(generation.load_model(str(model_folder)), [prompt], 6, 0, tokenizer.stop_ids)
        assert capsys.readouterr().out == tokenizer.decode(response.tokens) + "\n"


def test_a_negative_number_of_shots_is_refused():
    with pytest.raises(ValueError, match="--shots -1"):
        generation.main(generation.Config("m", "q", "o", shots=-1))


