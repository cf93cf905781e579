"""Each recorded worked answer, shortened to its calculation: ' ... she has 8 - 4 = 4 marbles. ...' -> '8 - 4'.

    python results/mawps-teacher/shorten.py [FOLDER]      # shots-*.jsonl.gz here -> calculations-*.jsonl.gz in FOLDER

The last calculation of an answer counts; where it takes up what an earlier one stated, that one stands in its place:
'38 - 4 = 34. So 34 + 15 = 49.' -> '(38 - 4) + 15'. An answer without a calculation is left as it is, and has no answer.
"""

import gzip
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from answers import extract_answer

NUMBER = r"\$?\(*-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)\)*"
STEP = re.compile(rf"(?<![\w.])({NUMBER}(?: ?[-+*/x×÷] ?{NUMBER})+)[ a-z$]{{0,25}}= ?\$?(-?\d[\d,]*(?:\.\d+)?|-?\.\d+)")


def calculation_of(text: str) -> str | None:
    """The calculation of a worked answer, None if there is none."""
    stated, last = {}, None  # result -> its calculation
    for step, result in STEP.findall(text):
        step = step.translate(str.maketrans("x×÷", "**/", "$,"))
        if step.count("(") != step.count(")"):
            step = re.sub("[()]", "", step)
        step = re.sub(r"\d+(?:\.\d+)?|\.\d+", lambda number: stated.get(float(number[0]), number[0]), step)
        step = re.sub(r"\s*([-+*/])\s*", r" \1 ", step).strip()
        if extract_answer(step, "calculation"):
            stated[float(result.replace(",", ""))], last = f"({step})", step
    return last


if __name__ == "__main__":
    here = Path(__file__).parent
    out = Path(sys.argv[1]) if sys.argv[1:] else here
    for path in sorted(here.glob("shots-*.jsonl.gz")):
        rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
        for row in rows:
            row["response"] = calculation_of(row["response"]) or row["response"]
            row["answer"] = extract_answer(row["response"], "calculation")
        target = out / path.name.replace("shots", "calculations")
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        target.write_bytes(gzip.compress(lines.encode(), mtime=0))  # the same bytes every time
        print(f"{target}: {len(rows)} answers, {sum(row['answer'] is not None for row in rows)} with a calculation")
