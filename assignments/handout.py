"""Export the handout: the project without the solutions, with public tests, the lab and what students should read.

    python assignments/handout.py ../handout                     # all exercises blank
    python assignments/handout.py ../week3 --only E12,E13,E14    # these blank, the others solved

The bodies of the exercises' functions become `raise NotImplementedError`; signatures and docstrings, the tasks, stay.
Copied is what FILES lists and nothing else: no git history, nothing compiled, no hidden test, no seeded bug. Then every
file is searched for lines of the solutions.
"""

import argparse
import ast
import shutil
import sys
from pathlib import Path

import exercises
from exercises import KIT, ROOT, Exercise

FILES = (  # pattern in the project -> folder or file in the handout
    ("train_all.sh", ""),
    ("presets/*.sh", "presets"),
    ("runtime/stages.sh", "runtime"),
    ("LICENSE", ""),
    ("requirements.txt", ""),
    ("pyproject.toml", ""),
    ("docs/pipeline.svg", "docs"),
    ("tasks/*.txt", "tasks"),
    ("weights/README.md", "weights"),
    ("weights/make.py", "weights"),
    ("weights/tiny-*/*config.json", "weights"),
    ("weights/tiny-*/tokenizer.json", "weights"),
    ("weights/tiny-*/model.safetensors", "weights"),
    ("assignments/public/*.py", "tests"),
    ("assignments/student/*.md", ""),
    ("assignments/lab/LAB.md", "lab"),
    ("assignments/lab/*/metrics.jsonl", "lab"),
    ("assignments/lab/*/samples.txt", "lab"),
    ("assignments/lab/*/curves.png", "lab"),
)
KINDS = (".py", ".md", ".txt", ".toml", ".sh", ".json", ".jsonl", ".svg")
SHORTEST = 12  # characters: a shorter line of a solution tells nothing


def export(out: Path, blank: list[Exercise]) -> list[Path]:
    """Write the handout into an empty folder and search it; returns its files. ValueError if a solution is in it."""
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: choose a new folder")
    for name, source in exercises.blanked(blank).items():
        _write(out / exercises.file_of(name), source)
    for pattern, folder in FILES:
        found = [path for path in sorted(ROOT.glob(pattern)) if path.is_file()]
        if not found:
            raise ValueError(f"the project has no {pattern}")
        for path in found:
            inner = path.parent.name if pattern.count("*/") else ""
            target = out / folder / inner / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    readme = (KIT / "STUDENT.md").read_text("utf-8")
    if readme.count("<!-- exercises -->") != 1:
        raise ValueError("STUDENT.md must say once <!-- exercises -->, where the table goes")
    _write(out / "README.md", readme.replace("<!-- exercises -->", table(blank)))
    files = sorted(path for path in out.rglob("*") if path.is_file())
    found = leaks(files, blank)
    if found:
        raise ValueError(f"the handout leaks: {found[0]}")
    return files


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def table(blank: list[Exercise]) -> str:
    """The exercises, as Markdown."""
    lines = ["| | what | function | points | hours |", "|---|---|---|---|---|"]
    for exercise in blank:
        names = ", ".join(f"`{name}`" for name in exercise.functions)
        place, numbers = f"{names} in `{exercise.file}`", f"{exercise.points:g} | {exercise.hours:g}"
        lines.append(f"| {exercise.id} | {exercise.title} | {place} | {numbers} |")
    return "\n".join(lines)


# ---- leaks ---------------------------------------------------------------------------------------------------------


def squeeze(line: str) -> str:
    """A line without spaces and without the remark behind its code."""
    return "".join(line.split("  # ")[0].split())


def secrets(blank: list[Exercise]) -> set[str]:
    """The lines of the solutions, squeezed, that stand nowhere else in the project's scripts."""
    sources = exercises.reference()
    lines = {
        squeeze(line)
        for exercise in blank
        for name in exercise.functions
        for line in exercises.body_lines(sources[Path(exercise.file).stem], name)
    }
    rest = exercises.blanked(exercises.load()).values()
    elsewhere = {squeeze(line) for source in rest for line in source.splitlines()}
    return {line for line in lines - elsewhere if len(line) >= SHORTEST}


def leaks(files: list[Path], blank: list[Exercise]) -> list[str]:
    """What must not be in these files: compiled or unknown ones, lines of solutions, whole statements of them."""
    hidden, found = secrets(blank), []
    for path in files:
        if path.suffix in (".safetensors", ".png"):
            continue
        if path.suffix not in KINDS and path.name != "LICENSE":
            found.append(f"{path}: no file of this kind belongs there")
            continue
        text = path.read_text(encoding="utf-8")
        for number, line in enumerate(text.splitlines(), 1):
            line = "".join(line.split())
            found += [f"{path}, line {number}: {secret}" for secret in hidden if secret in line]
        if path.suffix == ".py":  # the same statement in another layout
            written = {squeeze(ast.unparse(node)) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.stmt)}
            found += [f"{path}: {secret}" for secret in sorted(hidden & written)]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("out", type=Path, help="folder to write, new or empty")
    parser.add_argument("--only", default="", help="blank these alone, such as E7,E8 (default: all)")
    args = parser.parse_args()
    try:
        blank = exercises.chosen(args.only)
        files = export(args.out, blank)
    except (OSError, ValueError, LookupError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    names = ", ".join(exercise.id for exercise in blank)
    size = sum(path.stat().st_size for path in files) / 1e6
    print(f"{args.out}: {len(files)} files, {size:.1f} MB, {names} to be written; no line of a solution is in them")
    return 0


if __name__ == "__main__":
    sys.exit(main())
