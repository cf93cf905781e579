"""Temporary: one recipe of the reading task, from nothing to numbers on validation questions. See recipe.sh."""

import ast
import json
import os
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "weights"), str(ROOT / "bench")]

import numpy as np
import torch


def make(out, name, text, seed=0):
    import make

    changes = {k: ast.literal_eval(v) for k, v in (word.split("=") for word in text.split())}
    make.MODELS[name] = replace(make.MODELS[name], **changes)
    if torch.cuda.is_available():
        pretrain, make.sft.main = make.sft.main, lambda cfg: pretrain(replace(cfg, micro_tokens=65536))
    make.main(make.Config(out=out, work=out + "/work", only=name, seed=int(seed)))
    (Path(out) / f"{name}.json").write_text(json.dumps(asdict(make.MODELS[name])))


def questions(out, train, valid):
    from data import load_questions, write_jsonl

    for name, spec, n in (("train", "arith:train", int(train)), ("valid", "arith:valid", int(valid))):
        write_jsonl(Path(out) / f"{name}.jsonl", [asdict(q) for q in load_questions(spec, n)])


def rows(path):
    return [json.loads(line) for line in open(path)]


def winners(out, which):
    """sft.jsonl by the votes of 1_vote: the longest or the shortest winner of each question, twice."""
    texts = {}
    for row in rows(out + "/vote/sft.jsonl"):
        texts.setdefault(row["prompt"], []).append(row["response"])
    pick = max if which == "longest" else min
    with open(f"{out}/vote-{which}.jsonl", "w") as file:
        for prompt, found in texts.items():
            file.writelines([json.dumps({"prompt": prompt, "response": pick(found, key=len)}) + "\n"] * len(found))


def tenth(out):
    found = rows(out + "/vote/sft.jsonl")
    with open(out + "/vote-tenth.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in found[: len(found) // 10])


def length(out, sign):
    """PPO on a number that is not learned: the tokens of an answer, at the scale of the student's own."""
    import ppo

    lengths = torch.tensor([float(row["tokens"]) for row in rows(out + "/student/samples.jsonl")])

    def make_score(cfg, questions, desk):
        def by_length(questions, prompts, responses, texts):
            return int(sign) * (torch.tensor([float(len(r)) for r in responses]) - lengths.mean()) / lengths.std()

        return by_length, questions

    ppo.make_score = make_score
    name = "ppo-length" if int(sign) > 0 else "ppo-short"
    ppo.main(
        ppo.Config(policy=out + "/sft", questions=out + "/train.jsonl", out=f"{out}/{name}", iterations=int(os.environ.get("ITER", 20)),
                   rollout_size=128, max_new_tokens=96, temperature=0.7, kl_coef=0.1, batch_size=512, votes=out + "/rewards/rewards.jsonl")
    )


def judge(out):
    """The reward model on the SFT student's samples of validation questions: by kind of reading, and slips."""
    import runtime
    from data import Tokenizer, load_questions
    from model import load_scalar_model
    from quality import auc, correlation
    from readings import calculated, reading
    from reward import score_responses

    runtime.set_threads(torch.nn.Linear(1, 1))
    asked = {q.id: q for q in load_questions(out + "/valid.jsonl")}
    said = rows(out + "/valid-samples/samples.jsonl")
    tokenizer, model = Tokenizer(out + "/reward"), load_scalar_model(out + "/reward", torch.float32, torch.device("cpu"))
    with torch.no_grad():
        scores = score_responses(
            model,
            [tokenizer.chat(asked[r["id"]].prompt) for r in said],
            [tokenizer.response(r["response"]) for r in said],
            8192,
        ).tolist()
    by = {}
    for row, score in zip(said, scores):
        q, text = asked[row["id"]], row["response"]
        by.setdefault(row["id"], []).append(
            (reading(q.question, text), calculated(q.question, text), row["answer"] == q.answer, text.count("\n"), score, text)
        )
    pairs = {name: [] for name in ("equal", "right_wrong", "right_wrong_equal", "slip", "added", "left out", "twice", "other")}
    for group in by.values():
        group = list(dict.fromkeys(group))  # different texts
        for kind, calc, right, lines, score, _ in group:
            for kind2, calc2, right2, lines2, score2, _ in group:
                margin = score - score2
                if right and not right2:
                    pairs["right_wrong"].append(margin)
                    if lines == lines2:
                        pairs["right_wrong_equal"].append(margin)
                if kind == "right" and calc:
                    if kind2 == "right" and not calc2:
                        pairs["slip"].append(margin)
                    if kind2 != "right" and lines == lines2:
                        pairs["equal"].append(margin)
                    if kind2 in pairs:
                        pairs[kind2].append(margin)
    flat = [x for group in by.values() for x in group]
    found = {name: [round(float(np.mean(np.array(m) > 0)), 3), len(m)] if m else None for name, m in pairs.items()}
    found["auc"] = round(auc([x[4] for x in flat], [x[2] for x in flat]), 3)
    found["length_correlation"] = round(correlation([x[4] for x in flat], [len(x[5]) for x in flat]), 3)
    (Path(out) / "judge.json").write_text(json.dumps(found))


def summary(out):
    """result.json and one line: whatever is there by now."""
    from data import load_questions
    from readings import calculated, reading

    folder, result = Path(out), {}
    result["recipe"] = {p.stem: json.loads(p.read_text()) for p in folder.glob("*.json") if p.stem in ("teacher", "student-base")}
    asked = {q.id: q for q in load_questions(out + "/valid.jsonl")}
    result["accuracy"], result["greedy"] = {}, {}
    for path in sorted(folder.glob("eval/*/done.json")):
        name = path.parent.name
        found = rows(path.parent / "transcripts.jsonl")
        result["accuracy"][name] = round(100 * float(np.mean([r["correct"] for r in found])), 1)
        kinds, right, calc = Counter(), Counter(), Counter()
        for r in found:
            kind = reading(asked[r["id"]].question, r["response"])
            kinds[kind] += 1
            right[kind] += r["correct"]
            calc[kind] += calculated(asked[r["id"]].question, r["response"])
        # share, of which right, of which calculated right
        result["greedy"][name] = {
            k: [round(kinds[k] / len(found), 3), round(right[k] / kinds[k], 2), round(calc[k] / kinds[k], 2)] for k in kinds
        }
    if (folder / "rewards/rewards.jsonl").exists():
        gold = {q.id: q for q in load_questions(out + "/train.jsonl")}
        votes = rows(folder / "rewards/rewards.jsonl")
        result["votes"] = [len(votes), round(float(np.mean([v["vote"] == gold[v["id"]].answer for v in votes])), 3)]
        sft = rows(folder / "vote/sft.jsonl")
        by_text = {q.question: q for q in gold.values()}
        kinds = Counter(reading(r["prompt"], r["response"]) for r in sft)
        result["sft_winners"] = {k: round(n / len(sft), 3) for k, n in kinds.items()} | {
            "n": len(sft),
            "right": round(float(np.mean([r["response"].split()[-1] == by_text[r["prompt"]].answer for r in sft])), 3),
        }
    if (folder / "judge.json").exists():
        result["judge"] = json.loads((folder / "judge.json").read_text())
    result["seconds"] = {p.parent.name: round(json.loads(p.read_text())["seconds"]) for p in folder.glob("*/done.json")}
    (folder / "result.json").write_text(json.dumps(result, indent=1))
    a, j = result["accuracy"], result.get("judge", {})
    line = " ".join(f"{k}={v}" for k, v in a.items())
    for name in ("teacher", "sft", "ppo-k.1"):
        line += f" | {name} reads " + str(result["greedy"].get(name, {}).get("right"))
    print(f"{folder.name}: {line} | votes {result.get('votes')} | judge {j}")


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
