"""Ask the models of a run: teacher, student before, after SFT and after PPO answer side by side, with their scores.

    python play.py runs/tiny-0                      # type a question, or press Enter for the next test question
    echo "Ava has 3 pens ..." | python play.py runs/tiny-0

A score is the reward model's: 0 is the mean of the SFT student's answers and 1 their deviation. A test question has a
gold answer, so its answers are also right or wrong. docs/modify.md does the same in ten lines of Python.
"""

import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, zip_longest
from pathlib import Path

import torch

import runtime
from answers import extract_answer, is_correct
from data import Question, Tokenizer, load_questions
from generate import Response, answer, load
from model import ScalarModel, load_scalar_model
from report import LEARNED
from reward import UNFINISHED_SCORE, replace_unfinished, score_responses
from runtime.files import read_object
from runtime.flags import Count


@dataclass(frozen=True)
class Config:
    """Ask the models of a run side by side; questions come from the keyboard or a pipe, a line each."""

    run: tuple[str, ...]  # the run folder
    max_new_tokens: Count = 256  # of an answer, as far as the model's context holds them


def folders_of(run: Path) -> dict[str, Path]:
    """Who can be asked, and where each lies; the first two are named in the records of the stages that used them."""
    folders = {"teacher": run / "1_teacher", "base": run / "2_sft"}
    for name, stage in folders.items():
        if (stage / "done.json").is_file():
            folders[name] = Path(read_object(stage / "done.json")["config"]["model"])
    rounds = [path for path in run.glob("6_ppo*") if re.fullmatch(LEARNED, path.name)]
    return folders | {"SFT": run / "2_sft", "PPO": max(rounds, default=run / "6_ppo"), "reward model": run / "5_reward"}


def questions_from(tests: Sequence[Question]) -> Iterator[Question]:
    """What is typed, asked as the test questions are; for an empty line the next of those. Ends with the input."""
    following, prompt = cycle(tests), "question, or Enter for the next test question: " if sys.stdin.isatty() else ""
    sys.stdin.reconfigure(errors="replace")
    while True:
        try:
            typed = input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        yield replace(tests[0], id="typed", question=typed, answer=None, options=()) if typed else next(following)


def column_of(name: str, said: Response, score: float | None, question: Question) -> list[str]:
    """What stands below each other of one answer: who, score, right or wrong, and what was said, line by line."""
    told = [] if score is None else [f"{score:+.2f}"]
    if question.answer is not None:
        right = is_correct(extract_answer(said.text, question.kind), question.answer, question.kind)
        told.append("right" if right else "wrong")
    told += ["cut"] * (said.finish == "length")
    return [name, ", ".join(told), *(runtime.shown(line) for line in said.text.splitlines())]


def side_by_side(columns: Sequence[Sequence[str]], width: int) -> str:
    """Columns of lines beside each other, `width` letters in all. Example: [["a b"], ["c"]], 5 -> "a  c", "b"."""
    each = max(1, (width + 2) // len(columns) - 2)
    wrapped = [[part for line in column for part in textwrap.wrap(line, each) or [""]] for column in columns]
    return "\n".join(
        "  ".join(cell.ljust(each) for cell in row).rstrip() for row in zip_longest(*wrapped, fillvalue="")
    )


def scores_of(scorer: tuple[ScalarModel, Tokenizer], question: Question, said: Sequence[Response]) -> list[float]:
    """The reward model's score of each response; it reads the text, because a teacher may have other tokens."""
    model, tokenizer = scorer
    prompts, texts = [tokenizer.chat(question.prompt)] * len(said), [tokenizer.response(r.text) for r in said]
    scores = score_responses(model, prompts, texts, micro_tokens=2**14)  # (models,)
    return replace_unfinished(scores, [r.finish for r in said], UNFINISHED_SCORE).tolist()


def main(cfg: Config) -> None:
    run = Path(cfg.run[0])
    runtime.require(len(cfg.run) == 1 and run.is_dir(), f"{' '.join(cfg.run)}: the folder of one run is expected")
    folders = folders_of(run)
    for name in [name for name, folder in folders.items() if not (folder / "config.json").is_file()]:
        print(f"no {name}: there is no model in {folders.pop(name)}")
    reward_folder = folders.pop("reward model", None)
    runtime.require(bool(folders), f"{run}: none of its models is there yet")
    models = {name: load(str(folder)) for name, folder in folders.items()}
    device = runtime.default_device()
    scorer = reward_folder and (load_scalar_model(reward_folder, torch.float32, device), Tokenizer(reward_folder))
    width = shutil.get_terminal_size().columns
    for question in questions_from(load_questions(run / "0_questions" / "test.jsonl")):
        print(f"\n{textwrap.fill(runtime.shown(question.question), width)}\n")
        try:
            said = [answer(*model, question, cfg.max_new_tokens) for model in models.values()]
        except ValueError as error:  # a question that is too long
            print(error)
            continue
        scores = scores_of(scorer, question, said) if scorer else [None] * len(said)
        print(side_by_side([column_of(*column, question) for column in zip(models, said, scores)], width))
        print(f"right: {question.answer}\n" if question.answer else "")


if __name__ == "__main__":
    runtime.launch(main, Config)
