"""Questions in, answers out: a model asked in its chat template, or with worked examples; sampled or greedy.

    python generate.py --model weights/tiny-teacher --questions arith:test --out runs/try --temperatures 0.7,1.0
    python generate.py --model folder --questions gsm8k:test --shots 8 --out runs/few     # worked examples, no chat
    python generate.py --model weights/tiny-teacher --ask "Ava has 3 pens. Ava buys 4 more. How many pens does ...?"

How a token is drawn is in decode.py: `generate`, which this file hands on, takes and returns token ids.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import runtime
from answers import extract_answer
from data import Question, load_questions, write_jsonl
from decode import Response, generate
from hf.tokenizer import Tokenizer
from model import Llama, ModelConfig, load_model
from runtime import memory, ranks
from runtime.checkpoint import Checkpoint
from tasks.published import STOP_TEXT, few_shot_prompt


def prompt_tokens(tokenizer: Tokenizer, question: Question, shots: int) -> list[int]:
    """How a question is asked: as a chat without examples, or, with shots, as a text to be completed."""
    return tokenizer.text(few_shot_prompt(question, shots)) if shots else tokenizer.chat(question.prompt)


def sampling_memory(cfg, tokenizer: Tokenizer, questions: list[Question]) -> dict[str, float]:
    """What answering needs, by the flags of this script or of eval.py (memory.py says how)."""
    config = ModelConfig.from_folder(cfg.model)
    longest = max(len(prompt_tokens(tokenizer, question, cfg.shots)) for question in questions)
    rows = min(cfg.batch_size, len(questions) * cfg.samples)
    cuda = runtime.default_device().type == "cuda"
    width = memory.file_width(cfg.model, config) if cuda else 4  # fp32 on a CPU
    return memory.sampling(config, rows, -(-rows // cfg.samples), longest, cfg.max_new_tokens, cuda, width)


def says(tokenizer: Tokenizer, stop: str) -> Callable[[list[int]], bool]:
    """Whether new tokens have just completed a stop text. A token holds a byte or more, so a short tail is enough."""
    return lambda tokens: stop in tokenizer.decode(tokens[-len(stop.encode()) - 3 :])


def answer_questions(
    model: Llama,
    tokenizer: Tokenizer,
    questions: list[Question],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int,
    label: str = "generate",
    samples: int = 1,
    shots: int = 0,
    compile: bool = False,
) -> list[list[Response]]:
    """`samples` responses to each question, with their text and a progress bar.

    shots 0 asks in the chat template. With shots the model completes a text (data.few_shot_prompt), and a response ends
    where it begins a question of its own: its tokens include that beginning, its text does not. All questions are then
    of one kind. Raises ValueError for a question that does not fit into the model's context.
    """
    context, prompts = model.config.max_position_embeddings, []
    for question in questions:
        prompt = prompt_tokens(tokenizer, question, shots)
        runtime.require(
            len(prompt) + max_new_tokens <= context,
            f"question '{question.id}': a prompt of {len(prompt)} tokens and --max_new_tokens {max_new_tokens} exceed "
            f"the model's context of {context}: lower --max_new_tokens{' or --shots' * bool(shots)}, or leave it out",
        )
        prompts += [prompt] * samples
    stop = STOP_TEXT[questions[0].kind] if shots else None
    ended = says(tokenizer, stop) if stop else None
    bar = runtime.Progress(label, -(-len(prompts) // ranks.SIZE))
    flat = generate(
        model, prompts, max_new_tokens, temperature, tokenizer.stop_ids, seed, batch_size, bar.update, ended, compile
    )
    bar.close()
    texts = (tokenizer.decode(response.tokens) for response in flat)
    flat = [replace(response, text=text.split(stop)[0] if stop else text) for response, text in zip(flat, texts)]
    return [flat[i : i + samples] for i in range(0, len(flat), samples)]


def answer_stage(
    stage: runtime.Stage,
    model: Llama,
    tokenizer: Tokenizer,
    questions: list[Question],
    max_new_tokens: int,
    temperatures: list[float],
    seed: int,
    batch_size: int,
    label: str,
    samples: int = 1,
    shots: int = 0,
    compile: bool = False,
) -> list[list[list[Response]]]:
    """answer_questions at each temperature, as the work of a stage: a run that is killed goes on where it was.

    The questions are asked in parts of some eight batches, whose answers do not depend on the other parts; what is
    answered is saved between them.
    """
    at = {"answers": [[] for _ in temperatures], "size": max(1, 8 * batch_size // samples)}
    checkpoint, size = Checkpoint(stage, {}, at), at["size"]  # an attempt that was cut off has set the size
    parts = [(index, start) for index in range(len(temperatures)) for start in range(0, len(questions), size)]
    for step in checkpoint.steps(len(parts)):
        index, start = parts[step]
        answers = answer_questions(
            model,
            tokenizer,
            questions[start : start + size],
            max_new_tokens,
            temperatures[index],
            seed + index + (start << 32),  # a part's rows draw chances of their own
            batch_size,
            f"{label} T={temperatures[index]:g}",
            samples,
            shots,
            compile,
        )
        at["answers"][index] += [[vars(response) for response in responses] for responses in answers]
    return [[[Response(**fields) for fields in responses] for responses in answers] for answers in at["answers"]]


# ---- the script ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Sample answers to every question of a set, or, with --ask, print one answer."""

    model: str  # Hugging Face folder
    questions: str = ""  # question set: a JSONL, arith:train, gsm8k:train ...
    out: str = ""  # folder for samples.jsonl
    source: str = "teacher"  # who is speaking, written beside every sample: teacher or student
    samples: int = 8  # answers per question and temperature
    temperatures: str = "1.0"  # comma-separated; several give the vote more variety
    max_new_tokens: int = 256  # an answer that has not ended by then counts as unfinished
    batch_size: int = 256  # rows sampled together
    limit: int = 0  # only the first questions; 0: all
    shots: int = 0  # worked examples before the question, as published scores have them; 0: a chat without
    lenient: bool = False  # read the last number or letter where no answer is stated
    seed: int = 0
    compile: bool = False  # torch.compile, on a GPU with CUDA graphs: a minute at first, then faster; for long runs
    ask: str = ""  # one question to be answered greedily on the screen


def main(cfg: Config) -> None:
    try:
        temperatures = [float(text) for text in cfg.temperatures.split(",")]
    except ValueError:
        temperatures = [-1.0]
    good = all(0 <= temperature <= 100 for temperature in temperatures)
    runtime.require(good, f"--temperatures {cfg.temperatures}: one or more numbers from 0 to 100, comma-separated")
    for name in ("samples", "max_new_tokens", "batch_size"):
        runtime.require(getattr(cfg, name) > 0, f"--{name} {getattr(cfg, name)}: at least 1 is needed")
    for name in ("shots", "limit"):
        runtime.require(getattr(cfg, name) >= 0, f"--{name} {getattr(cfg, name)}: 0 or more")
    runtime.require(cfg.source in ("teacher", "student"), f"--source {cfg.source}: 'teacher' or 'student'")
    runtime.require(bool(cfg.ask) or bool(cfg.questions and cfg.out), "give --questions and --out, or --ask")
    stage = None if cfg.ask else runtime.Stage(cfg, inputs=["model", "questions"], memory=["batch_size"])
    if stage and stage.finished:
        return
    questions = [Question("--ask", cfg.ask)] if cfg.ask else load_questions(cfg.questions, cfg.limit or None)
    tokenizer, device = Tokenizer(cfg.model), runtime.default_device()
    if stage:
        memory.say(sampling_memory(cfg, tokenizer, questions))
    model = load_model(cfg.model, runtime.inference_dtype(), device)
    runtime.set_threads(model, say=not cfg.ask)  # --ask prints an answer and nothing else
    if cfg.ask:
        [[response]] = answer_questions(model, tokenizer, questions, cfg.max_new_tokens, 0.0, 0, 1, shots=cfg.shots)
        print(response.text)
        return
    rows, tokens, settings = [], 0, (cfg.batch_size, cfg.source, cfg.samples, cfg.shots, cfg.compile)
    sampling = (cfg.max_new_tokens, temperatures, cfg.seed, *settings)
    for temperature, answers in zip(temperatures, answer_stage(stage, model, tokenizer, questions, *sampling)):
        for question, responses in zip(questions, answers):
            for response in responses:
                tokens += len(response.tokens)
                answer = extract_answer(response.text, question.kind, cfg.lenient)
                rows.append(
                    {
                        "id": question.id,
                        "source": cfg.source,
                        "response": response.text,
                        "answer": answer,
                        "finish": response.finish,
                        "logprob": round(sum(response.logprobs), 4),
                        "temperature": temperature,
                        "tokens": len(response.tokens),
                    }
                )
    if ranks.RANK:
        return
    write_jsonl(stage.out / "samples.jsonl", rows)
    ended = sum(row["finish"] == "stop" for row in rows) / len(rows)
    answered = sum(row["answer"] is not None for row in rows) / len(rows)
    print(
        f"{len(rows)} answers to {len(questions)} questions: {ended:.1%} ended, {answered:.1%} state an answer, "
        f"{tokens / len(rows):.1f} tokens each"
    )
    read = sum(len(prompt_tokens(tokenizer, q, cfg.shots)) for q in questions) * cfg.samples * len(temperatures)
    parameters = sum(p.numel() for p in model.parameters())
    stage.finish(tokens=tokens, flops=2 * parameters * (tokens + read), ended=ended, answered=answered)


if __name__ == "__main__":
    runtime.launch(main, Config, every_rank=True)
