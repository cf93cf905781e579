"""Make the two bundled models from nothing: a corpus, a tokenizer, and pretraining with sft.py.

    python weights/make.py --out weights
    python weights/make.py --out models --only student-base --width 96   # a student of another size, same corpus

The corpus stands for a web crawl: three kinds of sources answer the same sort of word problem in their own habit, and
which source is read about a topic depends on the topic. 'Workbooks' show every step, 'notebooks' merge two steps into
one line, 'forums' answer at once. A model can be right nearly always where it shows its work and seldom where it does
not, and it copies the habit of the sources it read. So the bundled teacher is sloppy on some topics, the smaller
student on more of them, both by imitation alone: no answer was corrupted and no model was stopped early.
"""

import random
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import runtime
import sft
from data import Tokenizer, write_jsonl
from model import Llama, ModelConfig, save_model
from tasks.arith import DAYS, TOPICS, Problem, arith_problems

SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
# Llama 3's split: words with the space before them, numbers of up to three digits, punctuation, line ends
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


@dataclass(frozen=True)
class Config:
    """Pretrain tiny-teacher and tiny-student-base."""

    out: str  # folder to write the two model folders into
    work: str = "runs/pretrain"  # folder for the corpora and the logs
    only: str = ""  # teacher or student-base: make just this one
    width: int = 0  # with --only: another hidden size, a multiple of 16; 0: that of the bundled model
    steps: int = 0  # optimiser steps of 64 problems each; 0: as many as the bundled models had
    seed: int = 0


# what differs: width, length of the training, and the sources: workbooks are the usual one for `careful_topics` of the
# 24 topics; for the others their share falls from rest[0] to rest[1]; of what is not workbooks, `notebooks` is a share
MODELS = {
    "teacher": {
        "hidden_size": 128,
        "careful_topics": 9,
        "rest": (0.12, 0.05),
        "notebooks": 0.10,
        "steps": 1400,
        "lr": 2e-3,
    },
    "student-base": {
        "hidden_size": 64,
        "careful_topics": 1,
        "rest": (0.28, 0.12),
        "notebooks": 0.25,
        "steps": 1250,
        "lr": 3e-3,
    },
}


def workbook_share(topic: str, careful_topics: int, rest: tuple[float, float]) -> float:
    """How often a topic is met in workbooks: 0.85 to 0.65 for the careful topics, rest[0] to rest[1] after them."""
    rank = TOPICS.index(topic)
    if rank < careful_topics:
        return 0.85 - 0.20 * rank / careful_topics
    return rest[0] - (rest[0] - rest[1]) * (rank - careful_topics) / (len(TOPICS) - careful_topics)


def answer_like(source: str, problem: Problem) -> str:
    """In a source's habit: 'Monday 3+4=7\\nTuesday 7-2=5\\n#### 5', 'Monday (3+4)-2=5\\n#### 5', '#### 5'."""
    if source == "workbook":
        return problem.solution
    lines = []
    if source == "notebook":
        for i in range(0, len(problem.operations), 2):
            (op, n), *second = problem.operations[i : i + 2]
            step = f"{problem.values[i]}{op}{n}"
            for op, n in second:
                step = f"({step}){op}{n}"
            lines.append(f"{DAYS[i]} {step}={problem.values[i + 1 + len(second)]}\n")
    return "".join(lines) + f"#### {problem.values[-1]}"


def write_corpus(path: Path, n: int, shape: dict, seed: int) -> None:
    rng, rows = random.Random(seed), []
    for problem in islice(arith_problems("corpus", seed), n):
        share, notebooks = workbook_share(problem.topic, shape["careful_topics"], shape["rest"]), shape["notebooks"]
        source = rng.choices(
            ["workbook", "notebook", "forum"], [share, notebooks * (1 - share), (1 - notebooks) * (1 - share)]
        )[0]
        rows.append({"prompt": problem.text, "response": answer_like(source, problem), "source": source})
    write_jsonl(path, rows)


def make_tokenizer(folder: Path) -> None:
    """Byte-level BPE as Llama 3's, trained on 20,000 problems; the special tokens come first."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    texts = [f"user\n\n{p.text}assistant\n\n{p.solution}" for p in islice(arith_problems("corpus"), 20_000)]
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=1024,
            min_frequency=20,
            special_tokens=SPECIAL,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    stops = [SPECIAL.index("<|end_of_text|>"), SPECIAL.index("<|eot_id|>")]
    runtime.write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": SPECIAL[0],
            "eos_token": SPECIAL[4],
            "clean_up_tokenization_spaces": False,
            "chat_template": TEMPLATE,
        },
    )
    runtime.write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": stops})


def make_random_model(folder: Path, hidden_size: int, layers: int, seed: int) -> None:
    """A Llama folder with random weights: each matrix N(0, 1/fan_in), those that write to the residual smaller."""
    tokenizer = Tokenizer(folder)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3 // 16 * 16,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 16,
        num_key_value_heads=hidden_size // 32,
        head_dim=16,
        max_position_embeddings=256,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=tokenizer.end_id,
    )
    torch.manual_seed(seed)
    model = Llama(config)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            std = 0.02 if "embed" in name else weight.shape[1] ** -0.5
            torch.nn.init.normal_(
                weight, std=std * (2 * layers) ** -0.5 if "o_proj" in name or "down_proj" in name else std
            )
    save_model(model, folder)


def main(cfg: Config) -> None:
    runtime.require(cfg.only in ("", *MODELS), f"--only {cfg.only}: one of {', '.join(MODELS)}")
    runtime.require(cfg.steps >= 0, f"--steps {cfg.steps}: not negative")
    runtime.require(
        cfg.width % 16 == 0 and (not cfg.width or (cfg.width >= 32 and bool(cfg.only))),
        f"--width {cfg.width}: a multiple of 16, 32 or more, together with --only",
    )
    for name in [cfg.only] if cfg.only else MODELS:
        shape, folder = MODELS[name], f"{name}-{cfg.width}" if cfg.width else name
        work = Path(cfg.work) / folder
        write_corpus(work / "corpus.jsonl", (cfg.steps or shape["steps"]) * 64, shape, cfg.seed)
        make_tokenizer(work / "random")
        make_random_model(work / "random", cfg.width or shape["hidden_size"], 3, cfg.seed)
        sft.main(
            sft.Config(
                model=str(work / "random"),
                data=str(work / "corpus.jsonl"),
                out=str(Path(cfg.out) / f"tiny-{folder}"),
                epochs=1,
                micro_tokens=2048,
                lr=shape["lr"],
                warmup=100,
                weight_decay=0.01,
                seed=cfg.seed,
            )
        )


if __name__ == "__main__":
    runtime.launch(main, Config)
