"""Recorded responses: what generate.py wrote, what an API's batch returned, what others published."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from answers import extract_answer
from runtime.files import numbered_jsonl
from runtime.flags import require
from tasks.question import Question

UNFINISHED = ("length", "max_tokens", "content_filter")  # finish reasons of a response that did not end by itself


@dataclass(frozen=True)
class Sample:
    """One response to one question."""

    id: str  # of the question
    source: str  # 'teacher' or 'student'
    response: str
    answer: str | None  # extracted, canonical; None if the response states none
    ended: bool = True  # False: cut off at the token limit
    logprob: float | None = None  # per token, where the sample carries it: breaks ties


def load_samples(path: str | Path, source: str, questions: dict[str, Question], lenient: bool) -> list[Sample]:
    """Read recorded responses to the given questions (by id); those to other questions are left out.

    One JSON object a line, in any of these forms, with the question's id under id, question_id or custom_id (a suffix
    '#k' tells several requests about one question apart), or its text under question:
    - {"response" or "generated_text" or "model_outputs": text, "finish"?, "logprob"?, "tokens"?}: one response, ours
      or of MMLU-Pro's published results; logprob is the sum over its tokens
    - {"responses": [text, ...]}: several
    - {"response": {"body": {"choices": [...]}}} or {"choices": [...]}: the batch output of OpenAI's API and of vLLM. A
      request that failed is left out and counted; a choice without text, a refusal, is a response without an answer.
    Raises ValueError naming the line, or if no response belongs to any question.
    """
    texts = [question.question.strip() for question in questions.values()]
    times = Counter(texts)
    by_text = {text: key for text, key in zip(texts, questions) if times[text] == 1}
    samples, failed = [], 0
    for number, row in numbered_jsonl(path):
        ids = [str(row[name]) for name in ("id", "question_id", "custom_id") if row.get(name) is not None][:1]
        require(ids or "question" in row, f"{path}, line {number}: none of id, question_id, custom_id, question")
        names = [*ids, *(name.rpartition("#")[0] for name in ids), by_text.get(str(row.get("question")).strip())]
        key = next((name for name in names if name in questions), None)
        try:
            responses = _responses(row)
        except (KeyError, TypeError, AttributeError):
            responses = [(None, None, None)]
        forms = "response, generated_text or model_outputs, no texts under responses and no choices[].message.content"
        readable = all(isinstance(text, str) for text, _, _ in responses)
        require(readable, f"{path}, line {number}: no text under {forms}")
        failed += not responses
        if key in questions:
            kind = questions[key].kind
            for text, finish, logprob in responses:
                ended = finish not in UNFINISHED
                answer = extract_answer(text, kind, lenient and ended)  # the last number of a cut text answers nothing
                samples.append(Sample(key, source, text, answer, ended, logprob))
    if failed:
        print(f"{path}: {failed} lines hold a failed request and no response; left out")
    require(bool(samples), f"{path}: no response to any of the {len(questions)} questions; do the ids match?")
    return samples


def _responses(row: dict) -> list[tuple[str, str | None, float | None]]:
    """(text, finish reason, log-prob per token) of each response in a record; none if its request failed."""
    if isinstance(row.get("responses"), list):
        return [(text, None, None) for text in row["responses"]]
    for name in ("response", "generated_text", "model_outputs"):
        if isinstance(row.get(name), str):
            known = row.get("logprob") is not None and row.get("tokens")
            return [(row[name], row.get("finish"), row["logprob"] / row["tokens"] if known else None)]
    envelope = row.get("response") or row
    if row.get("error") or envelope.get("status_code", 200) >= 400:
        return []
    found = []
    for choice in envelope.get("body", envelope)["choices"]:
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        tokens = (choice.get("logprobs") or {}).get("content") or []
        logprob = math.fsum(token["logprob"] for token in tokens) / len(tokens) if tokens else None
        found.append(("" if text is None else text, choice.get("finish_reason"), logprob))
    return found
