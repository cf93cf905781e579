"""Accuracy with its sample size and interval, strict and lenient, and every transcript kept.

    python eval.py --questions runs/try/0_questions/test.jsonl --out runs/try/7_eval/test \\
        base=weights/tiny-student-base sft=runs/try/2_sft ppo=runs/try/6_ppo
    python eval.py --questions ... --out runs/try/7_eval/best_of_n --reward_model runs/try/5_reward --samples 8 \\
        sft=runs/try/2_sft

All models answer the same questions with the same prompt, greedily: a chat, or, with --shots, the worked examples that
published scores are measured with (8 for GSM8K, 5 for MMLU-Pro), to be completed. Each has a folder of its own, and is
skipped when it is done. With a reward model, several answers are sampled, the one with the highest score counts
(best-of-n; what was cut off has PPO's score for that), and all scores are compared with the truth.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import quality
import runtime
from answers import extract_answer, is_correct
from data import Question, Tokenizer, load_questions
from generate import answer_in_parts, answers_to, load, prompts_of
from model import Llama, load_scalar_model
from reward import UNFINISHED_SCORE, replace_unfinished, score_responses
from runtime.files import lines
from runtime.flags import AtOnce, Count, Input, Inputs, Natural, Positive, Questions
from tasks.published import STOP_TEXT
from tasks.recorded import load_samples

SCORED_AT_ONCE = 16384  # tokens of best-of-n: nothing is kept for a backward pass


@dataclass(frozen=True)
class Config:
    """Answer a question set with one or more models and count what is right."""

    models: Inputs  # NAME=FOLDER ...: its name in the report, and a Hugging Face folder or a JSONL of recorded answers
    questions: Questions  # question set with gold answers
    out: str  # folder that gets a folder for each name
    max_new_tokens: Count = 256  # an answer that has not ended by then counts as truncated
    batch_size: AtOnce = 256  # rows sampled together
    limit: Natural = 0  # only the first questions; 0: all
    shots: Natural = 0  # worked examples before the question, as published scores have them; 0: a chat without
    reward_model: Input = ""  # scores the answers: best-of-n
    samples: Count = 1  # answers per question; more than one needs a reward model
    temperature: Positive = 1.0  # of those several samples; a single answer is greedy
    unfinished_score: float = UNFINISHED_SCORE  # of a sample that was cut off, as in PPO
    seed: int = 0  # of those samples


# ---- what is counted -----------------------------------------------------------------------------------------------


def wilson_interval(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson, 1927): honest near 0 and 1 too. Example: (8, 10) -> (0.490, 0.943)."""
    centre = (right + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(right * (n - right) / n + z * z / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


def summarise(transcripts: list[dict]) -> dict:
    """Transcripts to {"strict", "lenient", "n", "ci95" (of strict), "no_answer", "truncated", "mean_tokens"}."""
    n, tokens = len(transcripts), [row["tokens"] for row in transcripts if row["tokens"] is not None]
    strict = sum(row["correct"] for row in transcripts)
    return {
        "strict": strict / n,
        "lenient": sum(row["correct_lenient"] for row in transcripts) / n,
        "n": n,
        "ci95": list(wilson_interval(strict, n)),
        "no_answer": sum(row["answer"] is None for row in transcripts) / n,
        "truncated": sum(row["finish"] == "length" for row in transcripts) / n,
        "mean_tokens": sum(tokens) / len(tokens) if tokens else None,  # not known of recorded answers
    }


def grade(question: Question, text: str, finish: str, tokens: int | None) -> dict:
    """One transcript: the response, its answers as read strictly and leniently, and whether they are right."""
    answer = extract_answer(text, question.kind)
    lenient = extract_answer(text, question.kind, lenient=True)
    return {
        "id": question.id,
        "question": question.question,
        "gold": question.answer,
        "response": text,
        "answer": answer,
        "answer_lenient": lenient,
        "finish": finish,
        "tokens": tokens,
        "correct": is_correct(answer, question.answer, question.kind),
        "correct_lenient": is_correct(lenient, question.answer, question.kind),
    }


def accuracy(
    model: Llama, tokenizer: Tokenizer, questions: list[Question], max_new_tokens: int, batch_size: int = 256
) -> tuple[dict, list[dict]]:
    """Greedy answers to the questions: the summary and the transcripts."""
    prompts = prompts_of(model.config, tokenizer, questions, max_new_tokens)
    said = answers_to(model, tokenizer, prompts, max_new_tokens, batch_size)
    transcripts = [grade(q, r.text, r.finish, len(r.tokens)) for q, r in zip(questions, said, strict=True)]
    return summarise(transcripts), transcripts


def recorded_transcripts(path: str, questions: list[Question]) -> list[dict]:
    """The first recorded answer to every question, graded: for a teacher that is an API and not a folder."""
    first = {}
    for sample in load_samples(path, "teacher", {question.id: question for question in questions}, lenient=False):
        first.setdefault(sample.id, sample)
    missing = [question.id for question in questions if question.id not in first]
    some = f"{len(missing)} of {len(questions)} questions have no recorded answer"
    runtime.require(not missing, f"{path}: {some}, the first is '{(missing or [''])[0]}'")
    return [grade(q, first[q.id].response, "stop" if first[q.id].ended else "length", None) for q in questions]


# ---- the script ----------------------------------------------------------------------------------------------------


def main(cfg: Config) -> None:
    agree = (cfg.samples > 1) == bool(cfg.reward_model)
    runtime.require(agree, "--samples above 1 and --reward_model go together: it picks one of the samples")
    runtime.require(not (cfg.shots and cfg.reward_model), "--reward_model knows chats alone: leave --shots out")
    names = [word.partition("=")[0] for word in cfg.models]
    for word, name in zip(cfg.models, names):
        # a name becomes a folder of --out, and stands beside the flags in its done.json
        fits = "=" in word and name == Path(name).name and name.strip(".") and not hasattr(cfg, name)
        runtime.require(bool(fits) and names.count(name) == 1, f"'{word}': NAME=FOLDER is expected, every NAME once")
    for word, name in zip(cfg.models, names):
        evaluate(replace(cfg, models=(word,), out=str(Path(cfg.out) / name)))


@runtime.stage
def evaluate(cfg: Config, stage: runtime.Stage) -> None:
    """Fill the folder of one model: transcripts.jsonl, the summary in done.json; scores.jsonl with a reward model."""
    name, _, folder = cfg.models[0].partition("=")
    questions = load_questions(cfg.questions, cfg.limit or None)
    without = sum(question.answer is None for question in questions)
    runtime.require(not without, f"{cfg.questions}: {without} questions have no gold answer to compare with")
    if Path(folder).is_file():
        runtime.require(not (cfg.reward_model or cfg.shots), f"{folder}: recorded answers are graded as they are")
        parameters, prompt_tokens = {"parameters": 0}, 0
        recorded = recorded_transcripts(folder, questions)
        for _ in stage.steps(1):
            stage.append("transcripts.jsonl", lines(recorded))
    else:
        answer = best_of_n if cfg.reward_model else greedy
        parameters, prompt_tokens = answer(cfg, stage, folder, questions)
    transcripts, scored = stage.rows("transcripts.jsonl"), stage.rows("scores.jsonl")
    summary = summarise(transcripts)
    low, high = summary["ci95"]
    print(
        f"{name}: {summary['strict']:.1%} [{low:.1%}, {high:.1%}] of {summary['n']} right, lenient "
        f"{summary['lenient']:.1%}, no answer {summary['no_answer']:.1%}"
    )
    tokens = sum(sum(row["tokens"]) for row in scored) or sum(row["tokens"] or 0 for row in transcripts)
    flops = 2 * sum(parameters.values()) * (tokens + prompt_tokens)  # the reward model reads all that is said
    agreement = quality.against_gold(scored, quality.trained_scale(cfg.reward_model)) if scored else {}
    stage.finish(tokens=tokens, flops=flops, name=name, accuracy=summary, **parameters, **agreement)


def greedy(cfg: Config, stage: runtime.Stage, folder: str, questions: list[Question]) -> tuple[dict, int]:
    """Answer into transcripts.jsonl; returns how many parameters there are, and how many prompt tokens were read."""
    model, tokenizer = load(folder)
    prompts = prompts_of(model.config, tokenizer, questions, cfg.max_new_tokens, cfg.shots)
    stop_text = STOP_TEXT[questions[0].kind] if cfg.shots else ""
    for _, asked, answers in answer_in_parts(stage, cfg, model, tokenizer, prompts, "eval", stop_text=stop_text):
        graded = [grade(questions[i], r.text, r.finish, len(r.tokens)) for i, [r] in zip(asked, answers)]
        stage.append("transcripts.jsonl", lines(graded))
    return {"parameters": sum(p.numel() for p in model.parameters())}, sum(map(len, prompts))


def best_of_n(cfg: Config, stage: runtime.Stage, folder: str, questions: list[Question]) -> tuple[dict, int]:
    """Sample several answers to each question; the one that the reward model likes best goes into transcripts.jsonl,
    the scores of all into scores.jsonl. Returns what `greedy` does."""
    model, tokenizer = load(folder)
    tokenizer.require_same(cfg.reward_model)
    reward_model = load_scalar_model(cfg.reward_model, runtime.inference_dtype(), runtime.default_device())
    prompts = prompts_of(model.config, tokenizer, questions, cfg.max_new_tokens)
    parts = answer_in_parts(stage, cfg, model, tokenizer, prompts, "eval", (cfg.temperature,), cfg.samples)
    for _, asked, answers in parts:
        repeated = [prompts[i] for i in asked for _ in range(cfg.samples)]
        said = [response for responses in answers for response in responses]
        scores = score_responses(reward_model, repeated, [r.tokens for r in said], SCORED_AT_ONCE)  # (len(said),)
        scores = replace_unfinished(scores, [r.finish for r in said], cfg.unfinished_score)
        for i, responses, row in zip(asked, answers, scores.view(-1, cfg.samples).tolist()):
            graded = [grade(questions[i], r.text, r.finish, len(r.tokens)) for r in responses]
            best = row.index(max(row))
            stage.append("transcripts.jsonl", lines([graded[best] | {"score": row[best]}]))
            scored = {
                "id": questions[i].id,
                "scores": [round(score, 5) for score in row],
                "correct": [transcript["correct"] for transcript in graded],
                "answers": [transcript["answer"] for transcript in graded],
                "tokens": [transcript["tokens"] for transcript in graded],
            }
            stage.append("scores.jsonl", lines([scored]))
    networks = {"parameters": model, "scorer_parameters": reward_model}
    sizes = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    return sizes, cfg.samples * sum(map(len, prompts))


if __name__ == "__main__":
    runtime.launch(main, Config, every_rank=True)
