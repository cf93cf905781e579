"""Pseudo-rewards without labels: the teacher's answers to a question vote, and who agrees with the winner is rewarded.

    python pseudo_reward.py --questions runs/try/0_questions/train.jsonl --teacher runs/try/1_teacher/samples.jsonl \\
        --student runs/try/3_student/samples.jsonl --out runs/try/4_pseudo_reward

Writes rewards.jsonl (every response with its 0/1 reward), sft.jsonl (the teacher's winning answers, for sft.py) and
pairs.jsonl (chosen and rejected, for reward.py). Plain Python: nothing here is a network. The signal is section 3 of
arXiv 2502.19557, 'majority voting for verifiable tasks'; ties, shares and pairs are our decisions, stated where they
are made. The gold answers of the questions are never read. A Sample is one response: `id` of its question, `source`
('teacher' or 'student'), `response`, `answer` (extracted, or None), `ended` (not cut off), `logprob`, `temperature`.
"""

import math
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import runtime
from runtime.files import write_jsonl
from runtime.flags import Count, Input, Questions, Share
from tasks import load_questions
from tasks.recorded import Sample, load_samples


def majority_vote(
    answers: Sequence[str | None], logprobs: Sequence[float | None] | None = None
) -> tuple[str | None, float]:
    """The most frequent answer and its share of *all* answers; (None, 0.0) without one.

    None (no answer found) never wins but counts in the share. A tie goes to the answer whose votes have the greater
    sum of `logprobs` (length-normalised, one per answer) if every answer has one, else nobody wins.
    Example: ['7', '8', '7', None] -> ('7', 0.5).
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return None, 0.0
    most = max(votes.values())
    tied = [answer for answer, count in votes.items() if count == most]
    if len(tied) > 1:
        if logprobs is None or None in logprobs:
            return None, 0.0
        weight = {a: math.fsum(lp for answer, lp in zip(answers, logprobs, strict=True) if answer == a) for a in tied}
        tied.sort(key=weight.__getitem__, reverse=True)
        if weight[tied[0]] == weight[tied[1]]:
            return None, 0.0
    return tied[0], most / len(answers)


def comparable(voters: Sequence[Sample]) -> bool:
    """Whether the log-probs of a tie are on one scale: all votes for the most frequent answers come from one model at
    one temperature. If not, a tie stays a tie."""
    votes = Counter(sample.answer for sample in voters if sample.answer is not None)
    most = max(votes.values(), default=0)
    return len({(s.source, s.temperature) for s in voters if votes[s.answer] == most}) == 1


def pseudo_rewards(samples: Sequence[Sample], vote: str) -> list[int]:
    """1 for a response that ended and whose answer is the vote, else 0. One number per sample, in order.

    Example: vote '7', answers '7', '8', None, and a '7' that was cut off -> [1, 0, 0, 0].
    """
    return [int(sample.ended and sample.answer == vote) for sample in samples]


def make_pairs(
    samples: Sequence[Sample], rewards: Sequence[int], most: int, rng: random.Random
) -> list[tuple[Sample, Sample]]:
    """Up to `most` (chosen, rejected) pairs of one question: reward 1 against reward 0, no two pairs alike.

    A response that was cut off is in no pair: PPO never shows one to the reward model. Pairs with a response of the
    student come first: its text is what the reward model will score in PPO. Which ones are taken is drawn by `rng`
    from all combinations, so a text that was sampled often is met often.
    Example: rewards [1, 0, 1], all ended, different texts, most 4 -> (0, 1) and (2, 1), in either order.
    """
    chosen = [sample for sample, reward in zip(samples, rewards, strict=True) if reward == 1]
    rejected = [sample for sample, reward in zip(samples, rewards) if reward == 0 and sample.ended]
    pairs = [(c, r) for c in chosen for r in rejected]
    rng.shuffle(pairs)
    pairs.sort(key=lambda pair: pair[0].source == pair[1].source == "teacher")  # stable: False comes first
    different = {}
    for c, r in pairs:
        different.setdefault((c.response, r.response), (c, r))
    return list(different.values())[:most]


def winners(samples: Sequence[Sample], rewards: Sequence[int], most: int, keep_duplicates: bool = False) -> list[str]:
    """Up to `most` texts of the teacher that won the vote: the SFT targets of one question.

    Different ones in the order of the samples, or, with keep_duplicates, as often as they were sampled: then imitation
    also copies how often the teacher answers in which way. Example: the teacher's a, b, a won -> [a, b], or [a, b, a].
    """
    won = [s.response for s, reward in zip(samples, rewards, strict=True) if reward == 1 and s.source == "teacher"]
    return (won if keep_duplicates else list(dict.fromkeys(won)))[:most]


def sft_targets(
    samples: Sequence[Sample], rewards: Sequence[int], most: int, keep_duplicates: bool, first: int
) -> list[str]:
    """Up to `most` winners, as evenly as can be of each temperature that the teacher was sampled at.

    The temperatures take turns, number `first` (modulo how many there are) begins. Example: of a, b at 0.7 and c, d at
    1.0, all of which won, most 3 -> [a, c, b] with first 0, [c, a, d] with first 1.
    """
    temperatures = list(dict.fromkeys(sample.temperature for sample in samples if sample.source == "teacher"))
    groups = []
    for t in temperatures:
        at_t = [reward * (sample.temperature == t) for sample, reward in zip(samples, rewards, strict=True)]
        groups.append(winners(samples, at_t, most, keep_duplicates))
    first %= len(groups) or 1
    texts = [text for turn in zip_longest(*groups[first:], *groups[:first]) for text in turn if text is not None]
    return (texts if keep_duplicates else list(dict.fromkeys(texts)))[:most]


# ---- the script ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Vote, reward, and pair the responses of teacher and student."""

    questions: Questions  # question set that was answered
    teacher: Input  # the teacher's samples or recorded responses, JSONL
    out: str  # folder for rewards.jsonl, sft.jsonl, pairs.jsonl
    student: Input = ""  # the student's samples, JSONL; none before the first SFT
    voters: str = "teacher"  # or both: the student's answers vote too
    min_share: Share = 0.0  # drop a question whose vote has a smaller share of the answers
    sft_per_question: Count = 4  # winning texts of the teacher kept for SFT
    sft_filter: bool = True  # --no-sft_filter, for comparison: the teacher's finished answers, whoever won the vote
    keep_duplicates: bool = False  # keep the same text as often as it was sampled, instead of once
    pairs_per_question: Count = 4  # a question's pairs share a total weight of 1
    lenient: bool = False  # read the last number or letter where no answer is stated
    seed: int = 0  # which pairs are drawn


@runtime.stage
def main(cfg: Config, stage: runtime.Stage) -> None:
    runtime.require(cfg.voters in ("teacher", "both"), f"--voters {cfg.voters}: 'teacher' or 'both'")
    questions = {question.id: question for question in load_questions(cfg.questions)}
    samples: dict[str, list[Sample]] = defaultdict(list)
    for source, path in (("teacher", cfg.teacher), ("student", cfg.student)):
        for sample in load_samples(path, source, questions, cfg.lenient) if path else []:
            samples[sample.id].append(sample)

    rng = random.Random(runtime.seed_of(cfg.seed, "pairs"))
    rewards_rows, sft_rows, pair_rows, kept = [], [], [], 0
    for i, (key, question) in enumerate(questions.items()):
        responses = samples[key]
        voters = [s for s in responses if cfg.voters == "both" or s.source == "teacher"]
        logprobs = [s.logprob for s in voters] if comparable(voters) else None
        vote, share = majority_vote([s.answer for s in voters], logprobs)
        elected = vote is not None and share >= cfg.min_share
        rewards = pseudo_rewards(responses, vote) if elected else [0] * len(responses)
        targets = rewards if cfg.sft_filter else [int(sample.ended) for sample in responses]
        sft_rows += [
            {"id": key, "prompt": question.prompt, "response": text}
            for text in sft_targets(responses, targets, cfg.sft_per_question, cfg.keep_duplicates, first=i)
        ]
        if not elected:
            continue
        kept += 1
        rewarded = [
            {"source": s.source, "response": s.response, "answer": s.answer, "reward": reward}
            for s, reward in zip(responses, rewards)
        ]
        rewards_rows.append({"id": key, "vote": vote, "share": round(share, 4), "responses": rewarded})
        pairs = make_pairs(responses, rewards, cfg.pairs_per_question, rng)
        asked = {"id": key, "prompt": question.prompt}
        pair_rows += [
            asked | {"chosen": c.response, "rejected": r.response, "weight": 1 / len(pairs)} for c, r in pairs
        ]
    runtime.require(kept > 0, f"no question kept: no vote of {len(questions)} reaches --min_share {cfg.min_share}")
    write_jsonl(stage.out / "rewards.jsonl", rewards_rows)
    write_jsonl(stage.out / "sft.jsonl", sft_rows)
    write_jsonl(stage.out / "pairs.jsonl", pair_rows)
    mean_share = sum(row["share"] for row in rewards_rows) / kept
    print(
        f"{kept} of {len(questions)} questions have a vote (mean share {mean_share:.2f}): "
        f"{len(sft_rows)} SFT examples, {len(pair_rows)} pairs"
    )
    counts = {"questions": len(questions), "kept": kept, "sft_examples": len(sft_rows), "pairs": len(pair_rows)}
    stage.finish(**counts, share_kept=kept / len(questions), mean_share=mean_share)


if __name__ == "__main__":
    runtime.launch(main, Config)
