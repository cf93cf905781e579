"""What is measured, which values are healthy (borders, what needs the past), and when a warning comes again."""

import math
import re
from dataclasses import replace

import pytest
import torch

from data import Question
from health import (
    RANGES,
    Health,
    line,
    of_critic_steps,
    of_policy_steps,
    of_rollout,
    of_values,
    ratios,
    show_samples,
    two_answers,
)
from ppo import Rollout

NAN = math.nan

# ---- what is measured ----------------------------------------------------------------------------------------------

# answers of 2 and 1 tokens; NaN stands where nothing was sampled
MASK = torch.tensor([[False, True, True], [True, False, False]])
ROLLOUT = Rollout(
    tokens=torch.zeros(2, 4, dtype=torch.long), mask=MASK, lengths=[4, 2], scores=torch.tensor([1.0, -2.0]),
    ended=torch.tensor([True, False]), questions=[Question("a", "1+1?"), Question("b", "2+2?")], texts=["", "7\n8"],
    logprobs=torch.tensor([[NAN, -1.0, -2.0], [-4.0, NAN, NAN]]),
    ref_logprobs=torch.tensor([[NAN, -1.5, -2.5], [-2.0, NAN, NAN]]),
    values=torch.tensor([[NAN, 1.0, 2.0], [2.0, NAN, NAN]]),
    entropy=torch.tensor([[NAN, 0.3, 0.6], [0.9, NAN, NAN]]))  # fmt: skip


def test_the_rollouts_metrics_by_hand():
    """For returns [1, 2, 3] and values [1, 2, 2], 1 - var(R - V) / var(R) is .6667."""
    returns = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0, 0]])
    metrics = of_rollout(ROLLOUT, torch.tensor([[9.0, 1.0, 2.0], [6.0, 9, 9]]), 0.1)
    assert metrics | of_values(ROLLOUT, returns) == pytest.approx({
        "objective/scores": -0.5, "objective/scores_std": 1.5, "objective/scores_min": -2, "objective/scores_max": 1,
        "objective/kl": (1.0 - 2.0) / 2, "objective/kl_coef": 0.1, "objective/non_score_reward": 0.05,
        "objective/rlhf_reward": -0.5 + 0.05, "objective/entropy": (3.0 + 4.0) / 2, "policy/entropy_avg": 0.6,
        "val/explained_variance": 0.6667, "val/explained_variance_mse": 0.5, "val/values_mean": 5 / 3,
        "val/returns_mean": 2, "val/advantages_mean": 3, "val/advantages_std": (14 / 3) ** 0.5,
        "val/num_eos_tokens": 1, "val/eos_share": 0.5, "val/repeated": 0.5, "response_length/mean": 1.5,
        "response_length/min": 1, "response_length/max": 2, "response_length/clip_ratio": 0.5,
        "tokens": 6, "sampled": 3}, abs=1e-4)  # fmt: skip


def test_the_updates_metrics_are_means_over_its_tokens_by_hand():
    """Two steps of 3 and 1 tokens whose log-probs have moved by [.1, -.3, .2] and [-.1]."""
    old = torch.tensor([[-1.0, -2.0, NAN, -0.5, -3.0]])
    new = old + torch.tensor([[0.1, -0.3, 0.0, 0.2, -0.1]])
    masks = torch.tensor([[[True, True, False, True, False]], [[False, False, False, False, True]]])
    first, second = ({name: x.item() for name, x in ratios(new, old, mask).items()} for mask in masks)
    policy = [{"tokens": 3, "loss": 6.0, "clipped": 1, "grad_norm": 2.0} | first,
              {"tokens": 1, "loss": 2.0, "clipped": 1, "grad_norm": 4.0} | second]  # fmt: skip
    critic = [{"tokens": 3, "loss": 3.0, "clipped": 2, "grad_norm": 7.0},
              {"tokens": 1, "loss": 1.0, "clipped": 1, "grad_norm": 8.0}]  # fmt: skip
    ratio = [math.exp(x) for x in (0.1, -0.3, 0.2, -0.1)]
    mean = sum(ratio) / 4
    assert of_policy_steps(policy) | of_critic_steps(critic) == pytest.approx({
        "loss/policy_avg": 2.0, "policy/clipfrac_avg": 0.5, "policy/grad_norm": 3.0, "policy/approxkl_avg": 0.15 / 8,
        "loss/value_avg": 1.0, "val/clipfrac_avg": 0.75, "critic/grad_norm": 7.5,
        "val/ratio": mean, "val/ratio_var": sum((x - mean) ** 2 for x in ratio) / 4, "val/ratio_max": math.exp(0.2),
        "val/ratio_first": sum(ratio[:3]) / 3, "val/ratio_first_gap": 1 - math.exp(-0.3),
        "val/ratio_first_mean_gap": sum(abs(x - 1) for x in ratio[:3]) / 3}, rel=1e-5)  # fmt: skip


def test_the_samples_that_are_shown_by_hand():
    """The lowest, the middle and the highest score, each with the question, all of the answer and its KL."""
    shown = re.findall(r"(\w+) score (\S+), KL (\S+) nats, (ended|cut off)\n(.+)\n> (.*)\n", show_samples(4, ROLLOUT))
    low = ("-2.00", "-2.00", "cut off", "2+2?", "7")
    assert shown == [("lowest", *low), ("middle", "+1.00", "+1.00", "ended", "1+1?", ""),
                     ("highest", "+1.00", "+1.00", "ended", "1+1?", "")]  # fmt: skip


def test_an_iteration_is_a_line_and_two_answers_in_80_columns_by_hand():
    metrics = {"objective/scores": 1.056, "objective/kl": 1.44, "response_length/mean": 40.6}
    assert line(metrics) == "score +1.06 KL 1.4 length 41"
    assert line(metrics | {"valid/accuracy": 0.876}) == "score +1.06 KL 1.4 length 41 valid 88 %"
    assert two_answers(ROLLOUT).splitlines() == ["  -2.00 2+2?", "        > 7 | 8", "  +1.00 1+1?", "        >"]
    long = replace(ROLLOUT, texts=["a\x1b[2J " * 99] * len(ROLLOUT.texts))
    lines = two_answers(long).splitlines()
    assert len(lines) == 8 and max(map(len, lines)) <= 80 and "\x1b" not in "".join(lines)


# ---- what is healthy -----------------------------------------------------------------------------------------------

HEALTHY = {  # iteration 12 of a run of the tiny preset, rounded
    "objective/scores": 0.4, "objective/scores_std": 0.9, "objective/kl": 1.2, "objective/rlhf_reward": 0.34,
    "policy/entropy_avg": 0.1, "policy/approxkl_avg": 0.004, "policy/clipfrac_avg": 0.03, "policy/grad_norm": 0.5,
    "critic/grad_norm": 2.0, "val/clipfrac_avg": 0.1, "val/ratio": 1.0, "val/ratio_max": 3.0, "val/ratio_first": 1.0,
    "val/ratio_first_gap": 1e-6, "val/ratio_first_mean_gap": 1e-7, "val/explained_variance": 0.3,
    "val/explained_variance_mse": 0.2, "val/eos_share": 1.0, "val/advantages_std": 0.5, "val/repeated": 0.25,
    "response_length/mean": 40.0,
}  # fmt: skip


def warnings(*steps, rollout_size=256, start=20):
    """The new warnings of each step: healthy values but for the given ones, None leaves one out."""
    watch = Health(rollout_size)
    return [watch.update(start + i, {k: v for k, v in (HEALTHY | step).items() if v is not None})
            for i, step in enumerate(steps)]  # fmt: skip


@pytest.mark.parametrize(("name", "inside", "outside"), [
    ("objective/kl", 20.0, 20.01), ("objective/kl", -0.05, -0.051), ("val/ratio_first", 1.001, 1.0011),
    ("val/ratio_first", 0.999, 0.9989), ("val/ratio_first_gap", 0.001, 0.0011), ("val/ratio", 1.1, 1.11),
    ("val/ratio", 0.9, 0.89), ("val/ratio_max", 50, 51), ("policy/approxkl_avg", 0.5, 0.501),
    ("policy/clipfrac_avg", 0.2, 0.21), ("policy/grad_norm", 10, 11), ("policy/grad_norm", 1e-6, 0.0),
    ("critic/grad_norm", 100, 101), ("policy/entropy_avg", 0.0999, -0.001), ("val/eos_share", 0.993, 0.89),
    ("objective/scores_std", 0.01, 0.009), ("objective/scores_std", 10, 11), ("val/advantages_std", 0.01, 0.009),
    ("val/advantages_std", 10, 11), ("val/explained_variance", -0.5, -0.51),
    ("val/clipfrac_avg", 0.8, 0.81),
])  # fmt: skip
def test_a_warning_at_the_border_of_each_range(name, inside, outside):
    quiet, [line] = warnings({name: inside}, {name: outside})
    assert quiet == []
    cause = RANGES[name].below if outside < RANGES[name].low else RANGES[name].above
    assert cause and line.startswith(name) and f"{outside:.4g}" in line and cause in line


@pytest.mark.parametrize(("bf16", "gap", "mean"), [(False, 0.001, 1e-5), (True, 0.3, 0.01)])
def test_how_far_the_first_ratios_may_be_from_one_follows_the_precision(bf16, gap, mean, capsys):
    """The worst token's is a warning, the mean over all ends the run."""
    def told(**changes):
        changes = {f"val/ratio_first_{name}": value for name, value in changes.items()}
        Health(256, bf16=bf16).check(20, HEALTHY | changes)
        return capsys.readouterr().out

    assert told() == told(gap=gap, mean_gap=mean) == ""
    assert told(gap=gap * 1.01).startswith("warning: val/ratio_first_gap")
    with pytest.raises(RuntimeError, match="away from 1"):
        told(mean_gap=mean * 1.01)


def test_once_until_it_comes_back():
    sick, sicker = {"objective/kl": 30.0}, {"objective/kl": 60.0}
    assert [len(new) for new in warnings(sick, sicker, sick, {}, sick, {"objective/kl": -3.0})] == [1, 0, 0, 0, 1, 1]
    # not measured is not the same as come back
    assert [len(new) for new in warnings(sick, {"objective/kl": None}, sick)] == [1, 0, 0]
    # nor is going on after an interruption
    assert Health(256, [{"step": 19} | HEALTHY | sick]).update(20, HEALTHY | sick) == []
    # two values at once are two warnings, and one that stays does not silence the other
    assert [len(new) for new in warnings(sick, sick | {"val/ratio": 2.0}, {"val/ratio": 2.0})] == [1, 1, 0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["objective/kl", "response_length/mean", "val/seconds", "policy/entropy_avg"])
def test_no_number_is_a_warning_in_any_value_and_is_no_first_value(name, value):
    first, again, back = warnings({name: value}, {name: value}, {})
    assert [name in line and str(value) in line for line in first] == [True]
    assert (again, back) == ([], [])


def test_the_critic_has_fifteen_iterations():
    late = {"val/explained_variance": -2.0, "val/explained_variance_mse": -2.31}
    watch = Health(256)
    assert [len(watch.update(i, HEALTHY | late)) for i in range(17)] == [0] * 15 + [2, 0]


def test_a_constant_error_of_the_critic():
    """The variance is blind to it, the squared error is not."""
    quiet, [line], late = warnings({"val/explained_variance_mse": 0.01}, {"val/explained_variance_mse": -0.01},
                                   {"val/explained_variance": -0.01, "val/explained_variance_mse": -0.01})  # fmt: skip
    assert (quiet, late) == ([], [])
    assert line.startswith("val/explained_variance_mse -0.01") and "constant" in line


def test_small_rollouts_are_noisier():
    """KL from 8 answers may be -1 by chance, and 2 of 8 answers may be cut."""
    assert warnings({"objective/kl": -0.99, "val/eos_share": 0.75}, rollout_size=8) == [[]]
    assert [len(new) for new in warnings({"objective/kl": -1.01, "val/eos_share": 0.7}, rollout_size=8)] == [2]


def test_kl_of_exactly_zero_after_an_update():
    zero = {"objective/kl": 0.0}
    assert warnings(zero, {"objective/kl": 1e-9}, start=0) == [[], []]
    first, [line] = warnings(zero, zero, start=0)
    assert first == [] and "exactly 0" in line and "reference" in line


@pytest.mark.parametrize(("name", "healthy", "sick", "word"), [
    ("policy/entropy_avg", 0.0011, 0.0009, "collapse"), ("response_length/mean", 120.0, 121.0, "longer"),
    ("response_length/mean", 13.4, 13.3, "shorter"), ("val/repeated", 0.55, 0.56, "more"),
    ("objective/rlhf_reward", 0.34 - 0.89, 0.34 - 0.91, "falls"),
])  # fmt: skip
def test_against_the_first_value(name, healthy, sick, word):
    assert warnings({}, {name: healthy}) == [[], []]
    watch = Health(256)
    assert watch.update(0, HEALTHY) == []
    found = watch._changed(1, HEALTHY | {name: sick})
    assert list(found) == [(name, word)]
    assert watch.update(1, HEALTHY | {name: sick}) == list(found.values())
    assert watch.update(2, HEALTHY | {name: sick}) == []
    assert watch.update(3, HEALTHY) == []  # against the first value, not against the last one
    # the first value is the first that is a number
    assert [len(new) for new in warnings({name: math.nan}, {}, {name: sick})] == [1, 0, 1]


def test_score_up_accuracy_down_is_over_optimisation():
    def step(score, accuracy):
        return {"objective/scores": score, "valid/accuracy": accuracy}

    *quiet, [line] = warnings(step(0.1, 0.7), step(0.5, 0.9), step(0.6, 0.8), step(0.7, None), step(0.9, 0.84))
    assert quiet == [[]] * 4  # one look is noise, and what is not measured is no look
    assert line.startswith("valid/accuracy 84.0%, it was 90.0%, while objective/scores went from 0.50 to 0.90: over")
    up = step(0.5, 0.9)
    assert len(warnings(step(0.1, 0.7), up, *[step(0.28, 0.8)] * 2)[-1]) == 1  # a quarter of 0.9 is noise, too
    for later in ([step(0.27, 0.8)] * 3,  # both fall: not this
                  [step(0.6, 0.86)] * 3,  # 4 points are noise
                  [step(0.6, 0.8), step(0.6, 0.9)] * 2):  # it comes back  # fmt: skip
        assert not any(warnings(step(0.1, 0.7), up, *later))
