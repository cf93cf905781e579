"""Seeded bugs: every entry is a small change to a script, and a test that must fail because of it.

    python tests/mutants.py                  # all of them, in one process
    python tests/mutants.py --only ppo       # those whose file or name holds this text

A mutant is served by an import hook, so no file is changed; one of a shell script lies in the folder that $MUTANT
names, where the test that copies the scripts looks first. First the named tests must pass on the code as it is; then
each runs on its mutants, and a mutant under which all of them still pass has survived. Exit code 1 if one survives, or
if an entry no longer fits the code (its `old` text must occur exactly once).
"""

import argparse
import contextlib
import functools
import importlib.abc
import importlib.util
import io
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent


HOME = {  # where the tests of a file are, if not in the test file of its own name
    "folder": "model", "chunked": "model", "pictures": "report",
    "tokenizer": "chat", "template": "chat", "question": "data", "__init__": "data", "published": "data",
    "check": "data", "arith": "data", "recorded": "pseudo_reward",
    "handed_in": "assignments", "handout": "assignments", "exercises": "assignments"}


@dataclass(frozen=True)
class Mutant:
    """`new` instead of `old` in a file; one of `tests` (names without test_, or 'file::name') must fail."""

    file: str
    name: str
    old: str
    new: str
    tests: str

    @property
    def node_ids(self) -> list[str]:
        """Example: 'one test_eval::two' of model.py -> tests/test_model.py::test_one, tests/test_eval.py::test_two."""
        ids = []
        for test in self.tests.split():
            file, _, name = test.rpartition("::")
            stem = Path(self.file).stem
            ids.append(f"{TESTS / (file or 'test_' + HOME.get(stem, stem))}.py::test_{name}")
        return ids

    def source(self) -> str:
        """The script with the bug in it. ValueError if the entry no longer fits."""
        text = (ROOT / self.file).read_text(encoding="utf-8")
        if text.count(self.old) != 1:
            raise ValueError(f"{self.file}: {self.old!r} occurs {text.count(self.old)} times")
        return text.replace(self.old, self.new)


def by(test: str, entries: list[tuple]) -> list[tuple]:
    """Entries that the same test must catch."""
    return [(*entry, test) for entry in entries]


RUN = "a_whole_run_is_the_loop_that_is_written_out_here"

MUTANTS = [Mutant(file, *entry) for file, entries in {
    "ppo.py": [
        *by("the_score_enters_once_at_the_end_token_and_the_kl_at_every_token", [
            ("the KL is rewarded", "mask, -kl_coef *", "mask, kl_coef *"),
            ("KL as the squared difference", "(logprobs - ref_logprobs)", "0.5 * (logprobs - ref_logprobs) ** 2"),
            ("mean KL of the answer on every token", "(logprobs - ref_logprobs)",
             "masked_mean(logprobs - ref_logprobs, mask)"),
            ("the score on every token", "& (mask.flip(1).cumsum(1).flip(1) == 1)  #", " #"),
            ("the score on the first token", "flip(1).cumsum(1).flip", "cumsum")]),
        ("KL on prompt and padding", "torch.where(mask, -kl_coef * (logprobs - ref_logprobs), 0.0)",
         "-kl_coef * (logprobs - ref_logprobs)", "rewards_of_rows_of_different_length_and_with_a_prompt"),
        *by("gae_by_hand", [
            ("no discount by lambda", "lam * next_advantage", "next_advantage"),
            ("GAE from left to right", "reversed(range(values.shape[1]))", "range(values.shape[1])"),
            ("GAE bootstraps at the end", " = next_advantage =", ", next_advantage = values[:, -1],"),
            ("the value has the wrong sign in delta", "- values[:, t]  #", "+ values[:, t]  #"),
            ("the next value is the reward's", ", advantages[:, t]", ", delta"),
            ("the next value is never carried on", "next_value, next_advantage = values[:, t],", "next_advantage ="),
            ("returns without the values", "advantages + values", "advantages")]),
        *by("gae_does_not_see_the_padding", [
            ("values of the padding leak into GAE", "values = torch.where(mask, values, 0.0)\n    ", ""),
            ("advantages of the padding leak", "torch.where(mask[:, t], delta + gamma * lam * next_advantage, 0.0)",
             "delta + gamma * lam * next_advantage")]),
        *by("whitening_gives_mean_zero_and_biased_variance_one_over_the_mask", [
            ("whitening counts the padding",
             "mean = masked_mean(x, mask)\n    variance = masked_mean((x - mean).square(), mask)",
             "x = torch.where(mask, x, 0.0)\n    mean = x.mean()\n    variance = (x - mean).square().mean()"),
            ("whitening with the unbiased variance", "(), mask)", "(), mask) * mask.sum() / (mask.sum() - 1)"),
            ("whitening keeps the mean", "(x - mean) * torch", "x * torch"),
            ("whitening divides by the variance", ") * torch.rsqrt(", ") * 1 / ("),
            ("the variance is the mean square", "(x - mean).square", "x.square")]),
        ("whitening within each row", "masked_mean(x, mask)",
         "(torch.where(mask, x, 0.0).sum(1) / mask.sum(1).clamp(min=1))[:, None]",
         "a_bandit_converges_to_its_closed_form_optimum"),
        *by("clipped_surrogate_by_hand", [
            ("minimum of the two surrogates", "= torch.where(mask, torch.maximum",
             "= torch.where(mask, torch.minimum"),
            ("no clip", ".clamp(1 - clip, 1 + clip)", ""),
            ("clipped from above alone", "(1 - clip, 1 + clip)", "(max=1 + clip)"),
            ("the policy goes down the advantage", "-advantages * ratio, -", "advantages * ratio, "),
            ("the ratio turned round", "logprobs - old_logprobs", "old_logprobs - logprobs"),
            ("the ratio is detached", "exp()", "exp().detach() + 0 * logprobs")]),
        *by("a_whole_run_is_the_loop_that_is_written_out_here[reward_model]", [
            ("the policy is read twice", "reference, b.", "policy, b."),
            ("the answers of a rollout share their chances", ", iteration, i", ", iteration"),
            ("sampling ignores the seed", 'cfg.seed, "ppo",', '0, "ppo",'),
            ("one permutation for all epochs", '"minibatches", iteration, epoch', '"minibatches", iteration'),
            ("a minibatch too many", "math.ceil(n / cfg.min", "(n // cfg.min"),
            ("the learning rate is never set",
             "runtime.set_lr(adam, scale * cfg.lr)", "pass"),
            ("the critic learns at the policy's rate", "scale * cfg.critic_lr", "scale * cfg.lr"),
            ("no warm-up", ", cfg.warmup", ", 0"),
            ("one optimiser trains the policy twice", "critic_adam, r, iteration", "adam, r, iteration"),
            ("weight decay", "weight_decay=0.0,", "weight_decay=0.01,"),
            ("an epsilon that amplifies small gradients", "5, weight_decay=0.", "8, weight_decay=0."),
            ("the critic starts from nothing", "start or cfg.", "cfg."),
            ("the judge is the critic that is trained",
             "lora.as_it_started(critic) if start == cfg.reward_model and not new_head else None", "critic"),
            ("the models are in bf16", "runtime.trained_dtype(cfg.lora)", "torch.bfloat16"),
            ("questions are never shuffled", 'steps.permutation(n, cfg.seed, "questions", epoch)', "range(n)"),
            ("KL with the sign of a bonus in the loop", "logprobs, r.ref_logprobs", "ref_logprobs, r.logprobs"),
            ("gamma and lambda swapped", "cfg.gamma, cfg.lam", "cfg.lam, cfg.gamma"),
            ("advantages are not whitened", "whiten(advantages, r.mask)", "advantages"),
            ("returns are whitened too", "=returns", "=whiten(returns, r.mask)"),
            ("held-out questions are trained on", ".questions", ".valid or cfg.questions"),
            ("the reference is saved for the policy", ".save(policy,", ".save(reference,"),
            ("what was read is that of other rows", "rows, : T -", ": len(rows), : T -"),
            ("total counts the padding", "int(r.mask[rows].sum())\n", "r.mask[rows].numel()\n"),
            ("advantages of other rows", "b.advantages", "r.advantages[: len(rows), : b.mask.shape[1]]"),
            ("the update's critic has seen the token",
             "values = masked_values(critic, b.tokens, b.mask)", "values = critic(b.tokens)[:, 1:]"),
            ("the critic learns whitened advantages", "returns, b.mask", "advantages, b.mask"),
            ("one epoch whatever is asked", "in range(epochs)", "in range(1)"),
            ("new log-probs without the temperature", "_ = masked_logprobs(policy, b.tokens, b.mask, cfg",
             "_ = masked_logprobs(policy, b.tokens, b.mask, 1.0 or cfg"),
            ("old log-probs are recomputed", "b.logprobs, b.advantages", "logprobs.detach(), b.advantages"),
            ("the ratio is to the reference", "logprobs, b.advantages", "ref_logprobs, b.advantages"),
            ("old values are recomputed", "b.values, b", "values.detach(), b"),
            ("the reference is the policy itself",
             "ranks.shard(load_model(cfg.policy, dtype, device).requires_grad_(False))", "policy")]),
        ("no guard of the ratio", "clamp(-20, 20).exp", "exp", "an_absurd_ratio_stays_finite"),
        *by("poison_in_masked_cells_changes_neither_loss_nor_gradient", [
            ("the policy's loss counts the padding", "= torch.where(mask, torch.maximum(plain, clipped), 0.0)",
             "= torch.maximum(plain, clipped)"),
            ("the critic's padding holds NaN",
             "values, old_values, returns = (torch.where(mask, x, 0.0) for x in (values, old_values, returns))  # "
             "(B, T-1) each\n    near", "near")]),
        *by("clipped_value_loss_by_hand", [
            ("minimum of the two value errors", "* torch.where(mask, torch.maximum",
             "* torch.where(mask, torch.minimum"),
            ("the value clip is forgotten", "old_values + (values - old_values).clamp(-clip, clip)", "values"),
            ("the value clip one-sided", "-clip, clip)  # (B", "max=clip)  # (B"),
            ("the value loss without its half", "loss = 0.5 * torch", "loss = torch"),
            ("the value clip around 0", "old_values + (values - old_values)", "values"),
            ("the critic learns the old value", "returns).square(), (near - returns",
             "old_values).square(), (near - old_values")]),
        *by("flags_of_memory_change_no_result", [
            ("the policy's loss divides by the micro-batch", "cfg.clip, total)", "cfg.clip, int(b.mask.sum()))"),
            ("the critic's loss divides by the micro-batch", "value_clip, total)", "value_clip, int(b.mask.sum()))")]),
        *by("the_log_probs_are_those_of_the_tempered_softmax_that_was_sampled", [
            ("sampled at another temperature than scored", ", cfg.temperature,", ", 1.0,"),
            ("old log-probs without the temperature", ", cfg.temperature)  # (b, T'-1), (", ")  # (b, T'-1), ("),
            ("the reference without the temperature", "reference, b.tokens, b.mask, cfg.temperature",
             "reference, b.tokens, b.mask"),
            ("the longest text of some rows loses its last token", "row in rows)", "row in rows) - 1")]),
        ("read in other micro-batches than learned in", "reader, r.mask, batches)", "reader, r.mask)",
         "in_bf16_a_healthy_run_is_silent"),
        ("the critic has seen the token", "masked_values(critic, b.tokens, b.mask)[None]",
         "(critic(b.tokens)[:, 1:] * b.mask)[None]", "a_value_has_seen_the_tokens_before_its_own_and_no_other"),
        ("rollouts of two iterations share their chances", ", iteration, i", ", i",
         "nothing_in_a_rollout_carries_a_gradient_and_its_iteration_repeats_it"),
        *by("the_rollout_mask_is_the_sampled_tokens_with_the_end_token_and_nothing_after_it", [
            ("what ended was cut, and the other way round", '== "stop" for finish in', '!= "stop" for finish in'),
            ("the end token is cut off before scoring and training", "s.tokens", "s.tokens[:-1] or s.tokens")]),
        *by("the_judge_sees_what_was_said_and_unfinished_answers_get_their_own_score", [
            ("unfinished answers keep their score", "replace_unfinished(scores, finishes, cfg.unfinished_score).to",
             "scores.to"),
            ("answers are judged by the questions of others", "= score(questions", "= score(questions[::-1]")]),
        *by("test_lora::reference_and_judge_stay_while_policy_and_critic_learn[fp32]", [
            ("the reference has its adapters on", "lora.as_it_started(policy) or", "policy or"),
            ("the judge has its adapters on", "lora.as_it_started(critic) if", "critic if")]),
        ("another network's judge", "if start == cfg.reward_model and not new_head else None", "",
         "test_lora::the_judge_may_be_another_or_none[critic]"),
        ("a judge of zeros", " and not new_head else", " else", "the_critic_may_start_at_zero_and_the_judge_stays[2]"),
        ("values never start at zero", "if cfg.zero_values or not start", "if not start",
         "the_critic_may_start_at_zero_and_the_judge_stays"),
        ("the critic of the flag is ignored", "critic or cfg.reward_model", "reward_model or cfg.critic",
         "the_critic_may_start_from_another_reward_model_than_the_judge"),
        ("the critic without a reward model is random", 'new_head = "zero"', 'new_head = "normal"',
         "a_whole_run_is_the_loop_that_is_written_out_here[votes]"),
        *by("every_question_comes_once_before_any_comes_again", [
            ("the order of the questions repeats", '"questions", epoch', '"questions"'),
            ("the order of the questions ignores the seed", 'n, cfg.seed, "q', 'n, 0, "q'),
            ("the same questions in every iteration", "iteration * cfg.rollout_size", "0"),
            ("every rollout begins with a pass", "start % n :][: cfg", ": cfg"),
            ("a rollout ends with its pass", "(start + cfg.rollout_size - 1)", "start")]),
        ("a broken judge goes on",
         "        steps.require_finite(metrics)  #", "        pass  #",
         "nan_stops_before_the_step_and_keeps_the_last_good_policy"),
        *by("now_and_then_held_out_questions_are_asked_and_samples_shown", [
            ("held-out questions are asked after the update", "= 0 or iteration =", "= 1 or iteration ="),
            ("held-out answers without an end keep their score",
             "replace_unfinished(scores, finishes, cfg.unfinished_score).mean", "scores.mean")]),
    ],
    "health.py": [
        *by("the_rollouts_metrics_by_hand", [
            ("the KL per token", ".0).sum(1)  # (B,", ".0).mean(1)  # (B,"),
            ("the penalty is added in the log", "scores - kl_coef *", "scores + kl_coef *"),
            ("explained variance of the values' own variance", "spread = targets.", "spread = values."),
            ("both explained variances are blind to an offset", ".square().mean()", ".var(correction=0)"),
            ("empty answers differ", "texts if text.strip()", "texts")]),
        ("padding costs FLOPs", '"tokens": sum(r.lengths)', '"tokens": r.tokens.numel()',
         "test_ppo::what_a_run_costs_is_of_real_tokens_and_not_of_padding"),
        *by("the_updates_metrics_are_means_over_its_tokens_by_hand", [
            ("the mean ratio is watched", 'steps[0]["gap"] / steps[0]["tokens"]',
             'abs(steps[0]["ratio"] / steps[0]["tokens"] - 1)'),
            ("a ratio far below 1 is no gap", "(ratio - 1).abs()", "ratio - 1"),
            ("variance of the ratio without its mean", ' - mean["ratio"] ** 2', ""),
            ("the value loss is a mean over steps", 'tokens,\n        "val', 'len(steps),\n        "val')]),
        ("the highest score is shown as the lowest", "argsort()[[0, len", "argsort(descending=True)[[0, len",
         "the_samples_that_are_shown_by_hand"),
        *by("an_iteration_is_a_line_and_two_answers_in_80_columns_by_hand", [
            ("the highest answer first", "argsort()[[0, -1]]", "argsort()[[-1, 0]]"),
            ("an answer obeyed by the terminal", "said = runtime.shown(r.questions[row].question), runtime.shown(",
             "said = runtime.shown(r.questions[row].question), (")]),
        ("the ratio is not watched", "MEAN_GAP = 1e-5, 0.01", "MEAN_GAP = 1e-5, 1.0",
         "test_ppo::an_update_that_disagrees_with_its_rollout_is_an_error"),
        *by("how_far_the_first_ratios_may_be_from_one_follows_the_precision", [
            ("the worst token ends the run", 'metrics["val/ratio_first_mean_gap"]', 'metrics["val/ratio_first_gap"]'),
            ("fp32 is as rough as bf16, and bf16 as exact as fp32", "if bf16 else", "if not bf16 else")]),
        *by("a_warning_at_the_border_of_each_range", [
            ("a border is sick", "<= value <= high:", "< value < high:"),
            ("causes of the other side", "value < low else", "value > low else")]),
        ("the critic's offset counts at once", "i >= CRITIC_LEARNS and now", "now",
         "the_critic_has_fifteen_iterations"),
        *by("once_until_it_comes_back", [
            ("a warning comes in every iteration", "() if key not in self.active", "()"),
            ("what is not measured has come back", " | {key for key in self.active if key[0] not in metrics}", ""),
            ("a run that goes on warns again", "past:  # what was", "():  # what was")]),
        ("NaN is healthy", "not math.isfinite(value)", "False",
         "no_number_is_a_warning_in_any_value_and_is_no_first_value"),
        *by("against_the_first_value", [
            ("compared with the last value", ".setdefault(name, value)", "[name] = value"),
            ("NaN is a first value", "if math.isfinite(value):", "if True:"),
            ("a collapse of the entropy in nats", '01 * first["policy/entropy_avg"]', "01"),
            ("repeated answers without those at first", 'first["val/repeated"] + 0', "0"),
            ("a fall of the reward in its own unit", '0 < first["objective/scores_std"]', "1")]),
        ("small rollouts are as sure of the KL", "min(kl.low, -8 / rollout_size)", "kl.low",
         "small_rollouts_are_noisier"),
        ("a KL of 0 before any update", ": i > 0 and now", ": now", "kl_of_exactly_zero_after_an_update"),
        *by("score_up_accuracy_down_is_over_optimisation", [
            ("one bad look is over-optimisation", "if self.worse >= 2", "if self.worse >= 1"),
            ("the score must not fall at all", ' - SCORE_LOST * first.get("objective/scores_std", 0.0)', "")]),
    ],
    "reward.py": [
        ("any number of scores will do", "scores.shape == (len(texts),)", "True",
         "a_reward_may_be_the_users_own_function"),
        ("the loss overflows", "F.logsigmoid(chosen - rejected)", "torch.log(torch.sigmoid(chosen - rejected))",
         "a_hopeless_margin_has_a_finite_loss_and_a_full_gradient"),
        ("the loss has the wrong sign", "return -", "return ", "loss_and_gradient_of_one_pair"),
        *by("weights_make_questions_count_alike", [
            ("the sum over pairs", "() / weight.sum()", "()"),
            ("the mean over pairs ignores the weights below", "() / weight.sum()", "() / len(weight)"),
            ("the weights are ignored", "(F.logsigmoid(chosen - rejected) * weight).sum() / weight.sum",
             "F.logsigmoid(chosen - rejected).mean")]),
        *by("held_out_questions_are_a_share_of_the_different_ids_whatever_their_order", [
            ("held out by Python's hash", "hashlib.sha256(key.encode()).hexdigest()", "key"),
            ("held out by pair", "set(ids), key=", "ids, key=")]),
        ("held-out pairs are trained on too",
         '(held_out if row["id"] in measuring else train).append(Pair(*texts, float(weight)))',
         'train.append(Pair(*texts, float(weight)))\n        if row["id"] in measuring:\n            '
         'held_out.append(train[-1])', "held_out_questions_measure_and_do_not_train"),
        *by("chosen_outscores_rejected_on_questions_that_were_not_trained", [
            ("held out and trained swapped", 'held_out if row["id"] in measuring else train',
             'train if row["id"] in measuring else held_out'),
            ("rejected in the place of chosen", 'chosen"]), tokenizer.response(row["rejected',
             'rejected"]), tokenizer.response(row["chosen'),
            ("without the end token", 'response(row["chosen"]), tokenizer.response',
             'encode(row["chosen"]), tokenizer.encode')]),
        *by("a_whole_run_is_the_loop_that_is_written_out_here", [
            ("the weights of the pairs are not read", ", float(weight)", ", 1.0"),
            ("the new head is zero", 'new_head="normal",', 'new_head="zero",'),
            ("weight decay", ", weight_decay=0.0", ", weight_decay=0.1"),
            ("only the head is trained", "parameters(),", "score.parameters(),"),
            ("the same order in every epoch", "step, len", "step % (total_steps // cfg.epochs), len"),
            ("the order ignores the seed", 'cfg.seed, "reward"', '0, "reward"'),
            ("the learning rate is never set",
             "        runtime.set_lr(adam, cfg.lr * runtime.lr_at(step, total_steps, cfg.warmup))\n", ""),
            ("mean of the micro-batches' means", "weight.sum() / total", "len(rows) / len(batch)"),
            ("a micro-batch sees the first pairs again", "train[i] for i in rows",
             "train[i] for i in batch[: len(rows)]"),
            ("scores read at the padding", "model(tokens, keep=last_token(ends, tokens.shape[1])).",
             "model(tokens)[:, -1]."),
            ("calibrated on the first samples", "[samples[i] for i in order]", "samples[: cfg.calibration_samples]"),
            ("bf16 weights", "runtime.trained_dtype(cfg.lora), device, new_head", "torch.bfloat16, device, new_head"),
            ("confidence at the calibrated scale", "), std", "), 1.0"),
            ("cut-off responses calibrate", ' and row["finish"] == "stop"', ""),
            ("calibrated without the end token", "[tokenizer.response", "[tokenizer.encode"),
            ("the deviation is unbiased", "std(correction=0).", "std()."),
            ("the scale is forgotten", "weight /= std.to(weight.device)", "pass"),
            ("the mean is that before the scale", "(scores.mean() / std)", "scores.mean()"),
            ("the mean is forgotten", "    model.score_mean = (scores.mean() / std).item()\n", "")]),
        ("responses are scored at the padding", "model(tokens, keep=last_token(ends, tokens.shape[1]))[",
         "model(tokens)[:, -1][",
         "padding_and_tokens_after_the_end_do_not_change_a_score"),
        ("a constant model becomes infinite", ".clamp(min=1e-6)", "", "a_constant_reward_model_stays_finite"),
        *by("without_a_reward_model_an_answer_scores_plus_or_minus_one", [
            ("votes and answers are opposites", "torch.tensor(right) * 2.0 - 1", "1.0 - torch.tensor(right) * 2"),
            ("a wrong answer costs nothing", ") * 2.0 - 1.0  # (", ") * 1.0  # ("),
            ("lenient is ignored", ".kind, cfg.lenient", ".kind"),
            ("questions without a known answer are asked", " if question.id in truth", "")]),
        *by("test_eval::best_of_n_never_chooses_what_was_cut_off_for_its_score", [
            ("unfinished answers keep their score", "where(ended, scores, unfinished_score)", "clone(scores)"),
            ("finished answers lose their score", "where(ended, scores, unf", "where(~ended, scores, unf"),
            ("an unfinished answer is two deviations above", "where(ended, scores, unf", "where(ended, scores, -unf")]),
        ("adapters cost as much as all weights", "(4 if cfg.lora else 6)", "6",
         "test_lora::sft_and_the_reward_model_learn_in_adapters_and_save_a_whole_model"),
    ],
    "quality.py": [
        *by("test_eval::a_judge_is_compared_with_gold", [
            ("right and wrong answers swapped", "[good] - flat[bad]", "[bad] - flat[good]"),
            ("any right is the share", "right.any(1).mean", "right.mean")]),
        ("confidence of the saved scores", "[bad], scale", "[bad]",
         "test_eval::confidence_is_that_of_the_margin_that_was_trained"),
        *by("auc_is_the_share_of_pairs_in_the_right_order_ties_half", [
            ("AUC of the wrong answers", "right], np.sort(scores[~", "~right], np.sort(scores["),
            ("ties lose in the AUC", 'np.searchsorted(bad, good, "left") + np.searchsorted(bad, good, "right")',
             '2 * np.searchsorted(bad, good, "left")')]),
        ("a tie is right", "(margin > 0) + tie * (margin == 0)", "margin >= 0", "pair_accuracy_by_hand"),
        *by("calibration_error_is_the_gap_of_confidence_and_accuracy_by_bin", [
            ("confidence of the signed margin", "(-np.abs(margin))", "(-margin)"),
            ("gaps of two bins cancel", "np.abs(gaps).sum()", "abs(gaps.sum())")]),
        ("correlation of the raw products", "- np.mean(np.asarray(values, float)) for", "for",
         "correlation_is_that_of_numpy_and_0_of_a_constant"),
        ("the calibrated scale for confidence", "(scale * margin),", "(margin),", "the_quality_of_pairs_by_hand"),
        ("equal lengths by the shorter one", "* np.maximum", "* np.minimum",
         "equal_length_is_a_share_of_the_longer_one"),
        ("samples of other questions are paired", ", question * right.shape[1]", ", i * 0",
         "pairs_are_of_one_right_and_one_wrong_sample_of_the_same_question"),
    ],
    "bench/judge.py": [
        ("the worst of n", "argsort(scores)", "argsort(-np.asarray(scores))",
         "../bench/tests/test_judge::the_best_threshold_is_the_best_of_all_that_there_are"),
        ("subsets with replacement", "math.comb(i, n - 1) / math.comb(n_samples, n)",
         "((i + 1) ** n - i**n) / n_samples**n", "../bench/tests/test_judge::best_of_n_is_the_mean_over_all_subsets"),
        ("silence may win the vote", "answer is not None", "1", "../bench/tests/test_judge::majority_by_hand"),
        ("calibration of the scores as they are", "scale *", "1.0 *",
         "../bench/tests/test_judge::a_run_is_judged_at_the_scale_that_was_trained"),
    ],
    "bench/readings.py": [
        *by("../bench/tests/test_readings::readings_by_hand", [
            ("a day that is named may be invented", "day not in named and not more", "not more"),
            ("any line that is too much is an addition", " and (event in asked or event[0] not in named)", ""),
            ("lines need not follow from each other", "if a != now or", "if"),
            ("the last line is not compared", "int(LAST.search(answer)[1]) == now", "True"),
            ("any result is right", "or int(after) != right", "")]),
        *by("../bench/tests/test_readings::pairs_in_order_by_hand", [
            ("the judge is right where it is wrong", "scores[:, None] > lower", "scores[:, None] < lower"),
            ("a slip is a right reading", ' == "right" and row["calculated"]]', ' == "right"]'),
            ("answers to any questions", "(same, same & equal, equal)", "(same, equal, equal)"),
            ("slips of misreadings", 'row["kind"] == "right" and not row', "not row")]),
        ("unknown numbers are 0", "[value for value in found if value is not None]", "[value or 0 for value in found]",
         "../bench/tests/test_readings::over_seeds_what_is_not_known_does_not_count"),
        ("the share of all of what is right", "for row in found) for kind", "for row in rows) for kind",
         "../bench/tests/test_readings::a_run_is_sampled_scored_and_read"),
    ],
    "bench/pays.py": [
        *by("../bench/tests/test_pays::the_rewards_are_compared_by_hand", [
            ("the worst KL coefficient", "return max(there", "return min(there"),
            ("the best start", '"valid/accuracy")[:, -1]', '"valid/accuracy")[:, 0]'),
            ("raw ahead of learned", "for row in learned - raw", "for row in raw - learned"),
            ("one answer each as all", 'else mean(kept)', "else mean(kept) / 10")]),
        ("whatever the iterations", "len(looks) == 1", "len(looks) > 0",
         "../bench/tests/test_pays::looks_at_other_iterations_are_refused"),
        *by("../bench/tests/test_pays::fewer_votes_are_whole_questions_drawn_by_the_seed_and_nested", [
            ("the first questions of the file", "steps.permutation(len(voted), cfg.seed, \"votes\")",
             "range(len(voted))"),
            ("every seed has the same votes", "cfg.seed, \"votes\"", "0, \"votes\""),
            ("all pairs are kept", 'if row["id"] in kept]', 'if row["id"] in kept or name[0] == "p"]')]),
        ("the last answer of a question", "first.setdefault(row[\"id\"], row)", "first[row[\"id\"]] = row",
         "../bench/tests/test_pays::one_answer_of_each_question_is_its_first"),
    ],
    "bench/overoptimise.py": [
        *by("../bench/tests/test_pays::the_climb_is_the_root_of_the_mean_kl", [
            ("the KL for its root", "np.sqrt(np.maximum", "(np.maximum"),
            ("a KL below 0", ', 0), 0))', ', 0), -9))'),
            ("every look of one seed", 'np.mean(row["kl"], 0)', 'np.array(row["kl"])[0]')]),
    ],
    "bench/controls.py": [
        *by("../bench/tests/test_controls::a_longer_answer_is_worth_more_and_the_scale_is_the_rollouts", [
            ("length is a fault", "(lengths - lengths.mean())", "(lengths.mean() - lengths)"),
            ("brevity is length", "return -longer(", "return longer("),
            ("the scale of tokens", " / lengths.std(correction=0).clamp(min=1.0)", "")]),
        *by("../bench/tests/test_controls::one_winner_stands_for_all_of_its_question", [
            ("longest and shortest", '"longest": max, "shortest": min', '"longest": min, "shortest": max'),
            ("one row a question", " for _ in rows]", " for _ in rows[:1]]")]),
        *by("../bench/tests/test_controls::its_own_answers_are_those_of_the_student_that_equal_the_vote", [
            ("the teacher's too", 'said["source"] == "student" and ', ""),
            ("wrong ones too", ' and said["reward"] > 0', "")]),
    ],
    "bench/ablation.py": [
        ("the majority of one answer", '[row["correct"]])[-1]', '[row["correct"]])[0]',
         "../bench/tests/test_ablation::the_majority_of_n_answers_is_an_arm_of_its_own"),
        ("questions are not drawn anew", "(of_seeds @ values) * of_questions", "of_seeds @ values",
         "../bench/tests/test_ablation::the_bootstrap_varies_over_seeds_and_over_questions"),
        ("a one-sided p", ", 2 * (tail + 1) /", ", (tail + 1) /",
         "../bench/tests/test_ablation::the_p_value_is_two_sided_and_never_zero"),
        *by("../bench/tests/test_ablation::of_bootstrap_and_student_the_less_sure_one_counts", [
            ("the surer of two tests counts", "p = max(p_value", "p = min(p_value"),
            ("the narrower of two intervals", "min(low, mean - half), max(high, mean + half)",
             "max(low, mean - half), min(high, mean + half)"),
            ("one seed has a p", "(seeds := len(by_seed)) > 1", "(seeds := len(by_seed)) > 0"),
            ("the deviation of the seeds is biased", "std(ddof=1)", "std(ddof=0)"),
            ("the deviation of one seed, not of their mean", " / math.sqrt(seeds)\n", "\n"),
            ("as many degrees as seeds", "1e-99), seeds - 1", "1e-99), seeds")]),
        ("the bootstrap alone", ", student_p(mean / max(error, 1e-99), seeds - 1)", ", 0",
         "../bench/tests/test_ablation::the_p_value_holds_its_level_whatever_the_seeds_differ_by[10]"),
        *by("../bench/tests/test_ablation::student_is_that_of_the_tables_and_of_the_integral", [
            ("a one-sided t", "1 - (2 / math", "0.5 - (2 / math"),
            ("Student's series without its coefficients", " * (k + 1) / (k + 2)", ""),
            ("a bound of 90 %", "> 0.05 else (low", "> 0.1 else (low")]),
        *by("../bench/tests/test_ablation::the_verdict_rests_on_the_corrected_p_and_the_page_shows_it", [
            ("a verdict without Holm", "if corrected < 0.05", 'if test["p"] < 0.05'),
            ("the page shows the p without Holm twice", "{test['p_holm']:", "{test['p']:")]),
        ("Holm becomes Bonferroni", "(len(p_values) - rank)", "len(p_values)",
         "../bench/tests/test_ablation::holm_by_hand"),
        *by("../bench/tests/test_ablation::the_numbers_of_a_small_ablation_by_hand", [
            ("a gain with the wrong sign", "one] - answers[other", "other] - answers[one"),
            ("answers in the order of the file", "questions = sorted", "questions = list")]),
    ],
    "bench/sizes.py": [
        *by("../bench/tests/test_ablation::the_gain_of_each_size_by_hand", [
            ("the student against its teacher, the wrong way round", '"ppo"] - answers[name',
             'name] - answers["ppo"'),
            ("every run is a size of its own", 'run.results(evaluation("base"))["parameters"]', "folder")]),
    ],
    "bench/sick.py": [
        *by("../bench/tests/test_sick::a_bug_differs_from_the_runs_own_ppo_in_what_it_says", [
            ("ten times the tiny preset's learning rate", '10 * ppo["lr"]', "2e-3"),
            ("empty paths are flags", ' if value != ""}', "}")]),
        ("every table is added to the last", "rest.partition(END)[2]", "END.join(rest.split(END))",
         "../bench/tests/test_sick::the_table_goes_between_its_marks"),
    ],
    "bench/compare.py": [
        *by("../bench/tests/test_compare::the_page_of_two_runs", [
            ("the wrong run is better", "(second, first)", "(first, second)"),
            ("accuracy of what one alone answered", "for key in both", "for key in answers")]),
        *by("../bench/tests/test_compare::where_two_runs_part", [
            ("rounding is a parting", "1e-6, abs_tol=1e-6", "0.0, abs_tol=0.0"),
            ("the last parting, not the first", "keys:", "keys and row is rows[-1]:"),
            ("other settings are no parting", "pair[0]", 'part == "inputs" and pair[0]')]),
    ],
    "report.py": [
        ("McNemar of one tail", "min(1.0, 2 * tail / 2**n)", "tail / 2**n",
         "mcnemar_is_the_share_of_coin_sequences_that_are_at_least_as_uneven"),
        ("wins and losses swapped", "gain[1], gain[-1],", "gain[-1], gain[1],",
         "compare_counts_only_questions_that_both_answered"),
        *by("the_numbers_of_a_run", [
            ("noise is a verdict", '0.05 else "yes" if', '0.5 else "yes" if'),
            ("labels by how often they are wrong", '(r["reward"] == 1)', '(r["reward"] == 0)'),
            ("the student's answers count as the teacher's", ' if r["source"] == "teacher"', ""),
            ("PPO against itself without a reward model", '("ppo", "sft")', '("ppo_raw", "sft")'),
            ("a stage that was redone counts twice", '".old" not in stage and ', "")]),
        ("unknown values count as 0", "for value in values if value is not None", "or 0 for value in values",
         "../bench/tests/test_ablation::the_numbers_of_a_small_ablation_by_hand"),
        ("the test questions' row of the harder ones", 'hard" if name.startswith("hard_") else "', "",
         "the_numbers_of_a_run the_page_of_a_run"),
        ("arms count in a run's cost", ' and (arms or "+" not in stage)', "",
         "what_is_missing_is_said_and_nothing_else_changes"),
        *by("sampled_answers_are_told_where_both_were_asked", [
            ("sampled answers of PPO are told as SFT's", "{number(sampled['sft'])}", "{number(sampled['ppo'])}"),
            ("of one model alone", "    if None in sampled.values():\n", "    if not sampled:\n")]),
        ("the raw vote's curve in the learned one's", '= r"6_ppo(_r\\d)?",', '= r"6_ppo(_r.*)?",',
         "unknown_numbers_and_a_second_round"),
        ("recorded answers are greedy ones", 'row["mean_tokens"] is None]', "False]",
         "unknown_numbers_and_a_second_round"),
        *by("the_page_of_a_run", [
            ("fixed and broken swapped", "(not fixed, fixed)", "(fixed, not fixed)"),
            ("peaks are added", ", max(row", ", sum(row"),
            ("an evaluation hides the others' cost", '.setdefault(stage.split("/")[0], []).append(row)',
             '[stage.split("/")[0]] = [row]')]),
        ("points lose their sign", "s = f\"{100 * found['difference']", "s = f\"{100 * abs(found['difference'])",
         "../bench/tests/test_compare::the_page_of_two_runs"),
        *by("the_page_says_the_answer_in_words_and_how_it_was_made", [
            ("worse is better", '"no": "worse than"', '"no": "better than"'),
            ("a quick run's numbers are like others", ' * report["quick"]', " * 0"),
            ("a row that is not there", '    if "ppo" in shares:\n', "    if True:\n")]),
        ("the vote's score on the learned one's axis", 'if name != "objective/scores"', "if name",
         "curves_have_one_unit_an_axis_and_nothing_leaves_it"),
        *by("after_the_vote_a_run_says_whether_there_is_anything_to_learn", [
            ("every vote counts", 'if row["share"] >= min_share]', "]"),
            ("without gold there is nothing", "1 if right is None", "0 if right is None"),
            ("a few votes are nothing", " < FEW:\n        print", " < 1:\n        print"),
            ("agreement is enough", " * (1 if right is None else right) < FEW", " < FEW")]),
    ],
    "pictures.py": [
        *by("the_picture_of_the_result_by_hand", [
            ("a share and not a percentage", "(100 * value for value in", "(value for value in"),
            ("the interval begins at 0", "axis.plot(ends, [y, y]", "axis.plot([0, ends[1]], [y, y]"),
            ("the method comes first", "len(rows) - 0.5, -0.5", "-0.5, len(rows) - 0.5")]),
        *by("curves_have_one_unit_an_axis_and_nothing_leaves_it", [
            ("a critic far below 0 leaves the axis", "max(lowest, factor * row[metric])", "factor * row[metric]"),
            ("half an iteration", "integer=True, min_n_ticks=1", "integer=False, min_n_ticks=1")]),
    ],
    "play.py": [
        *by("who_answers", [
            ("the first round", "max(rounds, default", "min(rounds, default"),
            ("the base is the SFT student", '"base": run / "2_sft"', '"base": run / "5_reward"')]),
        *by("all_answer_the_next_test_question_and_what_is_typed", [
            ("what is typed has a gold answer", "question=typed, answer=None,", "question=typed,"),
            ("the same test question again", "else next(following)", "else tests[0]"),
            ("an answer without an end keeps its score", ", UNFINISHED_SCORE).tolist()", ", 0.0).tolist()"),
            ("another question of its own form", "replace(tests[0], id", "Question(id")]),
        ("what is missing is silent", '        print(f"no {name}', '        str(f"no {name}',
         "what_is_missing_is_named_and_the_others_answer"),
        ("a long question ends it", "except ValueError as error:  # a q", "except KeyError as error:  # a q",
         "a_question_that_is_too_long_is_said_to_be_and_the_next_is_asked"),
        ("right and wrong swapped", '"right" if right', '"right" if not right', "a_column_says_what_is_known"),
        ("the last column's gap counts", "(width + 2) // len(columns) - 2", "width // len(columns) - 2",
         "columns_by_hand"),
    ],
    "pseudo_reward.py": [
        *by("majority_vote", [
            ("silence wins the vote", "answer for answer in answers if answer is not None", "answers"),
            ("the rarest answer wins", "max(votes.values())", "min(votes.values())"),
            ("the share is of the answers that were stated", "most / len(answers)", "most / sum(votes.values())"),
            ("a tie goes to the first", "logprobs:\n            return None, 0.0",
             "logprobs:\n            return tied[0], most / len(answers)"),
            ("a tie by the mean of all answers", "True) if answer == a", "True)"),
            ("a full tie has a winner",
             "        if weight[tied[0]] == weight[tied[1]]:\n            return None, 0.0\n", "")]),
        ("a cut-off response is rewarded", "ended and sample.answer", "answer",
         "pseudo_rewards_are_one_for_an_ended_response_that_agrees_with_the_vote"),
        *by("pairs_are_all_combinations_of_an_ended_winner_and_an_ended_loser", [
            ("a cut-off response is rejected", "0 and sample.ended", "0"),
            ("chosen and rejected swapped", "c, r) for c in chosen", "r, c) for c in chosen"),
            ("pairs alike in their chosen text are one", "(c.response, r.response)", "c.response"),
            ("one pair too few", "values())[:most]", "values())[: most - 1]")]),
        ("pairs are not drawn", "    rng.shuffle(pairs)\n", "", "pairs_repeat_with_the_seed_and_differ_without"),
        ("the teacher's pairs come first", "pair[0].source =", "not pair[0].source =",
         "pairs_with_a_response_of_the_student_come_first"),
        ("the same pair twice", "c.response, r.response", "id(c), id(r)",
         "no_pair_comes_twice_and_none_without_both_sides"),
        *by("winners_are_the_teachers_different_winning_texts", [
            ("the student's winners are imitated", '1 and s.source == "teacher"', "1"),
            ("duplicates are always kept", "(won if keep_duplicates else list(dict.fromkeys(won)))", "won")]),
        *by("main_writes_votes_rewards_targets_and_pairs_of_equal_weight_per_question", [
            ("the student always votes", 'if cfg.voters == "both" or s.source == "teacher"', ""),
            ("pairs of weight one", '": 1 / len(pairs)', '": 1.0')]),
        ("the student never votes", 'cfg.voters == "both" or s', "s", "voters_both_lets_the_student_vote"),
        *by("questions_under_the_minimum_share_are_dropped_and_none_left_is_an_error", [
            ("the minimum share is exclusive", ">= cfg.min_share", "> cfg.min_share"),
            ("the minimum share is ignored", "None and share >= cfg.min_share", "None"),
            ("questions without a vote give pairs", "        if not elected:\n            continue\n", "")]),
        *by("main_passes_every_flag_and_field_on", [
            ("the vote knows no log-probs", "if comparable(voters) else None", "if False else None"),
            ("targets capped by the number of pairs", "targets, cfg.sft_per", "targets, cfg.pairs_per"),
            ("prompts without options and instruction", 'prompt, "response', 'question, "response')]),
        *by("log_probs_of_two_temperatures_or_two_models_decide_no_tie", [
            ("log-probs of two temperatures are compared", "{(s.source, s.temperature) for", "{s.source for"),
            ("log-probs of two models are compared", "{(s.source, s.temperature) for", "{s.temperature for"),
            ("other votes matter in a tie", "voters if votes[s.answer] == most}", "voters}")]),
        *by("the_targets_are_of_all_temperatures_alike", [
            ("targets in the order of the file", "zip_longest(*groups[first:], *groups[:first])", "groups"),
            ("the first temperature always begins", "first %= len(groups) or 1", "first = 0")]),
        *by("a_text_of_two_temperatures_is_one_target", [
            ("a text of two temperatures twice", "texts if keep_duplicates else list(dict.fromkeys(texts))", "texts")]),
        ("the vote is the gold answer", "elected = vote is",
         "vote = question.answer or vote\n        elected = vote is", "gold_answers_are_never_read"),
        ("the seed is ignored", 'runtime.seed_of(cfg.seed, "pairs")', "0",
         "another_seed_draws_other_pairs_and_nothing_else"),
        *by("without_the_filter_the_teachers_finished_answers_are_the_targets", [
            ("the filter of the targets is ignored", "cfg.sft_filter else", "True else"),
            ("cut-off answers are targets without the filter", "int(sample.ended)", "1")]),
    ],
    "tasks/recorded.py": [
        *by("our_own_form_carries_the_end_and_the_log_prob_per_token", [
            ("log-probs are sums", '/ row["tokens"] if', "if"),
            ("the temperature is lost", "ended, logprob, temperature))", "ended, logprob))")]),
        ("a cut text votes with its last number", "lenient and ended", "lenient",
         "lenient_reads_the_last_number_of_a_response_that_ended"),
        *by("a_text_that_two_questions_share_identifies_neither", [
            ("a shared text identifies the last question", "if times[text] == 1", ""),
            ("a text identifies over other options", "in (None, list(asked.options))", "in (row.get('options'),)")]),
        *by("an_id_is_the_key_that_is_a_questions", [
            ("the first key is the id", "{name: str(row[name]) for name in IDS if row.get(name) is not None}",
             "dict([(name, str(row[name])) for name in IDS if row.get(name) is not None][:1])"),
            ("no text decides between ids", "not named or asked.id in named.values()", "not named")]),
        ("the last of two ids counts", "one = len(set(named.values())) < 2 or", "one = True or",
         "ids_of_two_questions_in_a_line_are_an_error"),
        *by("lines_that_belong_to_no_question_are_counted", [
            ("other lines vanish", "    if strangers:\n", "    if False:\n"),
            ("every file belongs", "len(strangers) < lines", "True")]),
        *by("a_response_that_was_cut_is_known_by_any_servers_word", [
            ("a cut-off response counts as ended", "not UNFINISHED.search(", "bool("),
            ("reasons in small letters", "(?i)length", "length"),
            ("a dictionary is no reason", 'reason.get("type") if', '"stop" if'),
            ("one name of the field", " finishReason stop_reason stopReason done_reason", "")]),
        *by("recorded_log_probs_are_per_token", [
            ("log-probs of a completion are not read", ' or given.get("token_logprobs")', ""),
            ("a missing log-prob counts", "/ len(logprobs) if", "/ len(given.get('token_logprobs', logprobs)) if")]),
        ("a thought in a part of its own is said", 'if part["type"] == "text"', 'if "text" in part',
         "what_a_reasoning_model_thought_in_a_field_of_its_own_is_not_read"),
    ],
    "sft.py": [
        *by("loss_is_the_sum_over_the_mask_by_the_tokens_of_the_whole_step", [
            ("the loss has the wrong sign", "return -torch.", "return torch."),
            ("the loss counts prompt and padding", "torch.where(mask, logprobs, 0.0)", "logprobs"),
            ("the loss divides by its own tokens", "sum() / total", "sum() / mask.sum()")]),
        ("the mask as a factor", "torch.where(mask, logprobs, 0.0)", "(mask * logprobs)",
         "a_masked_cell_may_hold_anything"),
        *by("a_whole_run_is_the_loop_that_is_written_out_here", [
            ("responses without the end token", "tokenizer.response", "tokenizer.encode"),
            ("prompts outside the chat", "tokenizer.chat", "tokenizer.encode"),
            ("responses of other examples", "(prompt, response)", "(prompt, examples[0][1])"),
            ("bf16 weights", "runtime.trained_dtype(cfg.lora)", "torch.bfloat16"),
            ("only the head is trained", "parameters(),", "lm_head.parameters(),"),
            ("the weight decay of the flag is ignored", "=cfg.weight_decay,", "=0.01,"),
            ("the same order in every epoch", "step, n", "step % (total_steps // cfg.epochs), n"),
            ("the seed is ignored", ', cfg.seed, "sft"', ', 0, "sft"'),
            ("the learning rate is never set", "        runtime.set_lr(adam, lr)\n", ""),
            ("the schedule is one of a single epoch", ", total_steps", ", total_steps // cfg.epochs"),
            ("total of the micro-batch", "mask, total", "mask, int(mask.sum())"),
            ("total counts the prompts", "len(examples[i][1])", "lengths[i]"),
            ("the last row is dropped", ", adam, batch", ", adam, batch[:-1]"),
            ("one epoch whatever is asked", "= cfg.epochs * math", "= math"),
            ("the model is saved as it was", "model, tokenizer", "load_model(cfg.model), tokenizer")]),
        *by("examples_that_are_too_long_are_left_out_whole_and_counted", [
            ("too long by one is kept", "= cfg.max_tokens", "= cfg.max_tokens + 1"),
            ("a fitting example is dropped", "(response) <= cfg.", "(response) < cfg.")]),
    ],
    "model.py": [
        ("tokens that stop are not saved", "{*ends, *stop_ids}", "{*ends}",
         "tokens_that_stop_are_saved_beside_the_models_own"),
        *by("the_logits_are_those_of_the_formulas", [
            ("rope turns the wrong way", "-second, first], dim=-1)", "second, -first], dim=-1)"),
            ("rope with interleaved pairs",
             "x.chunk(2, dim=-1)\n    return torch.addcmul(x * cos, torch.cat([-second, first], dim=-1), sin)",
             "x[..., ::2], x[..., 1::2]\n"
             "    return torch.addcmul(x * cos, torch.stack([-second, first], dim=-1).flatten(-2), sin)"),
            ("rope turns at half the speed", "/ config.head_dim", "/ 2 / config.head_dim"),
            ("rope positions in bf16", "length, dtype=torch.float32, device=device",
             "length, device=device).bfloat16().float("),
            ("fast pairs are stretched", "keep * speed + (1 - keep)", "(1 - keep) * speed + keep"),
            ("keys are not rotated",
             "q, k = rotate(torch.cat([q, k], dim=2), *rope).split([q.shape[2], k.shape[2]], dim=2)",
             "q = rotate(q, *rope)"),
            ("values are rotated", "out = attend(q, k, v)", "out = attend(q, k, rotate(v, *rope))"),
            ("attention without its scale", "enable_gqa=True)", "enable_gqa=True, scale=1.0)"),
            ("query heads grouped the other way", "k_proj(x).view(B, T, -1, self.head_dim)",
             "k_proj(x).view(B, T, -1, self.head_dim).flip(2)"),
            ("gate and up swapped", "gate_proj(x)) * self.up_proj", "up_proj(x)) * self.gate_proj"),
            ("norm subtracts the mean", "rms_norm(x,", "rms_norm(x - x.mean(-1, keepdim=True),"),
            ("no residual around attention", "x + self.self_attn", "self.self_attn")]),
        ("angles from 0 in every cached step", "positions], cache.rope[1][positions",
         "positions - positions[:, :1]], cache.rope[1][positions - positions[:, :1]",
         "test_generate::a_cache_is_the_full_forward_pass"),
        ("attention sees the future", "True, enable_gqa", "False, enable_gqa", "the_logits_are_those_of_the_formulas"),
        ("the norm in the input's type", "F.rms_norm(x, self.weight.shape, self.weight, self.eps)",
         "x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight",
         "rmsnorm_squares_in_fp32_for_bf16"),
        *by("masked_logprobs_equal_token_logprobs", [
            ("the feed-forward reads the wrong norm", "post_attention_layernorm(x", "input_layernorm(x"),
            ("no final norm", "return self.norm(x)", "return x"),
            ("masked log-probs of the token before", "tokens[:, 1:][keep]", "tokens[:, :-1][keep]"),
            ("the position after the one that is kept", "[:, : keep.shape[1]]", "[:, -keep.shape[1] :]"),
            ("the last feed-forward is left out", "x = x[:, : keep.shape[1]]", "return x[:, : keep.shape[1]]"),
            ("positions are picked in every block", "keep if last else None", "keep")]),
        ("the head is not tied again", "model.tie()\n    return", "return", "saved_model_comes_back_bit_for_bit"),
        ("logits in the weights' type", "tokens, cache)).float()", "tokens, cache))",
         "dtype_can_be_chosen_when_loading"),
        *by("saved_scalar_model_comes_back", [
            ("scores in the weights' type", "()) - self.score_mean",
             "()).to(self.score.weight.dtype) - self.score_mean"),
            ("the mean of the scores is added", "- self.score_mean", "+ self.score_mean"),
            ("the mean of the scores is not saved", '        raw["score_mean"] = model.score_mean\n', "")]),
        ("a large new head", "1 / math.sqrt(model.config.hidden_size + 1)", "1.0",
         "normal_head_has_variance_one_over_d_plus_one"),
        ("a zero head is random", '"zero": 0.0}', '"zero": 0.1}',
         "a_scalar_model_needs_a_head_or_the_wish_for_a_new_one"),
        *by("token_logprobs_are_minus_the_cross_entropy", [
            ("log-probs of the token before", "1:, None]).squeeze(-1)", ":-1, None]).squeeze(-1)"),
            ("logits of the token itself", "[:, :-1] if logits.dtype == torch.float64 else logits[:, :-1]",
             "[:, 1:] if logits.dtype == torch.float64 else logits[:, 1:]"),
            ("log-probs in bf16", "[:, :-1].float()", "[:, :-1]"),
            ("log-probs times the temperature", "/ temperature  #", "* temperature  #"),
            ("the temperature on the chosen logit alone", "logits = logits / temperature  # (B, T-1, V)\n"
             "    chosen = logits.gather(-1, tokens[:, 1:, None]).squeeze(-1)",
             "chosen = logits.gather(-1, tokens[:, 1:, None]).squeeze(-1) / temperature"),
            ("exponentials that overflow", "logsumexp(-1)  #", "exp().sum(-1).log()  #")]),
        ("nothing is worked out again", "self.gradient_checkpointing and torch.is_grad_enabled()", "False",
         "gradient_checkpointing_changes_memory_and_not_the_result"),
        *by("the_last_token_is_the_last_real_one", [
            ("the last column instead of the last token", "== lengths[:, None]", "== lengths[:, None].clamp(min=T)"),
            ("the token after the last", "arange(1, T + 1,", "arange(T,")]),
        *by("masked_mean_sees_only_the_mask", [
            ("the masked mean divides by all cells", "sum() / mask.sum().clamp(min=1)", "mean()"),
            ("the masked mean counts masked cells", "torch.where(mask, x, 0.0)", "x"),
            ("the masked mean of nothing is NaN", "sum().clamp(min=1)", "sum()")]),
    ],
    "runtime/chunked.py": [
        *by("masked_logprobs_equal_token_logprobs", [
            ("masked log-probs without the temperature", "div_(temperature).log_softmax", "log_softmax"),
            ("entropy of the other sign", "append(-log_p.mul_", "append(log_p.mul_")]),
        ("logits in bf16", "logits if logits.dtype == torch.float64 else logits.float()", "logits",
         "under_autocast_products_are_bf16_and_log_probs_and_values_are_not"),
        *by("logprobs_in_chunks_are_the_plain_formula", [
            ("the gradient without the temperature", "d_logprobs / ctx.temperature", "d_logprobs"),
            ("the gradient of the softmax alone", "scatter_add_(1, target[:, None], d[:, None]).to", "to"),
            ("the gradient of the logits has the other sign", "p * -d[:, None]", "p * d[:, None]"),
            ("the weight learns from the last chunk alone", "if d_weight is None else d_weight.add_(part)", ""),
            ("chunks are kept", "p if len(hidden) <= ctx.rows else None", "p")]),
        ("all logits at once", "max(1, LOGITS_AT_ONCE // len(weight))", "10**9",
         "no_more_logits_than_a_chunk_are_ever_in_memory"),
    ],
    "hf/folder.py": [
        *by("saved_scalar_model_comes_back", [
            ("the mean of the scores is not read", 'read_object(path).get("score_mean", 0.0)', "0.0"),
            ("a mean that is no number", " and math.isfinite(x)", "")]),
        ("another epsilon where none is given", 'rms_norm_eps": 1e-6', 'rms_norm_eps": 1e-5',
         "config_defaults_are_those_of_hugging_face"),
        ("qwen2 without its biases", 'raw["attention_bias"] = True', "pass", "keys_that_change_nothing_are_accepted"),
        *by("a_broken_folder_is_refused_by_name", [
            ("a kind of rope that is not known", 'default", "llama3', 'default", "llama3", "yarn'),
            ("any network", "(FIELDS | OTHER_NETWORKS)", "FIELDS"),
            ("a number as text", "type(value) in (int, float) and 0 < value < 1e30", "True"),
            ("a size of nothing", "0 < value <= most", "value <= most"),
            ("a diverged run loads", "not tensor.isfinite().all()", "False"),
            ("another shape loads", "shape != wanted[name]", "False"),
            ("tensors nobody asked for", "surplus or missing", "missing"),
            ("a scalar model is a language model", '"score.weight" in surplus', "False")]),
        ("rope's own object is not read", ' | {f"rope_{key}": rope[key] for key in rope}', "",
         "saved_model_comes_back_bit_for_bit"),
        ("another head than the embedding is dropped", "not _same(tensors.pop(name), tensors.get(original)):",
         "tensors.pop(name) is None:", "a_broken_folder_is_refused_by_name"),
        ("the same head is refused", "bool((x == y).all())", "x is y",
         "a_tied_head_that_is_in_the_file_too_changes_nothing_if_it_is_the_same"),
        *by("a_broken_folder_is_refused_by_name", [
            ("an adapter is a model without weights", '(path.parent / "adapter_config.json").is_file()', "False"),
            ("the last of two tensors counts", "if name in places:", "if False:"),
            ("rope_scaling is passed over", 'raw.get("rope_scaling") or raw.get("rope_parameters")',
             'raw.get("rope_parameters") or raw.get("rope_scaling")'),
            ("sliding windows by another name", '"layer_types": (', '"layers": ('),
            ("later positions are seen", '"is_causal": _only', '"causal": _only')]),
        ("the dtype is not chosen", "dtype or tensors", "tensors", "dtype_can_be_chosen_when_loading"),
        ("an index that leaves its folder", "Path(name).name != name or not", "not",
         "test_security::an_index_cannot_leave_its_folder"),
        ("shards before the single file", "() and not files[0].is_file", "",
         "test_parity::one_file_comes_before_shards"),
    ],
    "generate.py": [
        *by("a_cache_is_the_full_forward_pass", [
            ("cached positions are off by one", "+ self.places[:T]", "+ self.places[:T] + (not first)"),
            ("cached positions are those of the longest row", "[:, None] + self.places[:T]",
             ".max() + self.places[:T].expand(B, T)"),
            ("a cached step does not see itself", "> positions[:, None, :, None]", ">= positions[:, None, :, None]"),
            ("a cached step sees garbage", ".masked_fill_(hidden, -math.inf)", ""),
            ("the cache does not advance", "self.lengths + T", "self.lengths + T * first"),
            ("rows leave the cache without their lengths", "self.lengths = self.lengths[rows]",
             "self.lengths = self.lengths[: len(rows)]"),
            ("rows leave the keys alone", "stored[layer] = x[rows]",
             "stored[layer] = x[rows] if stored is self.values else x"),
            ("query rows of a group out of order", "3, 1, 4).reshape", "1, 3, 4).reshape"),
            ("what was stored is lost as the cache grows", "F.pad(x, (", "F.pad(0 * x, ("),
            ("what was stored moves as the cache grows", "F.pad(x, (0, 0, 0, length - x.shape[2]))",
             "F.pad(x, (0, 0, length - x.shape[2], 0))"),
            ("keys of one head for another", "heads + positions", "heads.flip(1) + positions"),
            ("the cache grows a token too late", "self.used > len(self.places)", "self.used > len(self.places) + 1"),
            ("cached scores are not scaled", "alpha=E**-0.5", "alpha=1.0"),
            ("tokens at once see what their neighbours should", "mask.repeat(1, H // K, 1)",
             "mask.repeat_interleave(H // K, dim=1)"),
            ("a part is always the first rows", "[x[rows] for x in self.keys], [x[rows] for x in self.values]",
             "[x[: rows.stop - rows.start] for x in self.keys], [x[: rows.stop - rows.start] for x in self.values]")]),
        *by("greedy_is_the_argmax_of_the_full_forward_pass", [
            ("the prompt's end is read one token late", "== lengths[:, None]",
             "== (lengths[:, None] + 1).clamp(max=tokens.shape[1])"),
            ("answers in the order of length", "[i] for i in range(len(prompts))", "[i] for i in order"),
            ("an answer that was cut says stop", ") for row in zip(tokens, logprobs, finish",
             ', "stop") for row in zip(tokens, logprobs'),
            ("padding stays in the cache", "= lengths  # what", "= tokens.shape[1]  # what"),
            ("the cache grows too late", "cache.used = longest", "cache.used = longest - 3")]),
        *by("generated_tokens_follow_the_model_with_chances_of_their_own", [
            ("one chance for all tokens of a row", "[:, t])  # (b,), (", "[:, 0])  # (b,), ("),
            ("one chance for all prompts", "[seed_of(seed, i) for i in range(len(prompts))]",
             "[seed] * len(prompts)"),
            ("always greedy", "temperature == 0:", "temperature <= 1:")]),
        *by("a_stop_id_ends_the_text_and_is_kept", [
            ("only the first stop id stops", "(stop_ids)", "(sorted(stop_ids)[:1])"),
            ("the end token is left out", "progress(1)", "tokens[i].pop()\n                progress(1)")]),
        *by("a_stop_text_ends_an_answer_and_is_left_out", [
            ("no answer may end by its text", " or ended(tokens[i])", ""),
            ("a stop text does not stop", "bool(stop_text)", "False"),
            ("a stop text within a token alone", "len(stop_text.encode()) - 3 :", "1:"),
            ("the stop text stays in the answer", ".split(stop_text)[0] if stop_text else text", "")]),
        *by("text_does_not_depend_on_the_batch", [
            ("other rows leave", "[going[row] for row in stay]", "going[: len(stay)]"),
            ("the cache keeps the rows that left", "            cache.select(rows)",
             "            cache.select(torch.arange(len(rows)))"),
            ("the chances of the rows that left go on", "rows], [", ": len(rows)], ["),
            ("a row that has ended goes on", 'finish[i] == "stop"', "False"),
            ("chances of the row and not of the prompt", "seeds[i]", "seeds[rows.index(i)]")]),
        ("rows that ended never leave", "len(stay) <= 0.8 * len(going)", "False", "rows_that_ended_cost_nothing"),
        *by("prompts_are_read_once_and_in_parts", [
            ("equal prompts are read again", "dict.fromkeys(map(tuple, prompts))", "map(tuple, prompts)"),
            ("all prompts at once", "READ_AT_ONCE[device.type] // longest", "len(distinct)"),
            ("a part's prompts in the first rows", "start, start + size", "0, len(texts)"),
            ("copies of the wrong row", "row_of[tuple(prompt)]", "0")]),
        ("the seed is ignored", "[seed_of(seed, i) for i in range(len(prompts))]", "list(range(len(prompts)))",
         "a_seed_repeats_the_text_and_another_does_not"),
        *by("test_ranks::ranks_answer_as_one[generate-2]", [
            ("a rank's share begins one late", "::", "+ ranks.SIZE - 1 ::"),
            ("only this rank's answers", "ranks.gather(responses)", "[responses]")]),
        *by("logprobs_are_those_of_the_full_forward_pass", [
            ("the temperature is ignored", " / (temperature or 1.0)", ""),
            ("log-probs without the temperature", ", probs", ", torch.softmax(logits, -1)")]),
        *by("a_token_is_drawn_where_its_share_of_the_chance_lies", [
            ("top-p sampling", "cumsum", "where(probs > 0.02, 0).cumsum"),
            ("rare tokens are lost", ", dtype=torch.float64", ").double(")]),
        ("the token before", "token.clamp(max=logits.shape[-1] - 1)", "(token - 1).clamp(min=0)",
         "sampling_follows_the_softmax"),
        ("a token of no probability", "right=True)  # (B", "right=False)  # (B",
         "temperature_0_takes_the_largest_logit"),
        ("NaN passes for text", "not all(math.isfinite(sum(row)) for row in logprobs)", "False",
         "nan_is_never_taken_for_text"),
        ("a prompt fills the context", " - max_new_tokens", "", "empty_and_too_long_prompts_are_refused"),
        ("answers leave a graph", "@torch.inference_mode()\ndef", "def", "generating_leaves_no_gradient_behind"),
        *by("a_question_is_asked_as_a_chat_or_after_examples_and_must_leave_room", [
            ("a question is asked without its chat", "tokenizer.chat", "tokenizer.text"),
            ("a question without room for its answer", "+ max_new_tokens <", "<")]),
        *by("all_draws_are_independent", [
            ("all temperatures draw alike", ", index, i, sample", ", i, sample"),
            ("all questions draw alike", ", index, i, sample", ", index, sample"),
            ("all samples draw alike", ", index, i, sample", ", index, i"),
            ("teacher and student draw alike", "purpose, index, i,", "index, i,"),
            ("all seeds draw alike", "cfg.seed, purpose,", "purpose,"),
            ("a temperature draws as the next seed's first", ", purpose, index,", " + index, purpose,"),
            ("chances restart in every part", ", index, i", ", index, i - start")]),
        ("all answers are one part", "PART // samples", "len(prompts)",
         "a_state_is_as_small_after_many_answers_as_after_few"),
        ("chances of a part follow from its size", ", index, i, sample", ", step, i, sample",
         "samples_do_not_depend_on_batches_and_parts"),
        *by("every_sample_is_of_its_question_and_temperature", [
            ("only the first temperature", "[index], seeds", "[0], seeds"),
            ("the recorded log-prob is a mean", "logprobs), 4)", "logprobs) / len(response.logprobs), 4)"),
            ("samples of other questions", ": i + samples] for i in range(0, len(responses),",
             ":: len(responses) // samples] for i in range(len(responses) //")]),
    ],
    "data.py": [
        *by("collate_by_hand", [
            ("the mask begins one token early", ">= starts[:, None]", ">= starts[:, None] - 1"),
            ("the mask ends before the end token", "lengths[:, None]", "lengths[:, None] - 1"),
            ("the mask holds the prompt", "(positions >= starts[:, None]) & (positions < lengths[:, None])",
             "positions < lengths[:, None]"),
            ("the mask is told by token ids", "positions < lengths[:, None]", "tokens[:, 1:] != 0"),
            ("padding on the left", "row, : lengths[row]", "row, -lengths[row] :")]),
        *by("the_script_cuts_a_file_into_disjoint_splits", [
            ("copies of a question are kept", "{question.key: question for question in pool}.values()", "pool"),
            ("train and valid overlap",
             "unique[:count], unique[count:]", "unique[:count], unique")]),
        *by("questions_without_an_answer_are_trained_on_and_measure_nothing", [
            ("they are left out", "(question.answer is None) != train", "question.answer is None"),
            ("they measure", "(question.answer is None) != train", "question.answer is not None"),
            ("nobody counts them", "q.answer is None for name", "q.answer is False for name")]),
        *by("a_small_file_is_split_in_the_shares_of_the_sizes_asked_for", [
            ("a share of less than one question is none", "max(1, counts[name]", "max(0, counts[name]"),
            ("copies count", "len({question.key for question in pool})", "len(pool)"),
            ("what is left over is lost", '"train": n - sum(rest.values())', '"train": counts["train"] * n // 320')]),
        ("the pool is not shuffled", "    random.Random(seed).shuffle(unique)\n", "", "the_script_splits_mmlu_pro"),
        ("a test set that is too small is one", "len(test) == wanted", "len(test) <= wanted",
         "a_set_that_is_too_small_is_an_error"),
        ("a question's own instruction is replaced", "q.instruction or text", "text",
         "an_instruction_suits_the_kind_and_never_replaces_a_questions_own"),
    ],
    "tasks/question.py": [
        *by("the_options_are_part_of_a_question", [
            ("the options are no part of a question", "_plain(self.question), *sorted(map(_plain, self.options))",
             "(_plain(self.question),)"),
            ("the order of the options counts", "sorted(map(_plain, self.options))", "map(_plain, self.options)")]),
        *by("a_users_own_choices_load", [
            ("the gold answer is read loosely", "canonical(last, kind) or extract_answer(str(answer), kind)",
             "extract_answer(str(answer), kind, lenient=True)"),
            ("options from B", "chr(65 + i)}", "chr(66 + i)}")]),
        ("the prompt without its instruction", "options), self.instruction", "options)", "a_users_own_file_loads"),
        ("fillers are dropped everywhere",
         'while fillers and options and options[-1] == "N/A":\n        options = options[:-1]',
         'if fillers:\n        options = [option for option in options if option != "N/A"]',
         "only_fillers_at_the_end_are_dropped"),
        *by("a_bad_question_file_is_refused_with_file_and_line", [
            ("a gold answer beyond the options", "gold) - 65 >= options", "gold) - 65 > options"),
            ("two questions of one id", "first == number,", "True,")]),
        *by("choices_of_mmlu_and_arc", [
            ("an index counts from 1", "chr(65 + answer)", "chr(64 + answer)"),
            ("a label is the letter", "chr(65 + labels.index(str(key)))", "str(key)"),
            ("an answer is no label", "answer if key is None else key", "key")]),
        *by("keys_that_a_question_needs_are_read_or_refused", [
            ("options vanish", "(not options and OPTION.fullmatch(name))", "False"),
            ("a passage vanishes", "needed = CONTEXT.fullmatch(name) or", "needed ="),
            ("a gold answer vanishes", "needed or (answer is None and GOLD.fullmatch(name))", "needed"),
            ("keys by their letters alone", 're.sub(r"[\\W_]", "", key).casefold()', "key"),
            ("an index beyond the choices", "0 <= answer < len", "0 <= answer <= len"),
            ("labels for other choices", " and len(labels) == len(options)", ""),
            ("one of two sets of options", 'not (row.get("options") and row.get("choices"))', "True")]),
    ],
    "tasks/arith.py": [
        *by("word_problems_are_solved_correctly", [
            ("tripled is doubled", '"*", 3)', '"*", 2)'),
            ("half a thing", "if after in range(2, 41)", "if 2 <= after <= 40"),
            ("a week begins on Monday and has no gap", "rng.sample(range(len(DAYS)), steps)", "range(steps)"),
            ("days in any order", "sorted(rng.sample(range(len(DAYS)), steps))",
             "rng.sample(range(len(DAYS)), steps)")]),
        *by("splits_share_no_question_even_in_a_small_world", [
            ("splits are drawn by chance", "low <= bucket < high", "True"),
            ("a problem twice", " and problem.text not in seen", "")]),
    ],
    "tasks/__init__.py": [
        *by("mmlu_pro_is_split_by_what_is_asked", [
            ("an empty set is one", "bool(questions)", "True"),
            ("every question is in every split",
             'if split in ("all", hash_split(question, template=name == "mawps"))', ""),
            ("the limit comes before the split", 'numbered_questions(path, fillers=name == "mmlu_pro"',
             'islice(numbered_questions(path, fillers=name == "mmlu_pro"), limit')]),
    ],
    "tasks/published.py": [
        ("the split follows the id", "else question.key", "else question.id", "mmlu_pro_is_split_by_what_is_asked"),
        ("names and numbers count", r"\b[a-z]+", r"\w+", "mawps_is_split_by_what_is_said_without_names_and_numbers"),
        *by("fetch_puts_the_numbers_of_mawps_into_their_places", [
            ("numbers shifted by one", "numbers[int(place[1])]", "numbers[int(place[1]) - 1]"),
            ("every number as it is written", '.removesuffix(".0")', "")]),
        ("a split of another size", '" if number < 70', '" if number <= 70', "the_borders_of_the_hash_split"),
        ("one example too few", "examples[:shots]", "examples[: shots - 1]", "gsm8k_examples_word_for_word"),
        ("examples of every subject", "_mmlu_pro_examples(path).get(question.subject, [])",
         "sum(_mmlu_pro_examples(path).values(), [])", "mmlu_pro_examples_by_hand"),
        ("any file is the published one", "found == digest,", "True,", "fetch_gets_a_whole_file_or_says_what_to_do"),
        ("a file with another checksum is left", " or sha256(path) != digest", "", "fetch_gets_what_is_missing"),
    ],
    "tasks/check.py": [
        *by("check_finds_faults_leaks_and_copies", [
            ("a leak is no error", 'errors.append(f"{copy}, a leak")', "print(copy)"),
            ("a copy within a file is a leak", "if other != path", "if (other, line) != (path, number)"),
            ("a bad file is passed over", "            errors.append(str(error))\n", "")]),
    ],
    "runtime/files.py": [
        ("any value for a text", "not isinstance(row[key], str)", "False", "test_bad_input::bad_rows"),
        ("half a character is read", 'b"\\\\ud" in content.lower()', "False", "test_bad_input::a_bad_line"),
        *by("test_data::objects_spread_over_lines_are_read", [
            ("an array is a line", "    if SPREAD.match(start):\n", "    if False:\n"),
            ("lines of an array are not counted", '            line += text.count("\\n", start, at)\n', ""),
            ("gzip by the name of the file", 'file.read(2) == b"\\x1f\\x8b"', 'path.suffix == ".gz"')]),
        ("an array without end", "file.read(LONGEST_ARRAY)", "file.read()", "test_bad_input::a_line_without_end"),
        ("an array may stop anywhere", 'text[start:].strip() != "]" * array', "False",
         "test_data::a_bad_array_is_refused"),
        ("another format is a fault of line 1", "for beginning, what in OTHER_FORMATS.items()",
         "for beginning, what in ()", "test_data::another_format_is_called_what_it_is"),
        ("renamed before it is on the disk", "        sync(temporary)\n", "",
         "test_checkpoint::no_file_gets_its_name_before_its_bytes_are_on_the_disk"),
        ("weights are written in place", 'replacing(path, "wb")', 'path.open("wb")',
         "test_model::a_save_cut_short_leaves_the_old_or_the_new_weights"),
        ("files are written in place", "        temporary.replace(path)\n        sync(path.parent)\n", "",
         "test_data::jsonl_round_trip"),
    ],
    "hf/tokenizer.py": [
        ("the beginning of the text twice", "[]\n        for special",
         'self.backend.encode("").ids\n        for special', "a_chat_of_llama_3_written_out"),
        *by("prompt_and_response_are_the_rendered_conversation", [
            ("responses without the end token", "[*self.encode(text), self.end_id]", "self.encode(text)"),
            ("responses with a beginning of their own", "encode(text), self", "text(text), self"),
            ("special tokens are decoded", "[id for id in ids if id not in self.special_ids]", "list(ids)")]),
        ("a text may spell a special token", "        self.backend.encode_special_tokens = True\n", "",
         "text_never_becomes_a_special_token"),
        ("only one token stops", "end_id, *stops])", "end_id])", "stop_ids_are_those_of_every_file"),
        *by("settings_of_who_trained_with_a_tokenizer_are_neither_obeyed_nor_handed_on", [
            ("a saved truncation is obeyed", "        self.backend.no_truncation()", "        pass"),
            ("merges are left out by chance", "self.backend.model.dropout = None", "pass"),
            ("a saved truncation is handed on", 'content |= {"truncation": None, ', "content |= {"),
            ("a text begins with what ends it too", "takewhile(", "filter(")]),
        *by("tokens_that_depend_on_what_stands_before_are_refused", [
            ("a conversation is not looked at as a whole", " != expected.ids or first != expected.ids[: len(first)]:",
             " is None:"),
            ("responses are not looked at", " or first != expected.ids[: len(first)]:", ":")]),
        ("any token begins a conversation", "template and bos != BEGIN", "False",
         "the_begin_token_that_a_template_names_must_be_the_real_one"),
        ("generation_config.json without the end of a turn", ' | {"eos_token_id": sorted(self.stop_ids)}', "",
         "a_saved_tokenizer_is_the_same_here_and_in_transformers"),
        ("the template has no date", 'config.get("date_string") or own', 'config.get("date_string") or "now"',
         "the_date_is_the_folders_else_fixed"),
        ("no template always opens a turn", "and own is None", "and own is False", "conversations_equal_transformers"),
    ],
    "hf/template.py": [
        *by("conversations_equal_transformers", [
            ("line ends behind a block are written", 'text = re.sub(r"(?<=[%#]\\})\\n", "", text)', "pass"),
            ("indentation is written", 'text = re.sub(r"(?m)^[ \\t]+(?=\\{[%#])", "", text)', "pass"),
            ("strings are read as they are", '.encode("ascii", "backslashreplace").decode("unicode_escape")', ""),
            ("a loop has one name", r'in re.findall(r"⟦for (\w+) in messages⟧", text)', "in ()"),
            ("a system turn of its own is forgotten", "next(iter(match.groups()), None)", "None")]),
        *by("a_template_that_is_not_written_out_here_is_refused", [
            ("text between tags is not looked at", "TAG.sub(_tag, text)",
             r'TAG.sub(_tag, re.sub(r"\}\s+\{", "}{", text))'),
            ("expressions are not looked at", 'elif code := _code(part).strip("+~"):',
             'elif code := re.sub(r"\\|upper|.title\\(\\)", "", _code(part).strip("+~")):'),
            ("text between branches for tools", "[^⟧]*tool[^⟧]*⟧{UNUSED}⟦endif⟧)*", "[^⟧]*tool[^⟧]*⟧.*⟦endif⟧)*"),
            ("spaces in strings are dropped", "part[1].replace(", 'part[1].replace(" ", "").replace('),
            ("what stands behind is not looked at", "re.fullmatch(pattern, found", "re.match(pattern, found")]),
    ],
    "answers.py": [
        *by("answers_as_models_write_them", [
            ("the thought is the answer", "_plain(without_thoughts(text))", "_plain(text)"),
            ("an answer that was taken back counts", "not TAKEN_BACK.search(text, stated.end(), stated.end() + 100)",
             "True")]),
        *by("answers_as_people_write_them", [
            ("the first number is read leniently", "mentioned[-1]", "mentioned[0]"),
            ("the last of several statements", "not TAKEN_BACK.search(text, stated.end(), stated.end() + 100)",
             "False"),
            ("the sign is lost", '-1 if re.search("-|eg|in", number["sign"]) else 1', "1"),
            ("mixed numbers are only their fraction", 'number["decimal"] or number["mixed"]', 'number["decimal"]'),
            ("the right side of a calculation", 'text.partition("=")[0]', 'text.rpartition("=")[2]'),
            ("the first of several calculations", "reversed(values)", "values"),
            ("no quotient but a whole one", "operator.truediv", "operator.floordiv"),
            ("a calculation has no negative numbers", "(-1 if isinstance(node.op, ast.USub) else 1)", "1")]),
        *by("answers_of_each_kind[letters]", [
            ("a function is an option", r'r"[(\[', r'r"[\['),
            ("a formula is an option", r"\ ?[=≈≠&|+", r"\ ?[≈≠&|+"),
            ("the head of a list is an option", r"\n\W{0,4}B[).:]", r"\n\W{0,4}Q[).:]"),
            ("one of two options", "(?:and|or|&){END}", "(?:or){END}"),
            ("a part (a) is an option", r"\([a-z]{1,4}\)", r"\([A-Z]{1,4}\)")]),
        *by("answers_of_each_kind[equations]", [
            ("the left side is the result", "        place = left.end()\n", "        break\n"),
            ("a reason is a left side", " and not NO_LEFT.search(left[0])", "")]),
        *by("answers_of_each_kind[digits]", [
            ("no apostrophe in a number", r"[,_'\ ]\d{3}", r"[,_\ ]\d{3}"),
            ("no lakhs", r"|\d{1,2}(?:,\d\d){1,9},\d{3}(?!\d)", ""),
            ("no wide spaces in a number", r" \; \: ", " ")]),
        *by("answers_of_each_kind[scales]", [
            ("a million in small letters alone", "(?i:{", "(?:{"),
            ("K is a million", '"k": 10**3', '"k": 10**6'),
            ("$5m are metres", "(?P<short>[kKmMbB]n?)", "(?P<short>[kKMB]n?)"),
            ("3 thousandths are 3", r"(?:{LARGE}|[kKMBT]\b", r"(?:[kKMBT]\b")]),
        *by("answers_of_each_kind[fractions]", [
            ("2½ is 21/2", r'VULGAR.sub(r" \g<0>"', r'VULGAR.sub(r"\g<0>"'),
            ("no \\cfrac", r"\\[a-z]{{0,4}}frac", r"\\[dt]?frac")]),
        *by("answers_of_each_kind[signs_and_powers]", [
            ("negative 5 is 5", '"-|eg|in"', '"-"'),
            ("5² is 52", r'POWERS.sub(r"^\g<0>"', r'POWERS.sub(r"\g<0>"')]),
        *by("answers_of_each_kind[parts]", [
            ("5x is 5", r"|[abd-fj-kn-rt-z]\b|", "|"),
            ("a point is its first coordinate", r"[\d.]+\s?[,;)\]}}\\]|", r"[\d.]{{9}}|")]),
        *by("answers_of_each_kind[taken_back]", [
            ("not 5 but 7 is none", "(?:{NOT_BUT})?", ""),
            ("taken back, and a number follows", " and not MENTIONED[kind].search(text, stated.end())", ""),
            ("a weaker mark before it", "start = stated.end() if stated else 0", "start = 0")]),
        ("a heading over a sentence", r"[^\n]{{1,30}}", r"[^\n]{{1,300}}", "answers_of_each_kind[labels]"),
        *by("what_was_only_thought_is_no_answer", [
            ("a thought without an end is an answer", "said if thinking else [", "["),
            ("what follows the first thought alone", "[*said, text[start:]]", "said[:1] or [text[start:]]"),
            ("a thought that a template opened is an answer", "i > 0 and depth == 0", "depth == 0"),
            ("a closing tag too many ends a thought", "(i > 0 and depth == 0)", "False"),
            ("a thought within a thought ends both", " and depth == 0)", ")"),
            ("tags of one family alone", "think(?:ing)?|thoughts?|reason(?:ing)?|analysis|scratchpad)", "think)"),
            ("the analysis channel is an answer", r"|<\|channel\|>(?!final)|", "|")]),
        ("no answer equals no gold", "None:\n        return False", "None:\n        return answer is gold",
         "is_correct"),
    ],
    "eval.py": [
        ("the interval is that of a normal", "(right + z * z / 2) / (n + z * z)", "right / n",
         "wilson_interval_examples"),
        *by("every_answer_is_graded_strictly_and_leniently", [
            ("lenient reading for strict", "(text, question.kind)", "(text, question.kind, lenient=True)"),
            ("truncated is what ended", 'row["finish"] ==', 'row["finish"] !=')]),
        *by("best_of_n_keeps_the_answer_that_its_reward_model_likes_best", [
            ("the worst of n", ".index(max(row))", ".index(min(row))"),
            ("the score of the first beside the best", '"score": row[best]', '"score": row[0]'),
            ("scores of another row", "(-1, cfg.samples)", "(cfg.samples, -1).T"),
            ("best-of-n is greedy", "(cfg.temperature,)", "(0.0,)"),
            ("what the reward model reads costs nothing", "sum(parameters.values())", 'parameters["parameters"]')]),
        *by("best_of_n_never_chooses_what_was_cut_off_for_its_score", [
            ("what was cut off keeps its score", "replace_unfinished(scores,", "(lambda scores, *_: scores)(scores,"),
            ("PPO's default whatever the flag says", "for r in said], cfg.unfinished_score",
             "for r in said], UNFINISHED_SCORE")]),
        *by("each_model_answers_by_itself_into_its_own_folder", [
            ("answers are sampled", "stop_text=", "(1.0,), stop_text="),
            ("accuracy is sampled", ", batch_size)", ", batch_size, 1.0)"),
            ("every model in one folder", "str(Path(cfg.out) / name)", "cfg.out")]),
        *by("words_and_flags_that_make_no_sense_are_named", [
            ("a name may lead out of the folder", 'name.strip(".") and not', "not"),
            ("a name may be a flag's", " and not hasattr(cfg, name)", ""),
            ("one name for two models", " and names.count(name) == 1", "")]),
        ("the last recorded answer counts", ".setdefault(sample.id, sample)", "[sample.id] = sample",
         "recorded_answers_are_graded_without_a_model"),
    ],
    "lora.py": [
        *by("an_adapter_by_hand", [
            ("the scale is forgotten", "low = self.scale * ", "low = "),
            ("what is saved has no scale", "self.scale * (self.B", "(self.B"),
            ("a scale without the rank", "self.scale = ALPHA / rank", "self.scale = ALPHA"),
            ("no bias", "self.weight, self.bias)", "self.weight)"),
            ("what is saved has no bias", "self.bias is not None", "False")]),
        *by("new_adapters_change_no_bit_and_switched_off_ones_neither[dtype0-Llama]", [
            ("A and B swapped", "torch.randn(rank, size, generator=rng) / size**0.5", "torch.zeros(rank, size)"),
            ("B is drawn", "torch.zeros(out, rank, device", "torch.randn(out, rank, device"),
            ("adapters in the file's type", "B = nn.Parameter(torch.zeros(out, rank, device=linear.weight.device))",
             "B = nn.Parameter(torch.zeros(out, rank).bfloat16())"),
            ("adapters stay on", "module.on = False", "module.on = True"),
            ("adapters stay off", "            module.on = True", "            pass")]),
        ("the judge's head learns", "if self.on else self.start", "if True else self.start",
         "new_adapters_change_no_bit_and_switched_off_ones_neither[dtype0-ScalarModel]"),
        *by("gradients_are_those_of_the_merged_weight[False-ScalarModel]", [
            ("frozen weights learn", "network.requires_grad_(False)", "pass"),
            ("the scalar head is frozen", 'if hasattr(network, "score"):', "if False:")]),
        *by("merged_is_unmerged[Llama]", [
            ("merged twice", 'tensors[f"{prefix}weight"] = weight.to',
             'tensors[f"{prefix}weight"] = self.weight.data = weight.to'),
            ("the feed-forward has no adapters", "(block.self_attn, block.mlp)", "(block.self_attn,)")]),
        ("what the scalar head learned is not saved", "(self.start + self.change).detach()", "self.start.detach()",
         "merged_is_unmerged[ScalarModel]"),
        *by("every_adapter_is_drawn_by_itself_and_for_its_purpose", [
            ("all layers draw the same", "(*purpose, layer, name)", "(*purpose, name)"),
            ("all maps draw the same", "(*purpose, layer, name)", "(*purpose, layer)"),
            ("policy and critic draw the same", "(*purpose, layer, name)", "(layer, name)")]),
        ("rank 0 freezes", "if rank == 0:", "if rank < 0:", "with_rank_zero_all_weights_learn[Llama]"),
        ("without adapters it is a function too", "for module in network.modules()) else None",
         "for module in network.modules()) or network else None",
         "test_ppo::a_whole_run_is_the_loop_that_is_written_out_here[reward_model]"),
    ],
    "runtime/checkpoint.py": [
        ("frozen weights are saved too", " if parameter.requires_grad]", "]",
         "test_lora::a_saved_state_holds_the_adapters_and_their_moments_alone"),
        *by("a_loop_that_was_cut_off_again_and_again_goes_on_bit_for_bit", [
            ("the optimiser's state is lost", "                part.load_state_dict(saved)\n", ""),
            ("the weights are lost", "tensor.copy_(ranks.shard_like(saved[key], tensor))", "pass"),
            ("the buffers are lost", ", *part.named_buffers()", ""),
            ("the last step is done twice", 'state["step"]', 'state["step"] - 1')]),
        *by("a_file_that_lost_its_end_is_not_continued_and_half_a_line_is_cut_off", [
            ("lines stand twice", "os.truncate(self.stage.out / name, length)", "pass"),
            ("a file that lost its end goes on", "_length(self.stage.out / name) >= length", "length >= 0")]),
        ("scores stand twice", ', "scores.jsonl"', "",
         "test_eval::best_of_n_that_was_cut_off_between_two_lines_has_each_once"),
        ("a damaged state is taken", "digest ==", "bool(digest) or digest ==",
         "a_damaged_state_gives_way_to_the_one_before"),
        *by("the_newest_two_states_are_kept_and_hold_no_pickle", [
            ("only one state is kept", "path.stem != self.good", "True"),
            ("all states are kept", "path.stem != self.good", "False")]),
        *by("the_state_that_counts_outlives_a_save_that_is_killed", [
            ("the state that it went back to is not the good one", "            self.good = path.stem\n", ""),
            ("a damaged state counts as the newest", "path.stem != self.good",
             'path.stem != max((path.stem for path in self.folder.glob("*.json")), default="")')]),
        ("lines of a state that are not on the disk", "sync(self.stage.out / name)", "pass",
         "no_file_gets_its_name_before_its_bytes_are_on_the_disk"),
        *by("a_signal_stops_after_the_step_with_the_state_saved", [
            ("a signal is not obeyed", "if came:", "if False:"),
            ("a signal loses what was done", "if came or ranks.", "if ranks.")]),
        ("saving takes all the time", "PAUSE * self.cost", "0 * self.cost",
         "saving_costs_a_twentieth_of_the_time_at_most"),
        ("lines of an attempt without a state stay", "(stage.out / name).unlink(missing_ok=True)", "pass",
         "test_runtime::what_an_attempt_left_goes"),
    ],
    "runtime/steps.py": [
        *by("test_runtime::threads_by_the_size_of_the_model", [
            ("all threads for a small model", "< SMALL and not os", "> SMALL and not os"),
            ("the user's threads are overruled", ' and not os.environ.get("OMP_NUM_THREADS")', "")]),
        *by("test_runtime::products_are_in_the_precision_that_is_set_else_bf16_on_a_gpu_alone", [
            ("all weights are kept in bf16", "=False", "=True"),
            ("bf16 on a CPU", '"bf16" if cuda else "fp32"', '"bf16"'),
            ("the device decides whatever is set", 'os.environ.get("PRECISION") or', ""),
            ("answers are always in fp32", "None if bf16() else", "")]),
        ("fp16 is fp32", 'precision in ("fp32", "bf16")', "precision",
         "test_runtime::a_precision_that_is_neither_is_refused"),
        ("rows are read in another order than they are learned in", "for rows in batches or", "for rows in",
         "test_steps::rows_are_read_in_the_micro_batches_in_which_they_are_learned"),
        *by("test_runtime::learning_rate_warms_up_and_falls_linearly_to_zero", [
            ("warm-up begins at 0", "(step + 1) / max", "step / max"),
            ("no decay", "(total - step) / max(total - warmup, 1)", "1.0"),
            ("a short run never reaches its peak", "min(warmup, total // 2)", "warmup"),
            ("only the first group gets the rate", ".param_groups:", ".param_groups[:1]:")]),
        *by("test_runtime::a_seed_follows_from_the_whole_purpose", [
            ("a seed for all", "seed_of(*purpose)", "0"),
            ("1, 11 and 11, 1 draw alike", "repr(purpose)", '"".join(map(str, purpose))'),
            ("seeds of one process",
             'int.from_bytes(hashlib.sha256(repr(purpose).encode()).digest()[:8], "big") >> 1',
             "hash(purpose) % 2**63")]),
        *by("test_ranks::ranks_train_as_one_and_only_one_prints[sft-2]", [
            ("the mean of the ranks' gradients", "ranks.SIZE * counts", "counts"),
            ("the loss of one rank", "ranks.all_reduce(sums)", "sums")]),
        ("what one rank has read", "ranks.all_reduce(found)", "found", "test_ranks::ranks_answer_as_one[eval-2]"),
        *by("test_data::a_pass_has_every_row_once", [
            ("batches in the order of the file", "permutation(n, *purpose, epoch)", "list(range(n))"),
            ("every pass in the same order", "n, *purpose, epoch", "n, *purpose"),
            ("the short last batch is dropped", "-(-n // size)", "max(n // size, 1)")]),
        *by("test_data::micro_batches_by_hand", [
            ("micro-batches are not sorted", "sorted(rows, key=lengths.__getitem__, reverse=True)\n    while",
             "list(rows)\n    while"),
            ("a micro-batch of one row too many", "max(1, tokens // lengths[rows[0]])",
             "tokens // lengths[rows[0]] + 1"),
            ("rows between micro-batches are lost", "= rows[fit:]", "= rows[fit + 1 :]"),
            ("the shortest row decides how many fit", ", reverse=True)\n    while", ")\n    while")]),
        *by("test_ranks::rows_are_dealt_once_and_all_ranks_make_as_many_passes", [
            ("ranks make as many passes as they have rows", "most[len(mine) :]", "()"),
            ("a pass that fills up counts", "[-1][-1:], False", "[-1][-1:], True"),
            ("all ranks get the same rows", "rank :: ranks.SIZE", ":: ranks.SIZE")]),
        *by("test_steps::a_step_sums_its_micro_batches_and_clips_once", [
            ("a row of the step is forgotten", ", lengths, cfg.", "[:-1] or rows, lengths, cfg."),
            ("the loss is not propagated", "ranks.SIZE * counts", "0"),
            ("only the last micro-batch is reported", " if sums is None else sums + values", ""),
            ("what is largest is summed", "torch.where(largest, highs, sums)", "sums"),
            ("gradients are not clipped", "cfg.max_grad_norm", "1e12"),
            ("gradients clipped in every micro-batch", "values = counts",
             "torch.nn.utils.clip_grad_norm_(network.parameters(), cfg.max_grad_norm)\n        values = counts"),
            ("gradients are not set to zero", "    optimizer.zero_grad(set_to_none=True)\n", "")]),
        *by("test_steps::a_pass_that_only_keeps_other_ranks_company_does_not_count", [
            ("a pass for company changes the gradient", "* counts * loss", "* loss"),
            ("a pass for company is reported", "= counts * torch.", "= torch."),
            ("a reading for company counts", ") * counts  # (k,", ")  # (k,")]),
        *by("test_steps::no_step_is_taken_on_nan", [
            ("NaN goes on", "not math.isfinite(value)", "value is None"),
            ("NaN is told after the step", "require_finite(metrics)\n    optimizer.step()",
             "optimizer.step()\n    require_finite(metrics)")]),
        *by("test_steps::a_reading_puts_every_row_in_its_place_without_a_gradient", [
            ("a row of a reading is forgotten", "(len(lengths))", "(len(lengths) - 1)"),
            ("a reading in the order of the micro-batches", ":, micro, :", ":, : len(micro), :"),
            ("a reading with gradients", "torch.no_grad(), ", "")]),
        ("frozen weights are fp32 everywhere", "inference_dtype() if lora else", "",
         "test_lora::reference_and_judge_stay_while_policy_and_critic_learn[bf16]"),
    ],
    "runtime/flags.py": [
        ("a reward's file is no input", 'value.rpartition(":")[0] if', "value if",
         "test_reward::a_reward_may_be_the_users_own_function"),
        ("a terminal's encoding is strict", 'errors="replace"', 'errors="strict"',
         "test_runtime::a_terminal_of_another_encoding_does_not_end_a_script"),
        *by("test_runtime::a_flag_outside_its_range_is_named", [
            ("a bound is out of range", "<= getattr(cfg, name) <=", "< getattr(cfg, name) <"),
            ("any share", " <= rule.high:", ":")]),
        *by("test_runtime::cli_refuses_a_bad_command_line_with_code_2_and_names_the_flag", [
            ("infinity is a number", "not math.isfinite", "math.isnan"),
            ("flags may be cut short", "allow_abbrev=False", "allow_abbrev=True"),
            ("a seed below 0", "not 0 <= getattr", "not getattr")]),
        *by("test_runtime::words_without_a_flag_fill_a_field_of_texts", [
            ("a named set is a file", "path and not named", "path"),
            ("words are no inputs", 'word.partition("=")[::2] for word in value', "")]),
        *by("test_runtime::out_of_memory_names_the_command_and_every_flag_that_needs_less", [
            ("out of memory is a bug", "not out_of_memory", "out_of_memory"),
            ("PyTorch's CPU is not known", ' or "DefaultCPUAllocator" in str(error)', ""),
            ("a micro-batch of 0", "int and value > 1:", "int:")]),
        ("a library's error is the user's", "or not (ours or isinstance(error, OSError))", "",
         "test_runtime::a_bug_keeps_its_traceback"),
        ("the system's error is a bug", "(ours or isinstance(error, OSError))", "ours",
         "test_runtime::a_mistake_of_the_user_is_one_sentence"),
        ("a signal ends a script like an error", "128 + (stop.args[0] if stop.args else signal.SIGINT)", "2",
         "test_runtime::a_signal_ends_a_script_with_its_code_and_the_command_to_go_on"),
        ("a second signal waits too", "wait or SIGNALS.came == number", "wait",
         "test_checkpoint::the_same_signal_twice_stops_at_once"),
        ("a signal stops in the middle of a step", "not SIGNALS.wait or SIGNALS.came == number", "True",
         "test_checkpoint::a_signal_stops_after_the_step_with_the_state_saved"),
    ],
    "runtime/stage.py": [
        ("what closes a turn does not stop the saved model", "self.out, tokenizer.stop_ids", "self.out",
         "test_sft::what_closes_a_turn_ends_a_text_in_transformers_too"),
        *by("test_runtime::a_finished_stage_is_skipped_and_left_as_it_is", [
            ("less memory begins anew", " and key not in self.memory", ""),
            ("states of a finished stage stay", 'shutil.rmtree(self.folder / "resume", ignore_errors=True)', "pass"),
            ("a file counts by its name", "file != path:  # a", "True:  # a")]),
        *by("test_runtime::a_changed_setting_or_input_redoes_the_stage_and_keeps_the_old_one_aside", [
            ("another setting is not noticed", "if old", 'if part == "inputs" and old'),
            ("another input is not noticed", "if old", 'if part == "settings" and old'),
            ("the old folder is written over", "self.folder.rename(aside)\n            text", "text")]),
        *by("test_runtime::an_input_folder_counts_by_its_models_files_not_by_its_own_done_json", [
            ("a folder's names do not count", "digest.update(file.name.encode())", "pass"),
            ("weights do not count", ', ".safetensors"', ""),
            ("when an input was made counts", '"done.json", "metrics.jsonl"', '"metrics.jsonl",')]),
        ("a changed output is not noticed", "size or (digest and sha256(path) != digest)", "size",
         "test_runtime::a_missing_truncated_or_changed_output_is_made_again"),
        *by("test_runtime::another_precision_redoes_a_stage_that_has_a_network", [
            ("any precision will do", 'settings["precision"] = os', 'settings[""] = os'),
            ("a precision redoes everything", 'if self.memory and os.environ.get("PREC', 'if os.environ.get("PREC')]),
        ("two at work in one folder", "LOCK_EX | fcntl.LOCK_NB", "LOCK_UN",
         "test_runtime::a_folder_in_which_another_process_works_is_refused"),
        ("half-written files stay", 'self.folder.rglob("*.tmp")', "()", "test_runtime::what_an_attempt_left_goes"),
        ("a folder that cannot be written to", "place.is_dir() and os.access(place, os.W_OK)", "True",
         "test_runtime::a_folder_that_cannot_be_written_to_is_refused_before_the_work_unless_it_is_done"),
        ("ranges are not looked at", "        flags.check(cfg)\n", "",
         "test_runtime::a_finished_stage_stands_until_the_inputs_of_the_next_one_were_read"),
        ("NaN is a bug", "FloatingPointError", "ZeroDivisionError",
         "test_runtime::numbers_that_are_not_finite_end_a_stage_with_its_step"),
        ("done before it is on the disk", "sync(path)  # or a", "pass  # or a",
         "test_checkpoint::no_file_gets_its_name_before_its_bytes_are_on_the_disk"),
        ("control characters reach the terminal", "if c.isprintable()", "if c",
         "test_security::the_report_shows_what_a_model_said_and_does_not_obey_it"),
        *by("test_runtime::progress_prints_a_line_that_stays_now_and_then", [
            ("the time left of another attempt", "(self.count - self.first)", "self.count"),
            ("a line waits for its turn", "if at_once or (", "if (")]),
        ("a line every ten seconds of a long run", " and self.count - self.said >= self.total / 50", "",
         "test_runtime::a_long_loop_prints_at_most_fifty_lines"),
        ("every rank writes", '""\n        if ranks.RANK == 0', '""\n        if True',
         "test_ranks::ranks_train_as_one_and_only_one_prints[sft-2]"),
    ],
    "runtime/ranks.py": [
        *by("collectives_by_hand", [
            ("the largest is the sum", "MAX if largest else dist.ReduceOp.", ""),
            ("a sum in place", "x = x.clone()\n    dist", "dist"),
            ("each rank's own value for all", "return values", "return [value] * SIZE"),
            ("the last rank's value", "gather(value)[0]", "gather(value)[-1]")]),
        *by("no_rank_holds_more_than_its_share[2]", [
            ("nothing is sharded", "*model.model.layers, model", ""),
            ("a copy's head is a tensor of its own", "full.tie()", "pass")]),
        ("all ranks print", "started_as()[0]:", "False:", "ranks_train_as_one_and_only_one_prints[sft-2]"),
        ("one of several ends as usual", "os._exit(code)", "pass", "one_of_several_ends_at_once_with_its_code"),
    ],
    "runtime/preflight.py": [
        *by("parameters_are_counted", [
            ("tied embeddings count twice", 'D * (not config["tie_word_embeddings"])', "D"),
            ("qwen2's output has a bias", 'D * (config["model_type"] != "qwen2")', "D")]),
        *by("a_step_by_hand", [
            ("values are not kept", "Q + 2 * K + 4 * F", "Q + K + 4 * F"),
            ("a single moment", ', "moments": 8 * N', ', "moments": 4 * N'),
            ("checkpointing keeps nothing", "tokens * layers * 4 * D + ", "")]),
        *by("the_precision_that_is_set_counts", [
            ("activations of the device", "2.6) if bf16(cuda)", "2.6) if cuda"),
            ("copies of the device", "if bf16(cuda) and not", "if cuda and not")]),
        ("keys without values", "cache = 2 * config", "cache = config", "the_cache_is_as_large_as_it_is_said_to_be"),
        *by("ppo_holds_four_networks_or_with_adapters_two_frozen_ones", [
            ("no frozen networks", '["frozen"] = 4 *', '["frozen"] = 0 *'),
            ("copies beside adapters", "if not cfg.lora:", "if True:"),
            ("the network that waits has no weights", 'parts["weights"] += other', 'parts["weights"] += 0 * other'),
            ("the cache is fp32 with adapters", "2 if cfg.lora and bf16(cuda) else 4", "4"),
            ("a frozen head has a gradient", "if not (scalar or lora)", "if not scalar"),
            ("adapters beside six maps of seven", "7 * D + 2 * Q + 2 * K + 3 * F)", "6 * D + 2 * Q + 2 * K + 2 * F)")]),
        *by("the_largest_moment_is_said_with_its_parts", [
            ("the smallest moment", "needed = max", "needed = min"),
            ("a pass is never longer than micro_tokens", "max(cfg.micro_tokens, PROMPT + cfg.max_new_tokens)",
             "cfg.micro_tokens")]),
        *by("bf16_on_a_cpu_keeps_something_of_every_shape", [
            ("fp32 keeps shapes too", "if bf16(False) and not gpus:", "if not gpus:"),
            ("a large model keeps without end", "min(2e9, 16 *", "min(2e19, 16 *"),
            ("a small model keeps as much as a large one", "16 * parameters(student))", "2e9)")]),
        ("the teacher is forgotten", "Path(cfg.teacher).is_dir()", "False", "a_teacher_that_is_larger_counts"),
        ("an adapter is a folder without a file", '"an adapter: merge it into its model first" if adapter else ', "",
         "an_adapter_is_called_one"),
        ("more ranks than GPUs", "nproc <= gpus,", "nproc <= 8 * gpus,", "there_are_no_more_ranks_than_gpus"),
        *by("disk_for_weights_and_states", [
            ("one state on the disk", "2 * 2 * 1.5", "2 * 1.5"),
            ("all rounds in the room of one", "2 * cfg.rounds", "2"),
            ("a full disk will do", "disk < free_disk,", "True,")]),
    ],
    "assignments/handed_in.py": [
        *by("everything_that_is_handed_in_is_read_or_has_its_reason", [
            ("capitals in an archive's name", "inner.suffix.lower()", "inner.suffix"),
            ("backslashes of Windows", 'name.replace("\\\\", "/")', "name"),
            ("a lone file with a name before its own", "else LONE)", "else NAME)"),
            ("a damaged archive ends all", "except Exception as error:  # a damaged", "except KeyError as error:  #"),
            ("the deepest copy counts", "inner, data = min(", "inner, data = max("),
            ("what macOS adds counts", "if any(map(is_junk, inner.parts)):", "if False:"),
            ("what is no archive vanishes", "if not is_junk(part.name)", "if part.is_dir() or part.suffix == '.zip'"),
            ("carriage returns stay", '.replace("\\r\\n", "\\n")', "")]),
        ("links are followed", "path.is_dir() and path.resolve() not in", "False and path.resolve() not in",
         "a_link_to_the_solution_is_not_followed"),
    ],
    "assignments/exercises.py": by("a_body_is_exchanged_and_everything_else_stays", [
        ("a remark behind the solution stays", "            end = i + 1\n", "            pass\n"),
        ("the docstring goes too", "else node.body[0].end_lineno\n", "else node.body[0].lineno - 1\n")]),
    "assignments/handout.py": by("a_planted_solution_and_an_answer_of_the_lab_are_found", [
        ("another layout of a statement", "sorted(hidden & written)", "[]"),
        ("the lab's answers", 'for node in causes(sources["health.py"])', "for node in ()"),
        ("files of any kind", "if path.suffix not in (*KINDS", "if False and path.suffix not in (*KINDS")]),
    "train_all.sh": [
        *by("every_stage_gets_what_it_should", [
            ("PPO starts from the base model", '-policy "$policy"', '-policy "$STUDENT"'),
            ("the raw vote is gold", 'votes "$RUN/4_pseudo_reward/rewards.jsonl"', "gold"),
            ("the raw vote goes on from PPO", 'policy "$RUN/2_sft"', 'policy "$policy"'),
            ("best-of-n of the base model", 'SEED" "sft=$RUN/2_sft', 'SEED" "sft=$STUDENT'),
            ("SFT's row filled by PPO's model", 'STUDENT" "sft=$RUN/2_sft" "', 'STUDENT" "sft=$policy" "'),
            ("SFT samples for PPO", '2_sft" "ppo=$policy"\nif', '2_sft" "ppo=$RUN/2_sft"\nif'),
            ("PPO's row is its first round", 'ppo=$policy" "', 'ppo=$RUN/6_ppo" "'),
            ("a round's row is the next one's", "$((round - 1))=$", "$round=$"),
            ("SFT of the teacher", 'STUDENT" --data "$', 'TEACHER" --data "$'),
            ("the reward model starts from the base model", 'model "$RUN/2_sft"', 'model "$STUDENT"'),
            ("scores have the teacher's scale", "3_student/samples.", "1_teacher/samples."),
            ("the student votes from the start", '"" voters=teacher;', '"" voters=both;'),
            ("the student never votes", "=both # by now", "=teacher # by now"),
            ("every round samples the SFT student", 'model "$policy"', 'model "$RUN/2_sft"'),
            ("every round starts from SFT", "=$RUN/6_ppo$again", "=$RUN/2_sft"),
            ("the student samples at the teacher's temperatures", 'temperatures "$temperature"',
             'temperatures "$temperatures"'),
            ("best-of-n at the teacher's temperatures", '"$temperature" \\', '"$temperatures" \\'),
            ("as many samples as the teacher's", '"$student_samples"', '"$teacher_samples"'),
            ("policy and critic swap their rates", 'ppo_lr" --critic_lr "$critic_lr',
             'critic_lr" --critic_lr "$ppo_lr'),
            ("no share is too small", '" --min_share "$min_share" "', '" "'),
            ("PPO looks at the test questions", "0_questions/valid.", "0_questions/test."),
            ("asked what was trained on", "0_questions/train.", "0_questions/test."),
            ("the harder questions are the test's", "evaluate hard hard", "evaluate hard test"),
            ("valid and test swap their sizes", 'valid" --test "$test', 'test" --test "$valid'),
            ("a space in the student's path", 'model "$STUDENT" -', "model $STUDENT -"),
            ("a space in the clone's path", '"$here/runtime/', "$here/runtime/"),
            ("a space in the run's path", '"$2" --calibrate', "$2 --calibrate")]),
        ("a recorded teacher is asked", 'TEACHER\nif [ -d "$TEACHER" ]', "TEACHER\nif true",
         "a_recorded_teacher_is_not_asked"),
        ("line ends are not looked at", "*\"$(printf '\\r')\")", "none)", "windows_line_ends_are_called_so"),
        ("CDPATH is obeyed", "unset CDPATH && cd", "cd",
         "relative_paths_are_those_of_the_caller_whatever_cdpath_says"),
    ],
    "runtime/stages.sh": [
        *by("test_train_all::a_heading_says_what_a_stage_does_and_which_of_how_many_it_is", [
            ("one round for all", "6 + 4 * ROUNDS", "10"),
            ("a recorded teacher has a stage", 'if [ -d "$TEACHER" ]; then stages', "if true; then stages"),
            ("every set has harder questions", "arith | mawps) stages", "*) stages"),
            ("an experiment is stage 13 of 12", '[ "$place" -le "$stages" ]', "true")]),
        ("a quick report that does not say so", "set -- --quick", "set --",
         "test_train_all::the_environment_comes_before_quick_and_quick_before_the_preset"),
        *by("test_train_all::every_stage_gets_what_it_should", [
            ("one seed for all", '(--seed "$seed") ;', "(--seed 0) ;"),
            ("switches are always on", 'echo "--no-$1"; fi', 'echo "--$1"; fi'),
            ("SFT takes steps of its own size", "sft.py | reward.py) flags+=(--b", "reward.py) flags+=(--b"),
            ("a step is what is sampled at once", '"$train_batch")', '"$batch_size")'),
            ("the preset does not say how many pairs", '--pairs_per_question "$pairs_per_question"', ""),
            ("all weights whatever is asked", '(--lora "$lora" --micro', "(--micro")]),
        ("one rank for all", '[ "$NPROC" != 1 ];', '[ "$NPROC" = 0 ];',
         "test_train_all::every_command_parses_and_reads_what_was_written_before[NPROC=2]"),
        *by("test_train_all::from_redoes_a_stage_and_all_after_it", [
            ("FROM redoes that stage alone", '"$redo" = 1', '"$FROM" = "$stage"'),
            ("FROM redoes all", '("$PYTHON") redo=0', '("$PYTHON") redo=1'),
            ("an old stage is overwritten", '[ -e "$RUN/$stage.old$old" ]', "false")]),
        *by("test_train_all::a_signal_is_passed_on_once_and_the_stage_waited_for", [
            ("a stage is not waited for", 'wait "$child" || true', "break"),
            ("a stage that was stopped says nothing", 'fi\n  echo "stopped; what', 'exit; fi\n  echo "stopped; what'),
            ("what goes on forgets the precision", "NPROC PRECISION ", "NPROC "),
            ("what goes on forgets the numbers", ":-$asked$changed$", ":-$asked$")]),
        *by("test_train_all::a_bad_setting_is_one_sentence_before_any_command", [
            ("an unknown preset is a path", "^[A-Za-z0-9][A-Za-z0-9._-]*$", "."),
            ("0 questions will do", "\" '^[1-9][0-9]*$' \"", "\" '^[0-9]+$' \"")]),
    ],
    "bench/ablate.sh": [
        *by("test_train_all::the_arms_of_the_ablation_differ_from_the_run_in_one_thing", [
            ("a tenth of the questions", "NR % 10 == 1", "NR <= 3"),
            ("its own answers from the base model", 'supervise own "$RUN/2_sft"', 'supervise own "$STUDENT"'),
            ("brevity is rewarded twice", "controls.py:$kind", "controls.py:shorter"),
            ("the raw vote's KL is the learned one's", 'arm "raw_kl$times" "${votes', 'arm "raw_kl$times" "${learned'),
            ("a tenth is all of it", '+tenth.jsonl" "$', '/sft.jsonl" "$'),
            ("longer from the base model", 'longer "$RUN/2_sft"', 'longer "$STUDENT"'),
            ("as long as SFT itself", "ppo / sft * int", "sft / sft * int"),
            ("the critic is the teacher too", ' --critic "$RUN/5_reward"', ""),
            ("all answers, filtered", " --no-sft_filter", "")]),
        ("every seed is the same", "SEED=$1 OUT=$runs/", "SEED=0 OUT=$runs/",
         "test_train_all::the_ablation_runs_every_seed_and_compares_them"),
    ],
    "bench/pays.sh": [
        *by("test_train_all::fewer_votes_change_the_reward_alone", [
            ("few pairs are read as often as many", "$((times * reward_epochs))", "$reward_epochs"),
            ("few pairs are read without bound", "all / n < 10 ?", "all / n < 99 ?"),
            ("more votes than there are", '"$n" -ge "$all"', '"$n" -gt "$all"'),
            ("the raw vote keeps all votes", '--votes "$2/rewards', '--votes "$RUN/4_pseudo_reward/rewards'),
            ("both rewards with the learned one", 'arm "raw_$1" --votes "$2/rewards.jsonl"',
             'arm "raw_$1" --reward_model "$RUN/5_reward+$1"')]),
        ("all runs have one teacher", " TEACHER=${!teacher}", "", "test_train_all::every_teacher_has_runs_of_its_own"),
    ],
    "presets/_quick.sh": [
        ("QUICK=1 overrules the environment", "${train:=60}", '" && train=60 && : "',
         "test_train_all::the_environment_comes_before_quick_and_quick_before_the_preset"),
    ],
    "presets/_real.sh": [
        ("a lone letter is an answer", '"${lenient:=0}" ;;', '"${lenient:=1}" ;;',
         "test_train_all::a_lone_letter_is_no_answer_to_a_choice"),
    ],
}.items() for entry in entries]


# ---- running -------------------------------------------------------------------------------------------------------


@functools.cache
def program(path: Path):
    return compile(path.read_text(encoding="utf-8"), str(path), "exec")


def module_name(path: Path) -> str:
    """Example: tasks/arith.py -> tasks.arith, tasks/__init__.py -> tasks; bench/judge.py -> judge."""
    inside = f"{path.parent.name}." if (path.parent / "__init__.py").is_file() else ""
    return f"{inside}{path.stem}".removesuffix(".__init__")


class OwnModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports of scripts and tests get programs that are compiled once, a mutant's script the one with the bug."""

    def __init__(self):
        packages = [path.parent for path in ROOT.glob("*/__init__.py")]
        folders = (ROOT / "bench/tests", ROOT / "bench", ROOT / "assignments", TESTS, ROOT, *packages)
        self.files = {module_name(path): path for folder in folders for path in folder.glob("*.py")}
        self.mutated = {}

    def find_spec(self, fullname, path=None, target=None):
        if fullname in self.files:
            path = self.files[fullname]
            inside = [str(path.parent)] if path.stem == "__init__" else None
            return importlib.util.spec_from_file_location(
                fullname, path, loader=self, submodule_search_locations=inside)

    def exec_module(self, module):
        exec(self.mutated.get(module.__name__) or program(self.files[module.__name__]), module.__dict__)

    def forget(self):
        """The next import starts anew."""
        for name in self.files.keys() & sys.modules.keys() - {"mutants"}:
            del sys.modules[name]


class FirstFailure:
    """A pytest plugin: which test failed first."""

    name = None

    def pytest_runtest_logreport(self, report):
        if report.failed and self.name is None:
            self.name = report.nodeid.split("::", 1)[1]

    def pytest_collectreport(self, report):
        if report.failed:
            raise RuntimeError(f"{report.nodeid} cannot be collected: {report.longreprtext}")


def failing(node_ids: list[str], folder: str) -> str | None:
    """Run tests in this process; the first that fails, or None."""
    import pytest

    first, output = FirstFailure(), io.StringIO()
    options = ["-x", "-q", "-s", "--assert=plain", f"--rootdir={ROOT}", f"--basetemp={folder}/t", "-W", "ignore"]
    options += ["-o", "addopts="]  # marked or not: who is named runs
    for plugin in ("cacheprovider", "hypothesispytest", "unraisableexception", "threadexception", "faulthandler"):
        options += ["-p", f"no:{plugin}"]
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = pytest.main([*options, *node_ids], plugins=[first])
    if code not in (0, 1):
        raise RuntimeError(f"pytest ended with {code!r}\n{output.getvalue()}")
    return first.name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="text in the file or the name of a mutant")
    only = parser.parse_args().only
    chosen = [mutant for mutant in MUTANTS if only in mutant.file or only in mutant.name]
    start, survived, stale = time.monotonic(), [], []
    modules = OwnModules()
    sys.meta_path.insert(0, modules)
    with tempfile.TemporaryDirectory() as folder:
        broken = failing(sorted({node_id for mutant in chosen for node_id in mutant.node_ids}), folder)
        if broken:
            print(f"{broken} fails without any mutant")
            return 1
        print(f"the named tests pass on the code as it is ({time.monotonic() - start:.0f} s)", flush=True)
        for mutant in chosen:
            label = f"{mutant.file}: {mutant.name}"
            try:
                source = mutant.source()
            except ValueError as error:
                stale.append(label)
                print(f"{label}: STALE, {error}", flush=True)
                continue
            modules.forget()
            modules.mutated = {}
            if mutant.file.endswith(".py"):
                modules.mutated = {module_name(ROOT / mutant.file): compile(source, str(ROOT / mutant.file), "exec")}
            else:
                place = Path(folder, "shell", mutant.file)
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_text(source, encoding="utf-8")
                os.environ["MUTANT"] = f"{folder}/shell"
            catcher = failing(mutant.node_ids, folder)
            if os.environ.pop("MUTANT", None):
                place.unlink()
            survived += [] if catcher else [label]
            print(f"{label}: {f'caught by {catcher}' if catcher else 'SURVIVED'}", flush=True)
    for label in survived + stale:
        print(f"not caught: {label}")
    seconds = time.monotonic() - start
    print(f"{len(chosen)} mutants, {len(survived)} survived, {len(stale)} stale, {seconds:.0f} s")
    return int(bool(survived or stale or not chosen))


if __name__ == "__main__":
    sys.exit(main())
