"""Accuracy with its sample size and interval, strict and lenient, and every transcript kept.

    python eval.py --name ppo --model runs/try/6_ppo --questions runs/try/0_questions/test.jsonl \\
        --out runs/try/7_eval/ppo
    python eval.py --name best_of_n --model runs/try/2_sft --reward_model runs/try/5_reward --samples 8 ...

All models answer the same questions with the same prompt, greedily: a chat, or, with --shots, the worked examples that
published scores are measured with (8 for GSM8K, 5 for MMLU-Pro), to be completed. With a reward model, several answers
are sampled, the one with the highest score counts (best-of-n), and all scores are compared with the truth: the share
of pairs in the right order, calibration, length, and what a best-of-n of any n would reach.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import quality
import runtime
from answers import extract_answer, is_correct
from data import Question, collate, load_questions, write_jsonl
from generate import answer_questions, answer_stage, prompt_tokens, sampling_memory
from hf.tokenizer import Tokenizer
from model import Llama, ModelConfig, ScalarModel, last_value, load_model, load_scalar_model
from runtime import memory, ranks
from runtime.steps import dealt
from tasks.recorded import load_samples

SCORED_AT_ONCE = 16384  # tokens of best-of-n: nothing is kept for a backward pass


def wilson_interval(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share (Wilson, 1927): honest near 0 and 1 too. Example: (8, 10) -> (0.490, 0.943)."""
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
    model: Llama,
    tokenizer: Tokenizer,
    questions: list[Question],
    max_new_tokens: int,
    batch_size: int = 256,
    label: str = "eval",
    shots: int = 0,
    compile: bool = False,
    stage: runtime.Stage | None = None,
) -> tuple[dict, list[dict]]:
    """Greedy answers to the questions: the summary and the transcripts. As a stage's work they are saved in parts."""
    settings = (batch_size, label, 1, shots, compile)
    if stage is None:
        answers = answer_questions(model, tokenizer, questions, max_new_tokens, 0.0, 0, *settings)
    else:
        [answers] = answer_stage(stage, model, tokenizer, questions, max_new_tokens, [0.0], 0, *settings)
    transcripts = [grade(q, r.text, r.finish, len(r.tokens)) for q, [r] in zip(questions, answers)]
    return summarise(transcripts), transcripts


def recorded_accuracy(path: str, questions: list[Question]) -> tuple[dict, list[dict]]:
    """The first recorded answer to every question, graded: for a teacher that is an API and not a folder."""
    first = {}
    for sample in load_samples(path, "teacher", {question.id: question for question in questions}, lenient=False):
        first.setdefault(sample.id, sample)
    missing = [question.id for question in questions if question.id not in first]
    runtime.require(
        not missing,
        f"{path}: {len(missing)} of {len(questions)} questions have no recorded answer, the "
        f"first is '{(missing or [''])[0]}'",
    )
    transcripts = [grade(q, first[q.id].response, "stop" if first[q.id].ended else "length", None) for q in questions]
    return summarise(transcripts), transcripts


@torch.no_grad()
def score_responses(
    model: ScalarModel, prompts: list[list[int]], responses: list[list[int]], micro_tokens: int
) -> Tensor:
    """The reward model's score of each response, read at its last token: (N,), on the CPU."""
    device = model.score.weight.device
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses)]
    scores = torch.zeros(len(prompts))  # (N,)
    for batch, counts in dealt(range(len(lengths)), lengths, micro_tokens):
        tokens, _, last = collate([prompts[j] for j in batch], [responses[j] for j in batch])  # (B, T), _, (B,)
        scores[batch] = last_value(model(tokens.to(device)), last.to(device)).cpu() * counts
    return ranks.total(scores)  # each row was read by one rank and is 0 on the others


def trained_scale(folder: str) -> float:
    """What a reward model's scores were divided by after training (reward.py); 1 where its done.json does not say."""
    try:
        return float(json.loads((Path(folder) / "done.json").read_text(encoding="utf-8"))["results"]["score_std"])
    except (OSError, ValueError, KeyError, TypeError):
        return 1.0


# ---- the script ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Answer a question set and count what is right."""

    model: str  # Hugging Face folder, or a JSONL of recorded answers
    questions: str  # question set with gold answers
    out: str  # folder for transcripts.jsonl, scores.jsonl of best-of-n, and the summary in done.json
    name: str = "model"  # what the report calls it
    max_new_tokens: int = 256  # an answer that has not ended by then counts as truncated
    batch_size: int = 256  # rows sampled together
    limit: int = 0  # only the first questions; 0: all
    shots: int = 0  # worked examples before the question, as published scores have them; 0: a chat without
    reward_model: str = ""  # scores the answers: best-of-n
    samples: int = 1  # answers per question; more than one needs a reward model
    temperature: float = 1.0  # of those several samples; a single answer is greedy
    seed: int = 0
    compile: bool = False  # torch.compile, on a GPU with CUDA graphs: a minute at first, then faster; for long runs


def main(cfg: Config) -> None:
    for name in ("max_new_tokens", "batch_size", "samples"):
        runtime.require(getattr(cfg, name) > 0, f"--{name} {getattr(cfg, name)}: must be greater than 0")
    runtime.require(
        (cfg.samples > 1) == bool(cfg.reward_model),
        "--samples above 1 and --reward_model go together: the reward model picks one of the samples",
    )
    runtime.require(cfg.temperature > 0, f"--temperature {cfg.temperature}: must be greater than 0")
    recorded = Path(cfg.model).is_file()
    for name in ("limit", "shots"):
        runtime.require(getattr(cfg, name) >= 0, f"--{name} {getattr(cfg, name)}: 0 or more")
    runtime.require(
        not cfg.shots or not (recorded or cfg.reward_model),
        "--shots asks a model in another way; recorded answers were asked already, a --reward_model knows chats alone",
    )
    stage = runtime.Stage(cfg, inputs=["model", "questions", "reward_model"], memory=["batch_size"])
    if stage.finished:
        return
    questions = load_questions(cfg.questions, cfg.limit or None)
    without = sum(question.answer is None for question in questions)
    runtime.require(not without, f"{cfg.questions}: {without} questions have no gold answer to compare with")
    parameters, read, scored, judge = 0, 0, [], {}
    if recorded:
        runtime.require(
            not cfg.reward_model, "--reward_model picks among a model's samples; recorded answers are graded"
        )
        summary, transcripts = recorded_accuracy(cfg.model, questions)
    else:
        tokenizer = Tokenizer(cfg.model)
        needs = sampling_memory(cfg, tokenizer, questions)
        if cfg.reward_model:
            needs = memory.with_scorer(needs, ModelConfig.from_folder(cfg.reward_model), SCORED_AT_ONCE)
        memory.say(needs)
        model = load_model(cfg.model, runtime.inference_dtype(), runtime.default_device())
        runtime.set_threads(model)
        parameters = sum(p.numel() for p in model.parameters())
        read = cfg.samples * sum(len(prompt_tokens(tokenizer, question, cfg.shots)) for question in questions)
        if cfg.reward_model:
            runtime.require(
                Tokenizer(cfg.reward_model).same_ids(tokenizer),
                f"{cfg.reward_model} and --model {cfg.model} have different tokenizers: one cannot read the other's "
                "tokens",
            )
            transcripts, scored, judge = best_of_n(cfg, stage, model, tokenizer, questions)
            summary = summarise(transcripts)
        else:
            summary, transcripts = accuracy(
                model, tokenizer, questions, cfg.max_new_tokens, cfg.batch_size, cfg.name, cfg.shots, cfg.compile, stage
            )
    if ranks.RANK:
        return
    if scored:
        write_jsonl(stage.out / "scores.jsonl", scored)
    write_jsonl(stage.out / "transcripts.jsonl", transcripts)
    low, high = summary["ci95"]
    print(
        f"{cfg.name}: {summary['strict']:.1%} [{low:.1%}, {high:.1%}] of {summary['n']} right, lenient "
        f"{summary['lenient']:.1%}, no answer {summary['no_answer']:.1%}, truncated {summary['truncated']:.1%}"
    )
    tokens = sum(sum(row["tokens"]) for row in scored) or sum(row["tokens"] or 0 for row in transcripts)
    flops = 2 * (parameters + judge.get("scorer_parameters", 0)) * (tokens + read)  # the scorer reads all that is said
    stage.finish(tokens=tokens, flops=flops, name=cfg.name, parameters=parameters, accuracy=summary, **judge)


def best_of_n(
    cfg: Config, stage: runtime.Stage, model: Llama, tokenizer: Tokenizer, questions: list[Question]
) -> tuple[list[dict], list[dict], dict]:
    """Sample several answers to each question and keep the one that the reward model likes best.

    Returns the transcripts of those, one row per question with the scores of all, and how good a judge the model is.
    """
    scorer = load_scalar_model(cfg.reward_model, torch.float32, runtime.default_device())
    sampling = (cfg.max_new_tokens, [cfg.temperature], cfg.seed, cfg.batch_size, cfg.name, cfg.samples, 0, cfg.compile)
    [answers] = answer_stage(stage, model, tokenizer, questions, *sampling)
    prompts = [tokenizer.chat(question.prompt) for question in questions]
    scores = score_responses(
        scorer,
        [prompt for prompt in prompts for _ in range(cfg.samples)],
        [r.tokens for responses in answers for r in responses],
        SCORED_AT_ONCE,
    )
    scores = scores.view(len(questions), cfg.samples)  # (questions, n)
    transcripts, scored = [], []
    for question, responses, row in zip(questions, answers, scores):
        graded = [grade(question, r.text, r.finish, len(r.tokens)) for r in responses]
        best = int(row.argmax())
        transcripts.append(graded[best] | {"score": row[best].item()})
        scored.append(
            {
                "id": question.id,
                "scores": [round(score, 5) for score in row.tolist()],
                "correct": [r["correct"] for r in graded],
                "answers": [r["answer"] for r in graded],
                "tokens": [r["tokens"] for r in graded],
            }
        )
    judge = judge_quality(scores, scored, trained_scale(cfg.reward_model))
    print(
        f"reward model against gold, {scores.numel()} samples: AUC {judge['auc_gold'] or math.nan:.3f}, "
        f"{judge['pair_accuracy_gold'] or math.nan:.1%} of {judge['pairs_gold']} pairs in order; one sample "
        f"{judge['single_sample_accuracy']:.1%}, best of {cfg.samples} {judge['best_of_n']['judge'][-1]:.1%}, "
        f"a perfect judge {judge['any_right']:.1%}"
    )
    return transcripts, scored, judge | {"scorer_parameters": sum(p.numel() for p in scorer.parameters())}


def judge_quality(scores: Tensor, scored: list[dict], scale: float) -> dict:
    """A reward model against gold, as in quality.py: scores (questions, n) and the rows of scores.jsonl.

    auc_gold and accuracy_gold (at the threshold that is best for these samples) take all samples of all questions
    together; the other *_gold numbers take the pairs of a right and a wrong sample of one question. None: undefined.
    """
    right, tokens = ([row[key] for row in scored] for key in ("correct", "tokens"))  # (questions, n) each
    good, bad = quality.right_wrong_pairs(right)  # (P,), (P,)
    flat, lengths = scores.double().flatten().numpy(), torch.tensor(tokens).flatten().numpy()  # (questions * n,) each
    pairs = quality.pair_quality(flat[good] - flat[bad], lengths[good], lengths[bad], scale)
    labels = torch.tensor(right)  # (questions, n)
    area = quality.auc(flat, labels.flatten())
    accuracy_gold, threshold = quality.best_threshold(flat, labels.flatten())
    return {
        "auc_gold": None if math.isnan(area) else area,
        "accuracy_gold": accuracy_gold,
        "threshold_gold": None if math.isinf(threshold) else threshold,
        "pairs_gold": len(good),
        **{f"{name}_gold": value for name, value in pairs.items()},
        "length_correlation_gold": quality.correlation(flat, lengths),
        "single_sample_accuracy": labels.double().mean().item(),
        "any_right": labels.any(1).double().mean().item(),  # what a perfect judge would reach
        "best_of_n": quality.best_of_n_curve(scores, right)
        | {"majority": quality.majority_curve([row["answers"] for row in scored], right)},
    }


if __name__ == "__main__":
    runtime.launch(main, Config, every_rank=True)
