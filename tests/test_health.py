"""Which values are healthy: borders, what needs the past, when a warning comes and when it comes again."""

import importlib.util
import math
from pathlib import Path

import pytest

import health
from health import RANGES, Health

HEALTHY = {  # iteration 12 of a run of the tiny preset, rounded
    "objective/scores": 0.4, "objective/scores_std": 0.9, "objective/kl": 1.2, "objective/rlhf_reward": 0.34,
    "policy/entropy_avg": 0.1, "policy/approxkl_avg": 0.004, "policy/clipfrac_avg": 0.03, "policy/grad_norm": 0.5,
    "critic/grad_norm": 2.0, "val/clipfrac_avg": 0.1, "val/ratio": 1.0, "val/ratio_max": 3.0, "val/ratio_first": 1.0,
    "val/ratio_first_gap": 1e-6, "val/explained_variance": 0.3, "val/explained_variance_mse": 0.2,
    "val/eos_share": 1.0, "val/advantages_std": 0.5, "val/repeated": 0.25, "response_length/mean": 40.0,
}  # fmt: skip


def warnings(*steps, rollout_size=256, start=20):
    """The new warnings of each step: healthy values but for the given ones, None leaves one out."""
    watch = Health(rollout_size)
    return [watch.update(start + i, {k: v for k, v in (HEALTHY | step).items() if v is not None})
            for i, step in enumerate(steps)]  # fmt: skip


def test_a_healthy_run_is_silent():
    assert warnings({}, {}, {"valid/accuracy": 0.8}, {}) == [[], [], [], []]
    assert Health(8).update(0, {}) == []


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
    assert line.startswith(f"{name} {outside:.4g}") and "(healthy: " in line
    cause = RANGES[name].below if outside < RANGES[name].low else RANGES[name].above
    assert cause and line.endswith(f"): {cause}")


def test_every_finite_border_has_causes():
    for name, r in RANGES.items():
        assert r.low < r.high
        assert r.below or r.low == 0, f"{name}: no causes below {r.low}"
        assert r.above or r.high in (1, math.inf), f"{name}: no causes above {r.high}"


def test_the_sentence_has_value_unit_range_and_causes():
    [[line]] = warnings({"objective/kl": 31.2})
    assert line == ("objective/kl 31.2 nats per answer (healthy: -0.05 to 20): kl_coef too low or of the wrong sign; "
                    "learning rate too high; the reward model pays for nonsense")  # fmt: skip


def test_once_until_it_comes_back():
    sick, sicker = {"objective/kl": 30.0}, {"objective/kl": 60.0}
    assert [len(new) for new in warnings(sick, sicker, sick, {}, sick, {"objective/kl": -3.0})] == [1, 0, 0, 0, 1, 1]
    # not measured is not the same as come back
    assert [len(new) for new in warnings(sick, {"objective/kl": None}, sick)] == [1, 0, 0]
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
    assert line.startswith("val/explained_variance_mse -0.01, val/explained_variance 0.3 (healthy: up to 0.3 apart):")


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


def test_every_seeded_bug_fits_the_source():
    """bench/sick.py edits exact text: this says at once which bug the last change of a script has orphaned."""
    path = Path(health.__file__).resolve().parent / "bench" / "sick.py"
    spec = importlib.util.spec_from_file_location("sick", path)
    sick = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sick)
    clean = sick.sources(sick.BUGS["healthy"])
    for bug in sick.BUGS.values():
        texts = sick.sources(bug)
        assert {name for name in clean if texts[name] != clean[name]} == {file for file, *_ in bug.edits}
        for text in texts.values():
            compile(text, bug.what, "exec")
    drawn = {name for curve in sick.CURVES.values() for name in curve.bugs.split()}
    assert drawn <= set(sick.BUGS)
