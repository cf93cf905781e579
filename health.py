"""The numbers of ppo.py's metrics.jsonl: what each is, where it should be, and what it usually is when it is not.

    watch = Health(rollout_size=256, bf16=False)
    for line in watch.update(iteration, metrics):
        print("warning:", line)

A warning comes when a value leaves its range, and again only after it had come back. Most ranges are fixed numbers, in
RANGES; a few need the past (the entropy against its first value, the score against the accuracy) and stand below.
A warning is a question, not a verdict. One thing ends a run: a rollout and an update that disagree. docs/healthy.md
shows healthy and sick runs. Sources: arXiv 1707.06347, 1909.08593, 2210.10760, 2307.04964, 2403.17031; our own runs.
"""

import contextlib
import math
import textwrap
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import runtime
from model import masked_mean

INF = math.inf


class Range(NamedTuple):
    """From `low` to `high`, both healthy, from iteration `since` on. Causes: the likeliest first."""

    low: float
    high: float
    unit: str
    below: str = ""  # causes of a value under `low`
    above: str = ""  # causes of a value over `high`
    since: int = 0


DISAGREE = "the update and the rollout score the same tokens differently (temperature, mask, dropout, precision)"
TOO_FAR = "learning rate too high; too many epochs or minibatches; log-probs of other tokens than the sampled (a shift)"
OVERDONE = "kl_coef too low, too many iterations; a score that does not reach the policy (a shift)"

# Rollout and update read the first minibatch with the same weights, in the same micro-batches: where a device repeats
# itself, |ratio - 1| is 0. Else one may be far off in bf16: of 8 bits, a logit from 32 to 64 moves in steps of 0.25,
# a ratio of e^0.25 = 1.28. But few are: in micro-batches of another shape the worst was 0.08 and the mean 0.0002 (tiny
# preset), or 0.5 and 0.004 (logits up to 87). Bugs move all: at a temperature of 1 instead of 0.7 the mean
# is 0.008 to 0.018 (two tiny tasks; below 0.01 a run in bf16 goes on). |mean ratio - 1| does not see that: the mean of
# q / p is 1 over tokens that p has drawn.
MEAN_GAP, BF16_MEAN_GAP = 1e-5, 0.01  # the largest mean of |ratio - 1| in fp32, in bf16: more ends the run

CRITIC_LEARNS = 15  # iterations in which it may be wrong

# fmt: off
RANGES = {
    # does the update see the tokens as the rollout did?
    "val/ratio_first": Range(0.999, 1.001, "", DISAGREE, DISAGREE),
    "val/ratio_first_gap": Range(0, 0.001, "", above=DISAGREE),
    # how far does one iteration move the policy?
    "val/ratio": Range(0.9, 1.1, "", TOO_FAR, TOO_FAR),
    "val/ratio_max": Range(0, 50, "",
        above="learning rate too high; a token was sampled that the scored distribution hardly allows (temperature)"),
    "policy/approxkl_avg": Range(0, 0.5, "nats per token", above=TOO_FAR),
    "policy/clipfrac_avg": Range(0, 0.2, "of the tokens", above=TOO_FAR),
    "policy/grad_norm": Range(1e-6, 10, "",
        below="the advantages are all zero (the same score for every answer); frozen parameters",
        above="log-probs of rollout and update disagree; learning rate too high; one extreme score"),
    "critic/grad_norm": Range(0, 100, "",
        above="scores of a large scale (normalise them); critic learning rate too high"),
    # where has the policy gone?
    "objective/kl": Range(-0.05, 20, "nats per answer",
        below="what is scored is not what was sampled (a shift, top-k, temperature, a forced end token); a sign",
        above="kl_coef too low or of the wrong sign; learning rate too high; the reward model pays for nonsense"),
    "policy/entropy_avg": Range(0, INF, "nats per token", below="padding is counted, or a sign is wrong"),
    "val/eos_share": Range(0.9, 1, "of the answers",
        below="SFT data without the end token; the end token is masked out of the loss; max_new_tokens too small; "
        "learning rate too high"),
    # is there a signal?
    "objective/scores_std": Range(0.01, 10, "",
        below="every answer gets the same score: all are solved, or the scorer is broken",
        above="scores are not normalised: kl_coef, value_clip and unfinished_score do not fit their scale"),
    "val/advantages_std": Range(0.01, 10, "",
        below="nothing is left to learn, and whitening now blows noise up to the size of a signal",
        above="scores are not normalised, or the critic has diverged"),
    # does the critic predict the return?
    "val/explained_variance": Range(-0.5, 1, "", since=CRITIC_LEARNS,
        below="the score does not reach the returns (a shift, a mask); critic learning rate too high or too low; "
        "nearly all answers get the same score, and little is left to explain"),
    "val/clipfrac_avg": Range(0, 0.8, "of the tokens",
        above="value_clip too small for the scale of the scores; critic learning rate too high"),
}
# fmt: on
BF16 = {  # instead of those
    "val/ratio_first": Range(1 - BF16_MEAN_GAP, 1 + BF16_MEAN_GAP, "", DISAGREE, DISAGREE),
    "val/ratio_first_gap": Range(0, 0.3, "", above=DISAGREE),  # of the worst token
}


class Change(NamedTuple):
    """What only the past, or two values together, can tell: wrong(iteration, values now, first values)."""

    metric: str
    kind: str
    wrong: Callable[[int, dict, dict], bool]
    healthy: str
    causes: str


# fmt: off
CHANGES = [
    Change("objective/kl", "zero", lambda i, now, first: i > 0 and now["objective/kl"] == 0,
        "not exactly 0 after an update", "the reference is the policy itself, or nothing was updated (lr 0, frozen)"),
    Change("policy/entropy_avg", "collapse",
        lambda i, now, first: 0 <= now["policy/entropy_avg"] < 0.01 * first["policy/entropy_avg"],
        "1 % of the first or more", "the policy has settled on one answer per question; learning rate too high, "
        "kl_coef too low, too many iterations"),
    Change("response_length/mean", "longer",
        lambda i, now, first: now["response_length/mean"] > 3 * first["response_length/mean"],
        "up to 3 times the first", "the reward model likes length; the end token is masked out of the loss"),
    Change("response_length/mean", "shorter",
        lambda i, now, first: now["response_length/mean"] * 3 < first["response_length/mean"],
        "a third of the first or more", "the reward model likes short answers; kl_coef of the wrong sign; a discount "
        "per token (gamma below 1)"),
    Change("val/repeated", "more", lambda i, now, first: now["val/repeated"] > first["val/repeated"] + 0.3,
        "up to 0.3 more than at first", "one answer for every question, which the reward model likes; kl_coef too low; "
        "learning rate too high"),
    Change("objective/rlhf_reward", "falls", lambda i, now, first:
            0 < first["objective/scores_std"] < first["objective/rlhf_reward"] - now["objective/rlhf_reward"],
        "at most a standard deviation of the first scores below the first", "a sign (advantages, log-ratio, KL); "
        "learning rate too high; the score is on a token outside the mask"),
    Change("val/explained_variance_mse", "offset", lambda i, now, first:
            i >= CRITIC_LEARNS and now["val/explained_variance"] - now["val/explained_variance_mse"] > 0.3,
        "up to 0.3 below val/explained_variance", "the critic is off by a constant; returns that are not advantages + "
        "values (whitened too early), value_clip too small for the scores, critic learning rate too low"),
]
# fmt: on
ACCURACY_LOST = 0.05  # below the best so far, at two looks in a row, while the score
SCORE_LOST = 0.25  # has lost less than this since, in standard deviations of the first scores


# ---- what is measured ----------------------------------------------------------------------------------------------


def line(metrics: dict[str, float]) -> str:
    """An iteration on the screen. Example: "score +1.06 KL 1.4 length 41 valid 88 %", where it was measured."""
    told = f"score {metrics['objective/scores']:+.2f} KL {metrics['objective/kl']:.1f} "
    told += f"length {metrics['response_length/mean']:.0f}"
    return told + (f" valid {100 * valid:.0f} %" if (valid := metrics.get("valid/accuracy")) is not None else "")


def two_answers(r) -> str:
    """The answers with the lowest and the highest score of a rollout, for a screen of 80 columns."""
    text, form = [], {"width": 80, "subsequent_indent": " " * 8, "max_lines": 3, "placeholder": " ..."}
    for row in r.scores.argsort()[[0, -1]].tolist():
        asked, said = runtime.shown(r.questions[row].question), runtime.shown(r.texts[row])
        text.append(textwrap.fill(asked, initial_indent=f"{r.scores[row]:+7.2f} ", **form))
        text.append(textwrap.fill(f"> {said}", initial_indent=" " * 8, **form))
    return "\n".join(text)


def of_rollout(r, advantages: Tensor, kl_coef: float) -> dict[str, float]:
    """The rollout's metrics: per sequence where the name is objective/* or response_length/*, else over tokens."""
    kl = torch.where(r.mask, r.logprobs - r.ref_logprobs, 0.0).sum(1)  # (B,)
    raw = advantages[r.mask]  # (N,)
    lengths = r.mask.sum(1).float()  # (B,)
    return {
        "objective/scores": r.scores.mean().item(),
        "objective/scores_std": r.scores.std(correction=0).item(),
        "objective/scores_min": r.scores.min().item(),
        "objective/scores_max": r.scores.max().item(),
        "objective/kl": kl.mean().item(),
        "objective/kl_coef": kl_coef,
        "objective/non_score_reward": -kl_coef * kl.mean().item(),
        "objective/rlhf_reward": (r.scores - kl_coef * kl).mean().item(),
        "objective/entropy": -torch.where(r.mask, r.logprobs, 0.0).sum(1).mean().item(),
        "policy/entropy_avg": masked_mean(r.entropy, r.mask).item(),
        "val/advantages_mean": raw.mean().item(),  # before whitening
        "val/advantages_std": raw.std(correction=0).item(),
        "val/num_eos_tokens": int(r.ended.sum()),
        "val/eos_share": r.ended.float().mean().item(),
        "val/repeated": 1 - len({text for text in r.texts if text.strip()}) / len(r.texts),  # or empty
        "response_length/mean": lengths.mean().item(),
        "response_length/min": lengths.min().item(),
        "response_length/max": lengths.max().item(),
        "response_length/clip_ratio": 1 - r.ended.float().mean().item(),
        "tokens": sum(r.lengths),  # of prompts and responses, without padding
        "sampled": int(r.mask.sum()),
    }


def of_values(r, returns: Tensor) -> dict[str, float]:
    """How well the critic's values foretell the returns, over tokens."""
    values, targets = r.values[r.mask], returns[r.mask]  # (N,) each
    spread = targets.var(correction=0) + 1e-5
    return {
        # of the variance, blind to a constant offset; and of the squared error, which sees one
        "val/explained_variance": (1 - (targets - values).var(correction=0) / spread).item(),
        "val/explained_variance_mse": (1 - (targets - values).square().mean() / spread).item(),
        "val/values_mean": values.mean().item(),
        "val/returns_mean": targets.mean().item(),
    }


def ratios(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Sums over the True cells, and largest values, that say how far a policy has moved since its rollout."""
    log_ratio = (logprobs.detach() - old_logprobs)[mask].double()  # (N,)
    ratio = log_ratio.exp()
    sums = {"kl": 0.5 * log_ratio.square().sum(), "ratio": ratio.sum(), "ratio_squared": ratio.square().sum()}
    gap = (ratio - 1).abs()
    return sums | {"gap": gap.sum(), "max_ratio": ratio.max(), "max_gap": gap.max()}


def of_policy_steps(steps: list[dict]) -> dict[str, float]:
    """The policy's metrics of an update, means over all tokens of all steps."""
    tokens = sum(step["tokens"] for step in steps)
    mean = {name: sum(step[name] for step in steps) / tokens for name in steps[0]}
    return {
        "loss/policy_avg": mean["loss"],
        "policy/approxkl_avg": mean["kl"],
        "policy/clipfrac_avg": mean["clipped"],
        "val/ratio": mean["ratio"],
        "val/ratio_var": mean["ratio_squared"] - mean["ratio"] ** 2,
        "val/ratio_max": max(step["max_ratio"] for step in steps),
        # of the first step, when nothing was updated yet: the policy is the one that sampled
        "val/ratio_first": steps[0]["ratio"] / steps[0]["tokens"],
        "val/ratio_first_gap": steps[0]["max_gap"],
        "val/ratio_first_mean_gap": steps[0]["gap"] / steps[0]["tokens"],
        "policy/grad_norm": sum(step["grad_norm"] for step in steps) / len(steps),
    }


def of_critic_steps(steps: list[dict]) -> dict[str, float]:
    """The critic's metrics of an update, means over all tokens of all steps."""
    tokens = sum(step["tokens"] for step in steps)
    return {
        "loss/value_avg": sum(step["loss"] for step in steps) / tokens,
        "val/clipfrac_avg": sum(step["clipped"] for step in steps) / tokens,
        "critic/grad_norm": sum(step["grad_norm"] for step in steps) / len(steps),
    }


def show_samples(iteration: int, r) -> str:
    """The answers with the lowest, the middle and the highest score of a rollout, for samples.txt."""
    text = f"==== iteration {iteration}\n"
    for place, row in zip(("lowest", "middle", "highest"), r.scores.argsort()[[0, len(r.scores) // 2, -1]].tolist()):
        kl = (r.logprobs[row] - r.ref_logprobs[row])[r.mask[row]].sum()
        answer = r.texts[row].replace("\n", "\n> ")
        ended = "ended" if r.ended[row] else "cut off"
        text += f"---- {place} score {r.scores[row]:+.2f}, KL {kl:+.2f} nats, {ended}\n"
        text += f"{r.questions[row].prompt}\n> {answer}\n"
    return text + "\n"


# ---- what is healthy -----------------------------------------------------------------------------------------------


class Health:
    """Watches one run: `update` once per iteration returns the new warnings, a sentence each."""

    def __init__(self, rollout_size: int, past: Sequence[dict] = (), bf16: bool = False):
        self.first: dict[str, float] = {}  # the first value of each metric
        self.best_accuracy, self.score_at_best = -INF, INF
        self.worse = 0  # looks in a row at a lost accuracy and a kept score
        self.ranges, self.mean_gap = (RANGES | BF16, BF16_MEAN_GAP) if bf16 else (dict(RANGES), MEAN_GAP)
        # The KL is estimated from B answers and can come out negative: for a small true KL its standard error is
        # sqrt(2 KL / B), and KL minus four of these is never below -8/B.
        kl, eos = RANGES["objective/kl"], RANGES["val/eos_share"]
        self.ranges["objective/kl"] = kl._replace(low=min(kl.low, -8 / rollout_size))
        self.ranges["val/eos_share"] = eos._replace(low=min(eos.low, 1 - 2 / rollout_size))  # two may be cut by chance
        self.active: set[tuple[str, str]] = set()  # (metric, what is wrong) of the last iteration
        for row in past:  # what was said before an interruption is not said again
            self.update(row["step"], {name: value for name, value in row.items() if name != "step"})

    def check(self, iteration: int, metrics: dict[str, float]) -> None:
        """Print the new warnings. RuntimeError where rollout and update disagree about the same tokens."""
        if (gap := metrics["val/ratio_first_mean_gap"]) > self.mean_gap:
            raise RuntimeError(f"the ratios of the first minibatch are {gap:.2g} away from 1 in the mean: {DISAGREE}")
        for warning in self.update(iteration, metrics):
            print(textwrap.fill(f"warning: {warning}", 80, subsequent_indent="  "), flush=True)

    def update(self, iteration: int, metrics: dict[str, float]) -> list[str]:
        """Example: {"objective/kl": 31.2} -> ["objective/kl 31.2 nats per answer (healthy: -0.05 to 20): ..."]."""
        found = self._outside(iteration, metrics) | self._changed(iteration, metrics)
        for name, value in metrics.items():
            if math.isfinite(value):
                self.first.setdefault(name, value)
        new = [sentence for key, sentence in found.items() if key not in self.active]
        # what was not measured now is still as it was
        self.active = set(found) | {key for key in self.active if key[0] not in metrics}
        return new

    def _outside(self, iteration: int, metrics: dict[str, float]) -> dict[tuple[str, str], str]:
        """Values that are no number, or not in their fixed range."""
        found = {}
        for name, value in metrics.items():
            if not math.isfinite(value):
                causes = "learning rate too high; log of 0 or a mean of nothing; half precision without scaling"
                found[name, "finite"] = f"{name} is {value}: {causes}"
            elif name in self.ranges and iteration >= self.ranges[name].since:
                low, high, unit, below, above, _ = self.ranges[name]
                if not low <= value <= high:
                    span = f"{low:g} to {high:g}" if high < INF else f"{low:g} or more"
                    side, causes = ("below", below) if value < low else ("above", above)
                    found[name, side] = f"{name} {value:.4g}{unit and ' ' + unit} (healthy: {span}): {causes}"
        return found

    def _changed(self, iteration: int, metrics: dict[str, float]) -> dict[tuple[str, str], str]:
        """What CHANGES and over-optimisation look like now. A metric that is missing, or no number, is left out."""
        found = {}
        now = {name: value for name, value in metrics.items() if math.isfinite(value)}
        first = now | self.first
        for metric, kind, wrong, healthy, causes in CHANGES:
            with contextlib.suppress(KeyError):
                if wrong(iteration, now, first):
                    told = f"{metric} {now[metric]:.4g}, {first[metric]:.4g} at first (healthy: {healthy})"
                    found[metric, kind] = f"{told}: {causes}"
        if {"valid/accuracy", "objective/scores"} <= now.keys():
            accuracy, score = now["valid/accuracy"], now["objective/scores"]
            if accuracy > self.best_accuracy:
                self.best_accuracy, self.score_at_best = accuracy, score
            kept = score > self.score_at_best - SCORE_LOST * first.get("objective/scores_std", 0.0)
            self.worse = self.worse + 1 if kept and self.best_accuracy - accuracy >= ACCURACY_LOST else 0
            if self.worse >= 2:
                found["valid/accuracy", "over-optimised"] = (
                    f"valid/accuracy {accuracy:.1%}, it was {self.best_accuracy:.1%}, while objective/scores went from "
                    f"{self.score_at_best:.2f} to {score:.2f}: over-optimisation of the reward model ({OVERDONE})"
                )
        return found
