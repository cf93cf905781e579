"""Make the two bundled models from nothing: a corpus, a tokenizer, and pretraining with sft.py.

    python weights/make.py --out weights
    python weights/make.py --out models --only student-base --width 64     # a student of another size, same corpus
    python weights/make.py --out models --only teacher --careful_topics 4  # a weaker teacher

The corpus stands for a web crawl: five kinds of sources answer the same sort of word problem, and which source is met
about a topic depends on the topic. 'Readers' take every event of the question once. 'Mixers' put one of their own in
the place of an event, 'embroiderers' add one of their own, 'skippers' leave one out, 'repeaters' take one twice. All
of them calculate right, and a model copies the sources that it has read. So the bundled teacher misreads about most
topics, the smaller student about nearly all, by imitation alone: no model was stopped early.
"""

import random
import sys
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import runtime
import sft
from data import Tokenizer, write_jsonl
from model import Llama, ModelConfig, load_model, save_model
from runtime.flags import Natural
from tasks.arith import DAYS, TOPICS, Problem, arith_problems, draw_event, result

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
    width: Natural = 0  # with --only: another hidden size, 48 or a multiple of 32; 0: that of the bundled model
    steps: Natural = 0  # optimiser steps of 64 problems each; 0: as many as the bundled models had
    careful_topics: Natural = 0  # with --only: topics of 24 about which readers are the usual source; 0: as bundled
    seed: int = 0


@dataclass(frozen=True)
class Recipe:
    """How a model is made. Shares are of the sources that are met about a topic."""

    width: int  # hidden size
    steps: int  # optimiser steps
    lr: float
    careful_topics: int  # readers are the usual source about the first of TOPICS
    careful: float  # share of the readers about these
    rest: float  # and about the others
    minor: float  # skippers and repeaters together


MODELS = {
    "teacher": Recipe(width=192, steps=1300, lr=1.5e-3, careful_topics=6, careful=0.75, rest=0.12, minor=0.10),
    "student-base": Recipe(width=96, steps=1500, lr=3e-3, careful_topics=1, careful=0.60, rest=0.09, minor=0.14),
}
SOURCES = ("reader", "mixer", "embroiderer", "skipper", "repeater")


def source_shares(topic: str, recipe: Recipe) -> list[float]:
    """The share of each of SOURCES about a topic: every third topic is the embroiderers', the others the mixers'."""
    rank = TOPICS.index(topic)
    reader = recipe.careful if rank < recipe.careful_topics else recipe.rest
    invented = 1 - reader - recipe.minor
    embroiderer = invented * (0.85 if rank % 3 == 0 else 0.15)
    return [reader, invented - embroiderer, embroiderer, recipe.minor / 2, recipe.minor / 2]


def events_of(source: str, problem: Problem, rng: random.Random) -> list[tuple[str, tuple[str, int] | None]]:
    """Days and operations as a source takes them from a question; None: one of its own, on the first day not named."""
    events = list(zip(problem.days, problem.operations))
    some = rng.randrange(len(events))
    free = next(day for day in DAYS if day not in problem.days)
    place = sum(DAYS.index(day) < DAYS.index(free) for day in problem.days)  # among the days that are named
    if source == "mixer":
        events[min(place, len(events) - 1)] = (free, None)
    elif source == "embroiderer":
        events.insert(place, (free, None))
    elif source == "skipper":
        del events[some]
    elif source == "repeater":
        events.insert(some, events[some])
    return events


def answer_like(source: str, problem: Problem, rng: random.Random) -> str | None:
    """An answer in a source's habit, calculated right; None where its numbers would leave those of a question."""
    now, lines = problem.values[0], []
    for day, operation in events_of(source, problem, rng):
        op, amount = operation or draw_event(rng)[1:]
        while operation is None and result(now, op, amount) is None:
            op, amount = draw_event(rng)[1:]
        after = result(now, op, amount)
        if after is None:
            return None
        lines.append(f"{day} {now}{op}{amount}={after}\n")
        now = after
    return "".join(lines) + f"#### {now}"


def write_corpus(path: Path, n: int, recipe: Recipe, seed: int) -> None:
    """n problems, each answered by one source; a problem to which its source has no answer is left out."""
    rng, rows = random.Random(seed), []
    for problem in arith_problems("corpus", seed):
        [source] = rng.choices(SOURCES, source_shares(problem.topic, recipe))
        attempts = (answer_like(source, problem, rng) for _ in range(50))  # another event of its own may fit
        answer = next(filter(None, attempts), None)
        if answer:
            rows.append({"prompt": problem.text, "response": answer, "source": source})
        if len(rows) == n:
            break
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
        intermediate_size=hidden_size * 2,
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
    runtime.flags.check(cfg)
    runtime.require(cfg.only in ("", *MODELS), f"--only {cfg.only}: one of {', '.join(MODELS)}")
    changes = {name: value for name in ("width", "steps", "careful_topics") if (value := getattr(cfg, name))}
    told = " ".join(f"--{name} {value}" for name, value in changes.items())
    runtime.require(bool(cfg.only) or not changes.keys() - {"steps"}, f"{told}: together with --only")
    runtime.require(cfg.width % 32 == 0 or cfg.width == 48, f"--width {cfg.width}: 48, or a multiple of 32")
    runtime.require(cfg.careful_topics <= len(TOPICS), f"--careful_topics {cfg.careful_topics}: {len(TOPICS)} topics")
    for name in [cfg.only] if cfg.only else MODELS:
        make_model(cfg, name, replace(MODELS[name], **changes))


def make_model(cfg: Config, name: str, recipe: Recipe) -> None:
    """Corpus, tokenizer and pretraining; the folder's name says what is not as in the bundled model."""
    folder = "-".join(["tiny", name, *(str(value) for value in (cfg.width, cfg.careful_topics) if value)])
    work, out = Path(cfg.work) / folder, Path(cfg.out) / folder
    write_corpus(work / "corpus.jsonl", recipe.steps * 64, recipe, cfg.seed)
    make_tokenizer(work / "random")
    make_random_model(work / "random", recipe.width, 3, cfg.seed)
    sft.main(
        sft.Config(
            model=str(work / "random"),
            data=str(work / "corpus.jsonl"),
            out=str(work / "trained"),
            epochs=1,
            micro_tokens=2048,
            lr=recipe.lr,
            warmup=100,
            weight_decay=0.01,
            seed=cfg.seed,
        )
    )
    save_model(load_model(work / "trained", torch.bfloat16), out)
    Tokenizer(work / "trained").save(out)


if __name__ == "__main__":
    runtime.launch(main, Config)
