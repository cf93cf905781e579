"""Recorded responses: what generate.py wrote, what an API's batch returned, what others published."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from answers import extract_answer
from runtime.files import numbered_jsonl
from runtime.flags import require
from tasks.question import Question

IDS = "id question_id custom_id qid uid key task_id doc_id example_id problem_id".split()  # one of them is a question's
FINISH = "finish finish_reason finishReason stop_reason stopReason done_reason".split()
UNFINISHED = re.compile(  # finish reasons of a response that did not end by itself, in the words of many servers
    "(?i)length|max|limit|window|exceed|truncat|incomplete|abort|cancel|error|timeout|filter|safety|block|prohibit|recit"
)


@dataclass(frozen=True)
class Sample:
    """One response to one question."""

    id: str  # of the question
    source: str  # 'teacher' or 'student'
    response: str
    answer: str | None  # extracted, canonical; None if the response states none
    ended: bool = True  # False: cut off at the token limit
    logprob: float | None = None  # per token, where the sample carries it: breaks ties
    temperature: float | None = None  # at which it was sampled, where that is known


def load_samples(path: str | Path, source: str, questions: dict[str, Question], lenient: bool) -> list[Sample]:
    """Read recorded responses to the given questions (by id); those to other questions are left out.

    One JSON object a line, in any of these forms, with the question's id under one of IDS, whichever is one (a suffix
    '#k' tells several requests about one question apart), or its text under question:
    - {"response" or "generated_text" or "model_outputs": text, "finish"?, "logprob"?, "tokens"?, "temperature"?}: one
      response, ours or of MMLU-Pro's published results; logprob is the sum over its tokens
    - {"responses": [text, ...]}: several
    - {"response": {"body": {"choices": [...]}}} or {"choices": [...]}: the batch output of OpenAI's API and of vLLM. A
      request that failed is left out and counted; a choice without text, a refusal, is a response without an answer.
    Raises ValueError naming the line, or if no response belongs to any question.
    """
    texts = [question.question.strip() for question in questions.values()]
    times = Counter(texts)
    by_text = {text: question for text, question in zip(texts, questions.values()) if times[text] == 1}
    samples, strangers, failed, lines = [], [], 0, 0
    for number, row in numbered_jsonl(path):
        try:
            key, name = _question_of(row, questions, by_text)
            responses = _responses(row)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        except (KeyError, TypeError, AttributeError, ArithmeticError):
            responses = [(None, True, None)]
        forms = "response, generated_text or model_outputs, no texts under responses and no choices[].message.content"
        readable, temperature = all(isinstance(text, str) for text, _, _ in responses), row.get("temperature")
        require(readable, f"{path}, line {number}: no text under {forms}")
        known = isinstance(temperature, (int, float, type(None)))
        require(known, f"{path}, line {number}: 'temperature' must be a number")
        lines, failed = lines + 1, failed + (not responses)
        if key is None:
            strangers.append(name)
            continue
        kind = questions[key].kind
        for text, ended, logprob in responses:
            answer = extract_answer(text, kind, lenient and ended)  # the last number of a cut text answers nothing
            samples.append(Sample(key, source, text, answer, ended, logprob, temperature))
    theirs, ours = ", ".join(strangers[:3]), ", ".join(map(repr, islice(questions, 3)))
    none = f"{path}: none of its {lines} lines belongs to any of the {len(questions)} questions"
    require(len(strangers) < lines, f"{none}; the lines have {theirs or 'nothing'}, the questions the ids {ours}")
    if strangers:
        print(f"{path}: {len(strangers)} of {lines} lines belong to no question ({theirs}); left out")
    if failed:
        print(f"{path}: {failed} of {lines} lines hold a failed request and no response; left out")
    require(bool(samples), f"{path}: no response to any of the {len(questions)} questions: every request failed")
    return samples


def _question_of(row: dict, questions: dict[str, Question], by_text: dict[str, Question]) -> tuple[str | None, str]:
    """The id of the question that a record belongs to, or None, and how the record names it.

    Its ids count, then its text. ValueError if it has neither, or ids of several questions of which none has its text.
    """
    ids = {name: str(row[name]) for name in IDS if row.get(name) is not None}
    require(ids or "question" in row, f"none of {', '.join(IDS)}, question")
    asked = by_text.get(str(row.get("question")).strip())
    if asked and row.get("options") not in (None, list(asked.options)):
        asked = None  # 200 texts of MMLU-Pro stand over several sets of options
    named = {name: key for name, id in ids.items() for key in (id.rpartition("#")[0], id) if key in questions}
    one = len(set(named.values())) < 2 or (asked and asked.id in named.values())
    both = " and ".join(f"{name} {ids[name]!r}" for name in named)
    require(one, f"{both} are ids of different questions: rename the key that does not hold the question's id")
    if asked and (not named or asked.id in named.values()):
        return asked.id, ""
    return next(iter(named.values()), None), ", ".join(f"{name} {id!r:.60}" for name, id in ids.items()) or "its text"


def _responses(row: dict) -> list[tuple[str, bool, float | None]]:
    """(text, whether it ended by itself, log-prob per token) of each response in a record; none if a request failed."""
    if isinstance(row.get("responses"), list):
        return [(text, _ended(row), None) for text in row["responses"]]
    for name in ("response", "generated_text", "model_outputs"):
        if isinstance(row.get(name), str):
            known = row.get("logprob") is not None and row.get("tokens")
            return [(row[name], _ended(row), row["logprob"] / row["tokens"] if known else None)]
    envelope = row.get("response") or row
    if row.get("error") or envelope.get("status_code", 200) >= 400:
        return []
    found = []
    for choice in envelope.get("body", envelope)["choices"]:
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        if isinstance(text, list):  # parts, of which some are thoughts
            text = "".join(part["text"] for part in text if part["type"] == "text")
        given = choice.get("logprobs") or {}  # of a chat, or of /v1/completions, where a prompt's first has none
        logprobs = [token["logprob"] for token in given.get("content") or []] or given.get("token_logprobs") or []
        logprobs = [logprob for logprob in logprobs if logprob is not None]
        mean = math.fsum(logprobs) / len(logprobs) if logprobs else None
        found.append(("" if text is None else text, _ended(choice), mean))
    return found


def _ended(record: dict) -> bool:
    """Whether a response ended by itself; one that does not say so did."""
    reasons = (record.get(name) for name in FINISH)
    reason = next((reason for reason in reasons if reason is not None), None)
    return not UNFINISHED.search(str(reason.get("type") if isinstance(reason, dict) else reason))
