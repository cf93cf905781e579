"""Seeded bugs: every entry is a small change to a script, and a test that must fail because of it.

    python tests/mutants.py                  # all of them, in one process
    python tests/mutants.py --only ppo       # those whose file or name holds this text

A mutant is served by an import hook, so no file is changed. First the named tests must pass on the code as it is; then
each runs on its mutants, and a mutant under which all of them still pass has survived. Exit code 1 if one survives,
or if an entry no longer fits the code (its `old` text must occur exactly once).
"""

import argparse
import contextlib
import functools
import importlib.abc
import importlib.util
import io
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent


@dataclass(frozen=True)
class Mutant:
    """`new` instead of `old` in a script; one of `tests` (names without test_, or 'file::name') must fail."""

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
            ids.append(f"{TESTS / (file or 'test_' + Path(self.file).stem)}.py::test_{name}")
        return ids

    def source(self) -> str:
        """The script with the bug in it. ValueError if the entry no longer fits."""
        text = (ROOT / self.file).read_text(encoding="utf-8")
        if text.count(self.old) != 1:
            raise ValueError(f"{self.file}: {self.old!r} occurs {text.count(self.old)} times")
        return text.replace(self.old, self.new)


MUTANTS = [Mutant(file, *entry) for file, entries in {
    "ppo.py": [
        ("the KL is rewarded", "torch.where(mask, -kl_coef * (logprobs - ref_logprobs), 0.0)",
         "torch.where(mask, kl_coef * (logprobs - ref_logprobs), 0.0)",
         "the_score_enters_once_at_the_end_token_and_the_kl_at_every_token"),
        ("KL on prompt and padding", "torch.where(mask, -kl_coef * (logprobs - ref_logprobs), 0.0)",
         "-kl_coef * (logprobs - ref_logprobs)", "rewards_of_rows_of_different_length_and_with_a_prompt"),
        ("the KL counted twice", "torch.where(mask, -kl_coef * (logprobs - ref_logprobs), 0.0)",
         "torch.where(mask, -2 * kl_coef * (logprobs - ref_logprobs), 0.0)",
         "the_score_enters_once_at_the_end_token_and_the_kl_at_every_token"),
        ("KL as the squared difference", "torch.where(mask, -kl_coef * (logprobs - ref_logprobs), 0.0)",
         "torch.where(mask, -kl_coef * 0.5 * (logprobs - ref_logprobs) ** 2, 0.0)",
         "the_score_enters_once_at_the_end_token_and_the_kl_at_every_token"),
        ("mean KL of the answer on every token",
         "rewards = torch.where(mask, -kl_coef * (logprobs - ref_logprobs), 0.0)",
         "rewards = torch.where(mask, -kl_coef * masked_mean(logprobs - ref_logprobs, mask), 0.0)",
         "the_score_enters_once_at_the_end_token_and_the_kl_at_every_token"),
        ("the score on every token", "last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)", "last = mask",
         "the_score_enters_once_at_the_end_token_and_the_kl_at_every_token"),
        ("the score on the first token", "last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)",
         "last = mask & (mask.cumsum(1) == 1)", "the_score_enters_once_at_the_end_token_and_the_kl_at_every_token"),
        ("the score on the token before the end", "last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)",
         "last = mask & (mask.flip(1).cumsum(1).flip(1) == 2)",
         "the_score_enters_once_at_the_end_token_and_the_kl_at_every_token"),
        ("the score after the end token", "last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)",
         "last = (mask & (mask.flip(1).cumsum(1).flip(1) == 1)).roll(1, 1)",
         "the_score_enters_once_at_the_end_token_and_the_kl_at_every_token"),
        ("the score in the last column", "last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)",
         "last = torch.arange(mask.shape[1]) == mask.shape[1] - 1",
         "the_score_enters_once_at_the_end_token_and_the_kl_at_every_token"),
        ("no discount by lambda", "delta + gamma * lam * next_advantage", "delta + gamma * next_advantage",
         "gae_by_hand"),
        ("no discount by gamma in the advantages", "delta + gamma * lam * next_advantage",
         "delta + lam * next_advantage", "gae_by_hand"),
        ("GAE from left to right", "for t in reversed(range(values.shape[1])):", "for t in range(values.shape[1]):",
         "gae_by_hand"),
        ("GAE bootstraps at the end", "next_value = next_advantage = torch.zeros_like(values[:, 0])",
         "next_value, next_advantage = values[:, -1], torch.zeros_like(values[:, 0])", "gae_by_hand"),
        ("values of the padding leak into GAE", "    values = torch.where(mask, values, 0.0)\n"
         "    advantages = ", "    advantages = ", "gae_does_not_see_the_padding"),
        ("advantages of the padding leak",
         "advantages[:, t] = torch.where(mask[:, t], delta + gamma * lam * next_advantage, 0.0)",
         "advantages[:, t] = delta + gamma * lam * next_advantage", "gae_does_not_see_the_padding"),
        ("the value has the wrong sign in delta", "gamma * next_value - values[:, t]",
         "gamma * next_value + values[:, t]", "gae_by_hand"),
        ("the next value is the reward's", "next_value, next_advantage = values[:, t], advantages[:, t]",
         "next_value, next_advantage = values[:, t], delta", "gae_by_hand"),
        ("the next value is never carried on", "next_value, next_advantage = values[:, t], advantages[:, t]",
         "next_advantage = advantages[:, t]", "gae_by_hand"),
        ("returns without the values", "return advantages, advantages + values", "return advantages, advantages",
         "gae_by_hand"),
        ("whitening counts the padding", "    mean = masked_mean(x, mask)\n"
         "    variance = masked_mean((x - mean).square(), mask)", "    x = torch.where(mask, x, 0.0)\n"
         "    mean = x.mean()\n"
         "    variance = (x - mean).square().mean()",
         "whitening_gives_mean_zero_and_biased_variance_one_over_the_mask"),
        ("whitening with the unbiased variance", "variance = masked_mean((x - mean).square(), mask)",
         "variance = masked_mean((x - mean).square(), mask) * mask.sum() / (mask.sum() - 1)",
         "whitening_gives_mean_zero_and_biased_variance_one_over_the_mask"),
        ("whitening keeps the mean", "torch.where(mask, (x - mean) * torch.rsqrt",
         "torch.where(mask, x * torch.rsqrt", "whitening_gives_mean_zero_and_biased_variance_one_over_the_mask"),
        ("whitening adds the mean again", "torch.rsqrt(variance + 1e-8), 0.0)",
         "torch.rsqrt(variance + 1e-8) + mean, 0.0)",
         "whitening_gives_mean_zero_and_biased_variance_one_over_the_mask"),
        ("whitening divides by the variance", "torch.rsqrt(variance + 1e-8)", "1 / (variance + 1e-8)",
         "whitening_gives_mean_zero_and_biased_variance_one_over_the_mask"),
        ("the variance is the mean square", "variance = masked_mean((x - mean).square(), mask)",
         "variance = masked_mean(x.square(), mask)",
         "whitening_gives_mean_zero_and_biased_variance_one_over_the_mask"),
        ("whitening within each row", "mean = masked_mean(x, mask)",
         "mean = (torch.where(mask, x, 0.0).sum(1) / mask.sum(1).clamp(min=1))[:, None]",
         "a_bandit_converges_to_its_closed_form_optimum"),
        ("minimum of the two surrogates", "torch.where(mask, torch.maximum(plain, clipped), 0.0).sum() / total\n"
         "    return loss, (mask & (clipped > plain)).sum()\n"
         "\n"
         "\n"
         "def value_loss", "torch.where(mask, torch.minimum(plain, clipped), 0.0).sum() / total\n"
         "    return loss, (mask & (clipped > plain)).sum()\n"
         "\n"
         "\n"
         "def value_loss", "clipped_surrogate_by_hand"),
        ("no clip", "-advantages * ratio.clamp(1 - clip, 1 + clip)", "-advantages * ratio",
         "clipped_surrogate_by_hand"),
        ("clipped from above alone", "ratio.clamp(1 - clip, 1 + clip)", "ratio.clamp(max=1 + clip)",
         "clipped_surrogate_by_hand"),
        ("clipped from below alone", "ratio.clamp(1 - clip, 1 + clip)", "ratio.clamp(min=1 - clip)",
         "clipped_surrogate_by_hand"),
        ("the policy goes down the advantage", "plain, clipped = -advantages * ratio, -advantages * ratio.clamp",
         "plain, clipped = advantages * ratio, advantages * ratio.clamp", "clipped_surrogate_by_hand"),
        ("the ratio turned round", "torch.where(mask, logprobs - old_logprobs, 0.0).clamp",
         "torch.where(mask, old_logprobs - logprobs, 0.0).clamp", "clipped_surrogate_by_hand"),
        ("no guard of the ratio", ".clamp(-20, 20).exp()", ".exp()", "an_absurd_ratio_stays_finite"),
        ("a guard that cuts real ratios", ".clamp(-20, 20).exp()", ".clamp(-1, 1).exp()",
         "clipped_surrogate_by_hand"),
        ("the ratio is detached", ".clamp(-20, 20).exp()", ".clamp(-20, 20).exp().detach() + 0 * logprobs",
         "clipped_surrogate_by_hand"),
        ("the policy's loss divides by its own tokens",
         "torch.where(mask, torch.maximum(plain, clipped), 0.0).sum() / total\n"
         "    return loss, (mask & (clipped > plain)).sum()\n"
         "\n"
         "\n"
         "def value_loss", "torch.where(mask, torch.maximum(plain, clipped), 0.0).sum() / mask.sum()\n"
         "    return loss, (mask & (clipped > plain)).sum()\n"
         "\n"
         "\n"
         "def value_loss", "the_loss_divides_by_the_tokens_of_the_whole_step"),
        ("mean over rows of the rows' means", "torch.where(mask, torch.maximum(plain, clipped), 0.0).sum() / total\n"
         "    return loss, (mask & (clipped > plain)).sum()\n"
         "\n"
         "\n"
         "def value_loss", "(torch.where(mask, torch.maximum(plain, clipped), 0.0).sum(1) / mask.sum(1)).mean()\n"
         "    return loss, (mask & (clipped > plain)).sum()\n"
         "\n"
         "\n"
         "def value_loss", "the_loss_divides_by_the_tokens_of_the_whole_step"),
        ("the policy's loss counts the padding",
         "torch.where(mask, torch.maximum(plain, clipped), 0.0).sum() / total\n"
         "    return loss, (mask & (clipped > plain)).sum()\n"
         "\n"
         "\n"
         "def value_loss", "torch.maximum(plain, clipped).sum() / total\n"
         "    return loss, (mask & (clipped > plain)).sum()\n"
         "\n"
         "\n"
         "def value_loss", "the_loss_divides_by_the_tokens_of_the_whole_step"),
        ("minimum of the two value errors", "loss = 0.5 * torch.where(mask, torch.maximum(plain, clipped), 0.0)",
         "loss = 0.5 * torch.where(mask, torch.minimum(plain, clipped), 0.0)", "clipped_value_loss_by_hand"),
        ("the value loss without its half", "loss = 0.5 * torch.where(mask, torch.maximum",
         "loss = torch.where(mask, torch.maximum",
         "before_any_step_the_whitened_loss_is_zero_and_the_critics_is_half_the_squared_advantage"),
        ("the value clip is forgotten", "near = old_values + (values - old_values).clamp(-clip, clip)",
         "near = values", "clipped_value_loss_by_hand"),
        ("the value clip around 0", "near = old_values + (values - old_values).clamp(-clip, clip)",
         "near = values.clamp(-clip, clip)",
         "before_any_step_the_whitened_loss_is_zero_and_the_critics_is_half_the_squared_advantage"),
        ("the value clip one-sided", "(values - old_values).clamp(-clip, clip)",
         "(values - old_values).clamp(max=clip)", "clipped_value_loss_by_hand"),
        ("the critic learns the old value", "plain, clipped = (values - returns).square(), (near - returns).square()",
         "plain, clipped = (values - old_values).square(), (near - old_values).square()",
         "before_any_step_the_whitened_loss_is_zero_and_the_critics_is_half_the_squared_advantage"),
        ("the critic's padding holds NaN",
         "    values, old_values, returns = (torch.where(mask, x, 0.0) for x in (values, old_values, "
         "returns))  # (B, T-1) each\n", "",
         "poison_in_masked_cells_changes_neither_loss_nor_gradient_of_the_critic"),
        ("the critic's loss divides by its own tokens",
         "loss = 0.5 * torch.where(mask, torch.maximum(plain, clipped), 0.0).sum() / total",
         "loss = 0.5 * torch.where(mask, torch.maximum(plain, clipped), 0.0).sum() / mask.sum()",
         "the_value_loss_divides_by_the_tokens_of_the_whole_step"),
        ("sampled at another temperature than scored",
         "generate(policy, prompts, cfg.max_new_tokens, cfg.temperature, stop, seed",
         "generate(policy, prompts, cfg.max_new_tokens, 1.0, stop, seed",
         "the_log_probs_are_those_of_the_tempered_softmax_that_was_sampled"),
        ("old log-probs without the temperature",
         "masked_logprobs(policy, tokens[rows], mask[rows], cfg.temperature)",
         "masked_logprobs(policy, tokens[rows], mask[rows])",
         "the_log_probs_are_those_of_the_tempered_softmax_that_was_sampled"),
        ("the reference without the temperature",
         "masked_logprobs(reference, tokens[rows], mask[rows], cfg.temperature)",
         "masked_logprobs(reference, tokens[rows], mask[rows])",
         "the_log_probs_are_those_of_the_tempered_softmax_that_was_sampled"),
        ("the reference is the policy", "masked_logprobs(reference, tokens[rows], mask[rows], cfg.temperature)",
         "masked_logprobs(policy, tokens[rows], mask[rows], cfg.temperature)",
         "a_whole_run_is_the_loop_that_is_written_out_here[reward_model]"),
        ("the critic has seen the token", "critic(tokens[rows])[:, :-1], entropy))",
         "critic(tokens[rows])[:, 1:], entropy))", "a_value_has_seen_the_tokens_before_its_own_and_no_other"),
        ("every rollout draws with one seed", "stop, seed, size,",
         "stop, 0, size,",
         "nothing_in_a_rollout_carries_a_gradient_and_its_seed_repeats_it"),
        ("the policy does not stop at the end token", "cfg.temperature, stop, seed",
         "cfg.temperature, (), seed",
         "the_rollout_mask_is_the_sampled_tokens_with_the_end_token_and_nothing_after_it"),
        ("unfinished and finished answers swapped",
         "ended = torch.tensor([response.finish == \"stop\" for response in sampled])",
         "ended = torch.tensor([response.finish != \"stop\" for response in sampled])",
         "the_rollout_mask_is_the_sampled_tokens_with_the_end_token_and_nothing_after_it"),
        ("the penalty of unfinished answers is added",
         "torch.where(ended, score(questions, prompts, responses, texts), cfg.unfinished_score)",
         "score(questions, prompts, responses, texts) + ~ended * cfg.unfinished_score",
         "the_score_arrives_at_the_end_token_and_unfinished_answers_get_theirs"),
        ("unfinished answers keep their score",
         "torch.where(ended, score(questions, prompts, responses, texts), cfg.unfinished_score)",
         "score(questions, prompts, responses, texts)",
         "the_score_arrives_at_the_end_token_and_unfinished_answers_get_theirs"),
        ("the end token is cut off before scoring and training",
         "responses = [response.tokens for response in sampled]",
         "responses = [response.tokens[:-1] or response.tokens for response in sampled]",
         "the_rollout_mask_is_the_sampled_tokens_with_the_end_token_and_nothing_after_it"),
        ("a micro-batch of the rollout is forgotten", ".split(cfg.micro_batch):\n"
         "        # the function", ".split(cfg.micro_batch)[:-1]:\n"
         "        # the function", "the_rollout_mask_is_the_sampled_tokens_with_the_end_token_and_nothing_after_it"),
        ("a single permutation for all epochs", "    for _ in range(cfg.epochs):\n"
         "        order = torch.randperm(len(r.tokens), generator=rng).to(r.tokens.device)  # (B,)\n",
         "    order = torch.randperm(len(r.tokens), generator=rng).to(r.tokens.device)  # (B,)\n"
         "    for _ in range(cfg.epochs):\n", "every_epoch_sees_every_row_once_in_fresh_minibatches"),
        ("minibatches in the order of the rollout",
         "order = torch.randperm(len(r.tokens), generator=rng).to(r.tokens.device)",
         "order = torch.arange(len(r.tokens))", "two_minibatches_are_two_steps_of_their_own"),
        ("minibatches drawn with replacement",
         "order = torch.randperm(len(r.tokens), generator=rng).to(r.tokens.device)",
         "order = torch.randint(len(r.tokens), (len(r.tokens),), generator=rng)",
         "one_step_is_the_policy_gradient_and_the_value_gradient"),
        ("the last minibatch is dropped", "for minibatch in order.split(size):",
         "for minibatch in order.split(size)[: max(1, cfg.minibatches - 1)]:",
         "two_minibatches_are_two_steps_of_their_own"),
        ("one epoch whatever is asked", "for _ in range(cfg.epochs):", "for _ in range(1):",
         "on_the_first_minibatch_the_ratio_is_one_and_in_the_second_epoch_it_has_moved"),
        ("total of the micro-batch", "total = int(r.mask[minibatch].sum())",
         "total = int(r.mask[minibatch[: cfg.micro_batch]].sum())",
         "the_micro_batch_changes_memory_and_not_the_result"),
        ("total counts the padding", "total = int(r.mask[minibatch].sum())", "total = r.mask[minibatch].numel()",
         "one_step_is_the_policy_gradient_and_the_value_gradient"),
        ("new log-probs without the temperature", "masked_logprobs(policy, r.tokens[b], mask, cfg.temperature)",
         "masked_logprobs(policy, r.tokens[b], mask)",
         "on_the_first_minibatch_the_ratio_is_one_and_in_the_second_epoch_it_has_moved"),
        ("old log-probs are recomputed", "pg, clipped = policy_loss(logprobs, r.logprobs[b],",
         "pg, clipped = policy_loss(logprobs, logprobs.detach(),",
         "clipping_is_around_the_log_probs_and_values_of_the_rollout"),
        ("old log-probs are not detached", "pg, clipped = policy_loss(logprobs, r.logprobs[b],",
         "pg, clipped = policy_loss(logprobs, logprobs,", "one_step_is_the_policy_gradient_and_the_value_gradient"),
        ("the ratio is to the reference", "pg, clipped = policy_loss(logprobs, r.logprobs[b],",
         "pg, clipped = policy_loss(logprobs, r.ref_logprobs[b],",
         "clipping_is_around_the_log_probs_and_values_of_the_rollout"),
        ("advantages of other rows", "r.logprobs[b], advantages[b], mask",
         "r.logprobs[b], advantages[: len(b)], mask", "one_step_is_the_policy_gradient_and_the_value_gradient"),
        ("returns of other rows", "r.values[b], returns[b], mask", "r.values[b], returns[: len(b)], mask",
         "one_step_is_the_policy_gradient_and_the_value_gradient"),
        ("the update's critic has seen the token", "values = critic(r.tokens[b])[:, :-1]  # (b, T-1)\n",
         "values = critic(r.tokens[b])[:, 1:]  # (b, T-1)\n",
         "one_step_is_the_policy_gradient_and_the_value_gradient"),
        ("old values are recomputed", "vf, value_clipped = value_loss(values, r.values[b],",
         "vf, value_clipped = value_loss(values, values.detach(),",
         "clipping_is_around_the_log_probs_and_values_of_the_rollout"),
        ("the critic learns whitened advantages", "r.values[b], returns[b], mask", "r.values[b], advantages[b], mask",
         "one_step_is_the_policy_gradient_and_the_value_gradient"),
        ("the policy's loss is not propagated", "                pg.backward()  # at once",
         "                (0 * pg).backward()  # at once", "one_step_is_the_policy_gradient_and_the_value_gradient"),
        ("the critic's loss is not propagated", "                vf.backward()\n",
         "                (0 * vf).backward()\n", "one_step_is_the_policy_gradient_and_the_value_gradient"),
        ("gradients are not clipped", "torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm)",
         "torch.nn.utils.clip_grad_norm_(model.parameters(), 1e12)",
         "the_gradient_is_clipped_once_per_network_and_logged_as_it_was"),
        ("gradients are not set to zero", "                optimizer.zero_grad(set_to_none=True)\n", "",
         "two_minibatches_are_two_steps_of_their_own"),
        ("only the policy steps", "            for optimizer in optimizers:\n"
         "                optimizer.step()", "            for optimizer in optimizers[:1]:\n"
         "                optimizer.step()", "one_step_is_the_policy_gradient_and_the_value_gradient"),
        ("approximate KL without its half", "0.5 * log_ratio.square().sum()", "log_ratio.square().sum()",
         "the_metrics_of_an_update_are_means_over_its_tokens"),
        ("the learning rate is never set",
         "            runtime.set_lr(optimizer, lr * runtime.lr_at(iteration, cfg.iterations, cfg.warmup))\n",
         "            pass\n", "a_whole_run_is_the_loop_that_is_written_out_here[reward_model]"),
        ("the critic learns at the policy's rate", "zip(optimizers, (cfg.lr, cfg.critic_lr)):",
         "zip(optimizers, (cfg.lr, cfg.lr)):", "a_whole_run_is_the_loop_that_is_written_out_here[reward_model]"),
        ("no warm-up", "runtime.lr_at(iteration, cfg.iterations, cfg.warmup)",
         "runtime.lr_at(iteration, cfg.iterations, 0)",
         "a_whole_run_is_the_loop_that_is_written_out_here[reward_model]"),
        ("one optimiser trains the policy twice", "for model, lr in ((policy, cfg.lr), (critic, cfg.critic_lr))",
         "for model, lr in ((policy, cfg.lr), (policy, cfg.critic_lr))",
         "a_whole_run_is_the_loop_that_is_written_out_here[reward_model]"),
        ("weight decay", "eps=1e-5, weight_decay=0.0)", "eps=1e-5, weight_decay=0.01)",
         "a_whole_run_is_the_loop_that_is_written_out_here[reward_model]"),
        ("an epsilon that amplifies small gradients", "eps=1e-5, weight_decay=0.0)", "eps=1e-8, weight_decay=0.0)",
         "a_whole_run_is_the_loop_that_is_written_out_here[reward_model]"),
        ("the reference is the policy itself",
         "reference = load_model(cfg.reference or cfg.policy, torch.float32, device).requires_grad_(False)",
         "reference = policy", "a_whole_run_is_the_loop_that_is_written_out_here[reward_model]"),
        ("the flag of the reference is ignored", "load_model(cfg.reference or cfg.policy,", "load_model(cfg.policy,",
         "a_whole_run_is_the_loop_that_is_written_out_here[gold]"),
        ("the critic starts from nothing",
         "critic = load_scalar_model(cfg.critic or cfg.reward_model, torch.float32, device)",
         "critic = load_scalar_model(cfg.policy, torch.float32, device, new_head=\"zero\")",
         "a_whole_run_is_the_loop_that_is_written_out_here[reward_model]"),
        ("the reward model is the critic that is trained",
         "scorer = load_scalar_model(cfg.reward_model, torch.float32, device).requires_grad_(False)",
         "scorer = critic", "a_whole_run_is_the_loop_that_is_written_out_here[reward_model]"),
        ("the critic without a reward model is random", "new_head=\"zero\")\n"
         "    if cfg.reward_model:", "new_head=\"normal\")\n"
         "    if cfg.reward_model:", "a_whole_run_is_the_loop_that_is_written_out_here[votes]"),
        ("the models are in bf16", "policy = load_model(cfg.policy, torch.float32, device)",
         "policy = load_model(cfg.policy, torch.bfloat16, device)",
         "a_whole_run_is_the_loop_that_is_written_out_here[reward_model]"),
        ("questions are never shuffled", "order += torch.randperm(len(questions), generator=rng).tolist()",
         "order += list(range(len(questions)))", "a_whole_run_is_the_loop_that_is_written_out_here[reward_model]"),
        ("questions drawn with replacement", "order += torch.randperm(len(questions), generator=rng).tolist()",
         "order += torch.randint(len(questions), (len(questions),), generator=rng).tolist()",
         "a_whole_run_is_the_loop_that_is_written_out_here[reward_model]"),
        ("the same questions in every iteration",
         "batch, order = [questions[i] for i in order[: cfg.rollout_size]], order[cfg.rollout_size :]",
         "batch = [questions[i] for i in order[: cfg.rollout_size]]",
         "a_whole_run_is_the_loop_that_is_written_out_here[reward_model]"),
        ("the sampling seed does not move", "seed=cfg.seed * 1_000_003 + iteration)", "seed=cfg.seed * 1_000_003)",
         "a_whole_run_is_the_loop_that_is_written_out_here[reward_model]"),
        ("the seed is ignored", "rng = runtime.seed_all(cfg.seed)", "rng = runtime.seed_all(0)",
         "a_whole_run_is_the_loop_that_is_written_out_here[reward_model]"),
        ("KL with the sign of a bonus in the loop",
         "shape_rewards(r.scores, r.logprobs, r.ref_logprobs, r.mask, cfg.kl_coef)",
         "shape_rewards(r.scores, r.ref_logprobs, r.logprobs, r.mask, cfg.kl_coef)",
         "a_whole_run_is_the_loop_that_is_written_out_here[reward_model]"),
        ("gamma and lambda swapped", "gae(rewards, r.values, r.mask, cfg.gamma, cfg.lam)",
         "gae(rewards, r.values, r.mask, cfg.lam, cfg.gamma)",
         "a_whole_run_is_the_loop_that_is_written_out_here[reward_model]"),
        ("advantages are not whitened", "optimizers, r, whiten(advantages, r.mask), returns, rng)",
         "optimizers, r, advantages, returns, rng)",
         "a_whole_run_is_the_loop_that_is_written_out_here[reward_model]"),
        ("returns are whitened too", "optimizers, r, whiten(advantages, r.mask), returns, rng)",
         "optimizers, r, whiten(advantages, r.mask), whiten(returns, r.mask), rng)",
         "a_whole_run_is_the_loop_that_is_written_out_here[reward_model]"),
        ("votes and answers are opposites", "return torch.tensor(right) * 2.0 - 1.0",
         "return 1.0 - torch.tensor(right) * 2.0", "a_whole_run_is_the_loop_that_is_written_out_here[votes]"),
        ("lenient is ignored", "extract_answer(text, q.kind, cfg.lenient) for q, text",
         "extract_answer(text, q.kind) for q, text", "a_whole_run_is_the_loop_that_is_written_out_here[votes]"),
        ("held-out questions are trained on", "questions = load_questions(cfg.questions)\n"
         "    valid", "questions = load_questions(cfg.valid or cfg.questions)\n"
         "    valid", "a_whole_run_is_the_loop_that_is_written_out_here[reward_model]"),
        ("the critic is saved for the policy", "    save_model(policy, cfg.out)\n",
         "    save_model(reference, cfg.out)\n", "a_whole_run_is_the_loop_that_is_written_out_here[reward_model]"),
        ("the ratio is not watched", "(gap := metrics[\"val/ratio_first_gap\"]) > 1e-3",
         "(gap := metrics[\"val/ratio_first_gap\"]) > 1e3", "an_update_that_disagrees_with_its_rollout_is_an_error"),
        ("NaN goes on", "if not math.isfinite(value)]", "if value is None]",
         "nan_stops_before_the_step_and_keeps_the_last_good_policy"),
        ("held-out questions are asked after the update", "if iteration % cfg.eval_every == 0 or",
         "if iteration % cfg.eval_every == 1 or",
         "held_out_questions_are_asked_before_the_first_update_and_now_and_then"),
        ("the KL per token", "kl = torch.where(r.mask, r.logprobs - r.ref_logprobs, 0.0).sum(1)  # (B,)\n"
         "    values, targets", "kl = torch.where(r.mask, r.logprobs - r.ref_logprobs, 0.0).mean(1)  # (B,)\n"
         "    values, targets", "the_rollouts_metrics_by_hand"),
        ("the penalty is added in the log", "\"objective/rlhf_reward\": (r.scores - cfg.kl_coef * kl)",
         "\"objective/rlhf_reward\": (r.scores + cfg.kl_coef * kl)", "the_rollouts_metrics_by_hand"),
        ("explained variance of the values' own variance", "(targets - values).var(correction=0) / spread",
         "(targets - values).var(correction=0) / (values.var(correction=0) + 1e-5)", "the_rollouts_metrics_by_hand"),
    ],
    "reward.py": [
        ("chosen and rejected swapped in the loss", "-(F.logsigmoid(chosen - rejected) * weight)",
         "-(F.logsigmoid(rejected - chosen) * weight)", "loss_and_gradient_of_one_pair"),
        ("the loss overflows", "-(F.logsigmoid(chosen - rejected) * weight)",
         "-(torch.log(torch.sigmoid(chosen - rejected)) * weight)",
         "a_hopeless_margin_has_a_finite_loss_and_a_full_gradient"),
        ("the loss has the wrong sign", "return -(F.logsigmoid", "return (F.logsigmoid",
         "loss_and_gradient_of_one_pair"),
        ("the sum over pairs", ".sum() / weight.sum()", ".sum()", "loss_is_the_mean_over_pairs"),
        ("the mean over pairs ignores the weights below", ".sum() / weight.sum()", ".sum() / len(weight)",
         "weights_make_questions_count_alike"),
        ("the weights are ignored", "(F.logsigmoid(chosen - rejected) * weight).sum() / weight.sum()",
         "F.logsigmoid(chosen - rejected).mean()", "weights_make_questions_count_alike"),
        ("held out by Python's hash", "key=lambda key: hashlib.sha256(key.encode()).hexdigest()",
         "key=lambda key: key", "held_out_questions_are_a_share_of_the_different_ids_whatever_their_order"),
        ("held out by pair", "ordered = sorted(set(ids), key", "ordered = sorted(ids, key",
         "held_out_questions_are_a_share_of_the_different_ids_whatever_their_order"),
        ("nothing is held out of a small set", "ordered[: max(1, round(share * len(ordered)))]",
         "ordered[: round(share * len(ordered))]",
         "held_out_questions_are_a_share_of_the_different_ids_whatever_their_order"),
        ("held-out pairs are trained on too", "(held_out if row[\"id\"] in measuring else train).append(pair)",
         "train.append(pair)\n"
         "        if row[\"id\"] in measuring:\n"
         "            held_out.append(pair)", "held_out_questions_measure_and_do_not_train"),
        ("measured on training pairs", "(held_out if row[\"id\"] in measuring else train).append(pair)",
         "train.append(pair)\n"
         "        held_out = train", "chosen_outscores_rejected_on_questions_that_were_not_trained"),
        ("held out and trained swapped", "(held_out if row[\"id\"] in measuring else train)",
         "(train if row[\"id\"] in measuring else held_out)",
         "chosen_outscores_rejected_on_questions_that_were_not_trained"),
        ("rejected in the place of chosen", "            tokenizer.response(row[\"chosen\"]),\n"
         "            tokenizer.response(row[\"rejected\"]),", "            tokenizer.response(row[\"rejected\"]),\n"
         "            tokenizer.response(row[\"chosen\"]),",
         "chosen_outscores_rejected_on_questions_that_were_not_trained"),
        ("without the end token", "            tokenizer.response(row[\"chosen\"]),\n"
         "            tokenizer.response(row[\"rejected\"]),", "            tokenizer.encode(row[\"chosen\"]),\n"
         "            tokenizer.encode(row[\"rejected\"]),",
         "chosen_outscores_rejected_on_questions_that_were_not_trained"),
        ("the weights of the pairs are not read", "float(row.get(\"weight\", 1.0))", "1.0",
         "a_whole_run_is_the_loop_that_is_written_out_here"),
        ("the new head is zero", "new_head=\"normal\"", "new_head=\"zero\"",
         "a_whole_run_is_the_loop_that_is_written_out_here"),
        ("weight decay", "betas=(0.9, 0.95), weight_decay=0.0)", "betas=(0.9, 0.95), weight_decay=0.1)",
         "a_whole_run_is_the_loop_that_is_written_out_here"),
        ("only the head is trained", "torch.optim.AdamW(model.parameters(), lr",
         "torch.optim.AdamW(model.score.parameters(), lr",
         "chosen_outscores_rejected_on_questions_that_were_not_trained"),
        ("the head is not trained", "torch.optim.AdamW(model.parameters(), lr",
         "torch.optim.AdamW(model.model.parameters(), lr", "a_whole_run_is_the_loop_that_is_written_out_here"),
        ("the same order in every epoch", "batches(lengths, cfg.batch_size, rng)",
         "batches(lengths, cfg.batch_size, torch.Generator().manual_seed(cfg.seed))",
         "a_whole_run_is_the_loop_that_is_written_out_here"),
        ("the learning rate is never set",
         "            runtime.set_lr(optimizer, cfg.lr * runtime.lr_at(step, steps, cfg.warmup))\n", "",
         "a_whole_run_is_the_loop_that_is_written_out_here"),
        ("the learning rate falls within an epoch", "cfg.lr * runtime.lr_at(step, steps, cfg.warmup)",
         "cfg.lr * runtime.lr_at(step, steps // cfg.epochs, cfg.warmup)",
         "chosen_outscores_rejected_on_questions_that_were_not_trained"),
        ("no warm-up", "cfg.lr * runtime.lr_at(step, steps, cfg.warmup)", "cfg.lr * runtime.lr_at(step, steps, 0)",
         "a_whole_run_is_the_loop_that_is_written_out_here"),
        ("mean of the micro-batches' means", "bradley_terry_loss(chosen, rejected, weight) * (weight.sum() / total)",
         "bradley_terry_loss(chosen, rejected, weight) * (len(micro) / len(batch))",
         "a_whole_run_is_the_loop_that_is_written_out_here"),
        ("micro-batches add up", "bradley_terry_loss(chosen, rejected, weight) * (weight.sum() / total)",
         "bradley_terry_loss(chosen, rejected, weight)", "a_whole_run_is_the_loop_that_is_written_out_here"),
        ("a micro-batch sees the first pairs again", "micro = [train[j] for j in batch[i : i + cfg.micro_batch]]",
         "micro = [train[j] for j in batch[: cfg.micro_batch]]", "a_whole_run_is_the_loop_that_is_written_out_here"),
        ("scores read at the padding", "scores = last_value(model(tokens.to(device)), last.to(device))",
         "scores = model(tokens.to(device))[:, -1]", "a_whole_run_is_the_loop_that_is_written_out_here"),
        ("scores read one token early", "scores = last_value(model(tokens.to(device)), last.to(device))",
         "scores = last_value(model(tokens.to(device)), last.to(device) - 1)",
         "a_whole_run_is_the_loop_that_is_written_out_here"),
        ("chunks swapped", "chosen, rejected = scores.chunk(2)", "rejected, chosen = scores.chunk(2)",
         "chosen_outscores_rejected_on_questions_that_were_not_trained"),
        ("gradients are not clipped", "torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm)",
         "torch.nn.utils.clip_grad_norm_(model.parameters(), 1e12)",
         "a_whole_run_is_the_loop_that_is_written_out_here"),
        ("gradients are not set to zero", "            optimizer.zero_grad(set_to_none=True)\n", "",
         "a_whole_run_is_the_loop_that_is_written_out_here"),
        ("one epoch whatever is asked", "    for _ in range(cfg.epochs):", "    for _ in range(1):",
         "chosen_outscores_rejected_on_questions_that_were_not_trained"),
        ("cut-off responses calibrate", " and row[\"finish\"] == \"stop\"", "",
         "the_students_finished_samples_have_mean_zero_and_deviation_one"),
        ("calibrated on the first samples",
         "samples = [samples[i] for i in torch.randperm(len(samples), generator=rng)[: "
         "cfg.calibration_samples].tolist()]", "samples = samples[: cfg.calibration_samples]",
         "a_whole_run_is_the_loop_that_is_written_out_here"),
        ("calibrated on all samples", "[: cfg.calibration_samples].tolist()]", ".tolist()]",
         "a_whole_run_is_the_loop_that_is_written_out_here"),
        ("calibrated without the end token", "responses = [tokenizer.response(row[\"response\"]) for row in samples]",
         "responses = [tokenizer.encode(row[\"response\"]) for row in samples]",
         "the_students_finished_samples_have_mean_zero_and_deviation_one"),
        ("the deviation is unbiased", "scores.std(correction=0).clamp(min=1e-6)", "scores.std().clamp(min=1e-6)",
         "the_students_finished_samples_have_mean_zero_and_deviation_one"),
        ("a constant model becomes infinite", "scores.std(correction=0).clamp(min=1e-6)", "scores.std(correction=0)",
         "a_constant_reward_model_is_never_right_and_stays_finite"),
        ("the scale is multiplied", "model.score.weight /= std", "model.score.weight *= std",
         "the_students_finished_samples_have_mean_zero_and_deviation_one"),
        ("the scale is forgotten", "        model.score.weight /= std.to(device)\n", "        pass\n",
         "the_students_finished_samples_have_mean_zero_and_deviation_one"),
        ("the mean is that before the scale", "model.score_mean = (scores.mean() / std).item()",
         "model.score_mean = scores.mean().item()", "the_students_finished_samples_have_mean_zero_and_deviation_one"),
        ("the mean is added", "model.score_mean = (scores.mean() / std).item()",
         "model.score_mean = -(scores.mean() / std).item()",
         "the_students_finished_samples_have_mean_zero_and_deviation_one"),
        ("the mean is forgotten", "    model.score_mean = (scores.mean() / std).item()\n", "",
         "the_students_finished_samples_have_mean_zero_and_deviation_one"),
        ("the loss is logged per micro-batch", "                loss += micro_loss.item()\n",
         "                loss = micro_loss.item()\n", "a_whole_run_is_the_loop_that_is_written_out_here"),
        ("the seed is ignored", "rng = runtime.seed_all(cfg.seed)", "rng = runtime.seed_all(0)",
         "a_whole_run_is_the_loop_that_is_written_out_here"),
        ("bf16 weights", "load_scalar_model(cfg.model, torch.float32, device, new_head",
         "load_scalar_model(cfg.model, torch.bfloat16, device, new_head",
         "a_whole_run_is_the_loop_that_is_written_out_here"),
    ],
    "quality.py": [
        ("AUC of the wrong answers", "good, bad = scores[right], np.sort(scores[~right])",
         "good, bad = scores[~right], np.sort(scores[right])",
         "auc_is_the_share_of_pairs_in_the_right_order_ties_half"),
        ("ties lose in the AUC", "np.searchsorted(bad, good, \"left\") + np.searchsorted(bad, good, \"right\")",
         "2 * np.searchsorted(bad, good, \"left\")", "auc_is_the_share_of_pairs_in_the_right_order_ties_half"),
        ("a tie is right", "((margin > 0) + tie * (margin == 0)).mean()", "(margin >= 0).mean()",
         "pair_accuracy_by_hand"),
        ("confidence of the signed margin", "1 / (1 + np.exp(-np.abs(margin)))", "1 / (1 + np.exp(-margin))",
         "calibration_error_is_the_gap_of_confidence_and_accuracy_by_bin"),
        ("bins of equal weight", "row[\"count\"] * abs(row[\"confidence\"] - row[\"accuracy\"])",
         "abs(row[\"confidence\"] - row[\"accuracy\"])",
         "calibration_error_is_the_gap_of_confidence_and_accuracy_by_bin"),
        ("the calibrated scale for confidence", "\"ece\": expected_calibration_error(scale * margin)",
         "\"ece\": expected_calibration_error(margin)", "the_quality_of_pairs_by_hand"),
        ("equal lengths by the shorter one", "tolerance * np.maximum(one, other)",
         "tolerance * np.minimum(one, other)", "equal_length_is_a_share_of_the_longer_one"),
        ("samples of other questions are paired",
         "return question * right.shape[1] + i, question * right.shape[1] + j",
         "return question * right.shape[1] + i, i * 0 + j",
         "pairs_are_of_one_right_and_one_wrong_sample_of_the_same_question"),
        ("the worst of n", "np.argsort(scores)\n"
         "    scores, right", "np.argsort(-np.asarray(scores))\n"
         "    scores, right", "the_best_threshold_is_the_best_of_all_that_there_are"),
        ("subsets with replacement", "math.comb(i, n - 1) / math.comb(n_samples, n)",
         "((i + 1) ** n - i**n) / n_samples**n", "best_of_n_by_hand"),
        ("silence may win the vote", "votes[answer] += answer is not None", "votes[answer] += 1", "majority_by_hand"),
    ],
    "pseudo_reward.py": [
        ("silence wins the vote", "Counter(answer for answer in answers if answer is not None)", "Counter(answers)",
         "majority_vote"),
        ("the rarest answer wins", "most = max(votes.values())", "most = min(votes.values())", "majority_vote"),
        ("the share is of the answers that were stated", "return tied[0], most / len(answers)",
         "return tied[0], most / sum(votes.values())", "majority_vote"),
        ("a tie goes to the first", "        if logprobs is None or None in logprobs:\n"
         "            return None, 0.0\n", "        if logprobs is None or None in logprobs:\n"
         "            return tied[0], most / len(answers)\n", "majority_vote"),
        ("a tie goes to the less likely", "tied.sort(key=weight.__getitem__, reverse=True)",
         "tied.sort(key=weight.__getitem__)", "majority_vote"),
        ("a tie by the mean of all answers", "for answer, lp in zip(answers, logprobs, strict=True) if answer == a)",
         "for answer, lp in zip(answers, logprobs, strict=True))", "majority_vote"),
        ("a full tie has a winner", "        if weight[tied[0]] == weight[tied[1]]:\n"
         "            return None, 0.0\n", "", "majority_vote"),
        ("a cut-off response is rewarded", "int(sample.ended and sample.answer == vote)",
         "int(sample.answer == vote)", "pseudo_rewards_are_one_for_an_ended_response_that_agrees_with_the_vote"),
        ("rewards turned round", "int(sample.ended and sample.answer == vote)",
         "int(sample.ended and sample.answer != vote)",
         "pseudo_rewards_are_one_for_an_ended_response_that_agrees_with_the_vote"),
        ("a cut-off response is rejected", "zip(samples, rewards) if reward == 0 and sample.ended]",
         "zip(samples, rewards) if reward == 0]", "pairs_are_all_combinations_of_an_ended_winner_and_an_ended_loser"),
        ("chosen and rejected swapped", "pairs = [(c, r) for c in chosen for r in rejected]",
         "pairs = [(r, c) for c in chosen for r in rejected]",
         "pairs_are_all_combinations_of_an_ended_winner_and_an_ended_loser"),
        ("pairs are not drawn", "    rng.shuffle(pairs)\n", "", "pairs_repeat_with_the_seed_and_differ_without"),
        ("the teacher's pairs come first",
         "pairs.sort(key=lambda pair: pair[0].source == pair[1].source == \"teacher\")",
         "pairs.sort(key=lambda pair: not pair[0].source == pair[1].source == \"teacher\")",
         "pairs_with_a_response_of_the_student_come_first"),
        ("only pairs of two students come first", "pair[0].source == pair[1].source == \"teacher\")",
         "\"teacher\" in (pair[0].source, pair[1].source))", "pairs_with_a_response_of_the_student_come_first"),
        ("the same pair twice", "different.setdefault((c.response, r.response), (c, r))",
         "different.setdefault((id(c), id(r)), (c, r))", "no_pair_comes_twice_and_none_without_both_sides"),
        ("pairs alike in their chosen text are one", "different.setdefault((c.response, r.response), (c, r))",
         "different.setdefault(c.response, (c, r))",
         "pairs_are_all_combinations_of_an_ended_winner_and_an_ended_loser"),
        ("one pair too few", "return list(different.values())[:most]", "return list(different.values())[: most - 1]",
         "pairs_are_capped"),
        ("the student's winners are imitated",
         "zip(samples, rewards, strict=True) if reward == 1 and s.source == \"teacher\"]",
         "zip(samples, rewards, strict=True) if reward == 1]", "winners_are_the_teachers_different_winning_texts"),
        ("the losers are imitated", "zip(samples, rewards, strict=True) if reward == 1 and s.source == \"teacher\"]",
         "zip(samples, rewards, strict=True) if reward == 0 and s.source == \"teacher\"]",
         "winners_are_the_teachers_different_winning_texts"),
        ("duplicates are always kept", "(won if keep_duplicates else list(dict.fromkeys(won)))", "won",
         "winners_are_the_teachers_different_winning_texts"),
        ("winners in an order of their own", "list(dict.fromkeys(won))", "sorted(set(won))",
         "winners_are_the_teachers_different_winning_texts"),
        ("log-probs are sums", "row[\"logprob\"] / row[\"tokens\"] if known else None",
         "row[\"logprob\"] if known else None", "our_own_form_carries_the_end_and_the_log_prob_per_token"),
        ("a cut-off response counts as ended", "ended = finish not in UNFINISHED", "ended = True",
         "our_own_form_carries_the_end_and_the_log_prob_per_token"),
        ("a cut text votes with its last number", "extract_answer(text, kind, lenient and ended)",
         "extract_answer(text, kind, lenient)", "a_cut_response_votes_only_with_an_answer_that_it_states"),
        ("lenient reading is never used", "extract_answer(text, kind, lenient and ended)",
         "extract_answer(text, kind)", "lenient_reads_the_last_number_where_no_answer_is_stated"),
        ("a shared text identifies the last question", "if times[text] == 1}", "}",
         "a_text_that_two_questions_share_identifies_neither"),
        ("the student always votes", "if cfg.voters == \"both\" or s.source == \"teacher\"]", "]",
         "main_writes_votes_rewards_targets_and_pairs_of_equal_weight_per_question"),
        ("the student never votes", "if cfg.voters == \"both\" or s.source == \"teacher\"]",
         "if s.source == \"teacher\"]", "voters_both_lets_the_student_vote"),
        ("the minimum share is exclusive", "share >= cfg.min_share", "share > cfg.min_share",
         "questions_under_the_minimum_share_are_dropped_and_none_left_is_an_error"),
        ("the minimum share is ignored", "elected = vote is not None and share >= cfg.min_share",
         "elected = vote is not None", "questions_under_the_minimum_share_are_dropped_and_none_left_is_an_error"),
        ("the vote knows no log-probs", "majority_vote([s.answer for s in voters], [s.logprob for s in voters])",
         "majority_vote([s.answer for s in voters])", "main_passes_every_flag_and_field_on"),
        ("the vote is the gold answer", "        elected = vote is not None and",
         "        vote = question.answer or vote\n"
         "        elected = vote is not None and", "gold_answers_are_never_read"),
        ("pairs of weight one", "\"weight\": 1 / len(pairs),", "\"weight\": 1.0,",
         "main_writes_votes_rewards_targets_and_pairs_of_equal_weight_per_question"),
        ("weight by the pairs that were asked for", "\"weight\": 1 / len(pairs),",
         "\"weight\": 1 / cfg.pairs_per_question,", "main_passes_every_flag_and_field_on"),
        ("the seed is ignored", "rng = random.Random(cfg.seed)", "rng = random.Random(0)",
         "another_seed_draws_other_pairs_and_nothing_else"),
        ("targets capped by the number of pairs", "winners(responses, targets, cfg.sft_per_question,",
         "winners(responses, targets, cfg.pairs_per_question,", "main_passes_every_flag_and_field_on"),
        ("prompts without options and instruction", "{\"id\": key, \"prompt\": question.prompt, \"response\": text}",
         "{\"id\": key, \"prompt\": question.question, \"response\": text}", "main_passes_every_flag_and_field_on"),
        ("the filter of the targets is ignored", "targets = rewards if cfg.sft_filter else",
         "targets = rewards if True else", "without_the_filter_the_teachers_finished_answers_are_the_targets"),
        ("questions without a vote give pairs", "        if not elected:\n"
         "            continue\n", "", "questions_under_the_minimum_share_are_dropped_and_none_left_is_an_error"),
        ("cut-off answers are targets without the filter", "[int(sample.ended) for sample in responses]",
         "[1 for sample in responses]", "without_the_filter_the_teachers_finished_answers_are_the_targets"),
    ],
    "sft.py": [
        ("the loss has the wrong sign", "return -torch.where(mask, logprobs, 0.0).sum() / total",
         "return torch.where(mask, logprobs, 0.0).sum() / total",
         "loss_is_the_sum_over_the_mask_by_the_tokens_of_the_whole_step"),
        ("the loss counts prompt and padding", "-torch.where(mask, logprobs, 0.0).sum() / total",
         "-logprobs.sum() / total", "loss_is_the_sum_over_the_mask_by_the_tokens_of_the_whole_step"),
        ("the mask as a factor", "-torch.where(mask, logprobs, 0.0).sum() / total",
         "-(mask * logprobs).sum() / total", "a_masked_cell_may_hold_anything"),
        ("the loss divides by its own tokens", "-torch.where(mask, logprobs, 0.0).sum() / total",
         "-torch.where(mask, logprobs, 0.0).sum() / mask.sum()",
         "loss_is_the_sum_over_the_mask_by_the_tokens_of_the_whole_step"),
        ("the loss divides by all cells", "-torch.where(mask, logprobs, 0.0).sum() / total",
         "-torch.where(mask, logprobs, 0.0).sum() / mask.numel()",
         "loss_is_the_sum_over_the_mask_by_the_tokens_of_the_whole_step"),
        ("responses without the end token", "responses.append(tokenizer.response(row[\"response\"]))",
         "responses.append(tokenizer.encode(row[\"response\"]))",
         "one_step_moves_by_the_gradient_of_the_mean_response_token"),
        ("the beginning of the text twice", "prompts.append(tokenizer.chat(row[\"prompt\"]))",
         "prompts.append(tokenizer.chat(row[\"prompt\"])[:1] + tokenizer.chat(row[\"prompt\"]))",
         "one_step_moves_by_the_gradient_of_the_mean_response_token"),
        ("prompts outside the chat", "prompts.append(tokenizer.chat(row[\"prompt\"]))",
         "prompts.append(tokenizer.encode(row[\"prompt\"]))",
         "one_step_moves_by_the_gradient_of_the_mean_response_token"),
        ("too long by one is kept", "<= cfg.max_tokens]", "<= cfg.max_tokens + 1]",
         "examples_that_are_too_long_are_left_out_whole_and_counted"),
        ("a fitting example is dropped", "<= cfg.max_tokens]", "< cfg.max_tokens]",
         "examples_that_are_too_long_are_left_out_whole_and_counted"),
        ("responses of other examples",
         "prompts, responses = [prompts[i] for i in fits], [responses[i] for i in fits]",
         "prompts = [prompts[i] for i in fits]", "a_whole_run_is_the_loop_that_is_written_out_here"),
        ("bf16 weights", "load_model(cfg.model, torch.float32, device)",
         "load_model(cfg.model, torch.bfloat16, device)",
         "one_step_moves_by_the_gradient_of_the_mean_response_token"),
        ("only the head is trained", "torch.optim.AdamW(model.parameters(), lr",
         "torch.optim.AdamW(model.lm_head.parameters(), lr",
         "one_step_moves_by_the_gradient_of_the_mean_response_token"),
        ("the embeddings are not trained", "torch.optim.AdamW(model.parameters(), lr",
         "torch.optim.AdamW([*model.model.layers.parameters(), *model.lm_head.parameters()], lr",
         "one_step_moves_by_the_gradient_of_the_mean_response_token"),
        ("the weight decay of the flag is ignored", "weight_decay=cfg.weight_decay", "weight_decay=0.01",
         "a_whole_run_is_the_loop_that_is_written_out_here"),
        ("the momentum of another recipe", "betas=(0.9, 0.95)", "betas=(0.5, 0.95)",
         "a_whole_run_is_the_loop_that_is_written_out_here"),
        ("the same order in every epoch", "batches(lengths, cfg.batch_size, rng)",
         "batches(lengths, cfg.batch_size, torch.Generator().manual_seed(cfg.seed))",
         "a_whole_run_is_the_loop_that_is_written_out_here"),
        ("the seed is ignored", "rng = runtime.seed_all(cfg.seed)", "rng = runtime.seed_all(0)",
         "a_whole_run_is_the_loop_that_is_written_out_here"),
        ("the learning rate is never set",
         "            runtime.set_lr(optimizer, cfg.lr * runtime.lr_at(step, steps, cfg.warmup))\n", "",
         "two_epochs_are_two_steps_with_no_gradient_left_over"),
        ("the schedule is one of a single epoch", "steps = epochs * -(-len(prompts) // cfg.batch_size)",
         "steps = -(-len(prompts) // cfg.batch_size)", "two_epochs_are_two_steps_with_no_gradient_left_over"),
        ("the schedule starts one step late", "runtime.lr_at(step, steps, cfg.warmup)",
         "runtime.lr_at(step + 1, steps, cfg.warmup)", "one_step_moves_by_the_gradient_of_the_mean_response_token"),
        ("total of the micro-batch", "total = sum(len(responses[i]) for i in batch)",
         "total = sum(len(responses[i]) for i in batch[: cfg.micro_batch])",
         "the_micro_batch_changes_memory_and_not_the_result"),
        ("total counts the prompts", "total = sum(len(responses[i]) for i in batch)",
         "total = sum(lengths[i] for i in batch)", "one_step_moves_by_the_gradient_of_the_mean_response_token"),
        ("total is the number of sequences", "total = sum(len(responses[i]) for i in batch)", "total = len(batch)",
         "one_step_moves_by_the_gradient_of_the_mean_response_token"),
        ("the first micro-batch again and again", "micro = batch[i : i + cfg.micro_batch]",
         "micro = batch[: cfg.micro_batch]", "the_micro_batch_changes_memory_and_not_the_result"),
        ("the last micro-batch is dropped", "for i in range(0, len(batch), cfg.micro_batch):",
         "for i in range(0, max(1, len(batch) - cfg.micro_batch), cfg.micro_batch):",
         "the_micro_batch_changes_memory_and_not_the_result"),
        ("prompts of other rows", "[prompts[j] for j in micro], [responses[j] for j in micro]",
         "prompts[: len(micro)], [responses[j] for j in micro]",
         "one_step_moves_by_the_gradient_of_the_mean_response_token"),
        ("gradients clipped in every micro-batch", "                micro_loss.backward()\n",
         "                micro_loss.backward()\n"
         "                torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm)\n",
         "the_gradient_is_clipped_once_and_logged_as_it_was"),
        ("gradients are not clipped", "torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm)",
         "torch.nn.utils.clip_grad_norm_(model.parameters(), 1e12)",
         "the_gradient_is_clipped_once_and_logged_as_it_was"),
        ("gradients are not set to zero", "            optimizer.zero_grad(set_to_none=True)\n", "",
         "two_epochs_are_two_steps_with_no_gradient_left_over"),
        ("gradients are set to zero before the step", "            optimizer.step()\n"
         "            optimizer.zero_grad(set_to_none=True)\n", "            optimizer.zero_grad(set_to_none=False)\n"
         "            optimizer.step()\n", "one_step_moves_by_the_gradient_of_the_mean_response_token"),
        ("one epoch whatever is asked", "    for _ in range(epochs):", "    for _ in range(1):",
         "two_epochs_are_two_steps_with_no_gradient_left_over"),
        ("the model is saved as it was", "    save_model(model, cfg.out)\n",
         "    save_model(load_model(cfg.model), cfg.out)\n",
         "one_step_moves_by_the_gradient_of_the_mean_response_token"),
        ("as many passes as the tokens alone cost", "round(budget / (6 * parameters * sum(lengths)))",
         "round(budget / (2 * parameters * sum(lengths)))", "as_many_passes_as_another_stage_cost"),
        ("no pass at all where little is allowed", "epochs = max(1, round(", "epochs = max(0, round(",
         "as_many_passes_as_another_stage_cost"),
    ],
    "model.py": [
        ("rope turns the wrong way", "torch.cat([-second, first], dim=-1) * sin",
         "torch.cat([second, -first], dim=-1) * sin", "rope_is_a_complex_rotation"),
        ("rope with interleaved pairs", "    first, second = x.chunk(2, dim=-1)\n"
         "    return x * cos + torch.cat([-second, first], dim=-1) * sin",
         "    first, second = x[..., ::2], x[..., 1::2]\n"
         "    return x * cos + torch.stack([-second, first], dim=-1).flatten(-2) * sin",
         "rope_is_a_complex_rotation"),
        ("rope angles interleaved", "angles = torch.cat([angles, angles], dim=-1)",
         "angles = angles.repeat_interleave(2, dim=-1)", "rope_is_a_complex_rotation"),
        ("rope turns at half the speed", "config.rope_theta ** (-pairs / config.head_dim)",
         "config.rope_theta ** (-pairs / 2 / config.head_dim)", "rope_is_a_complex_rotation"),
        ("rope positions in bf16",
         "    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), speed)",
         "    angles = torch.outer(torch.arange(length, dtype=torch.float32, "
         "device=device).bfloat16().float() + 0.0, speed)", "rope_is_a_complex_rotation"),
        ("slow pairs keep their speed", "speed = keep * speed + (1 - keep) * speed / config.rope_factor",
         "speed = keep * speed + (1 - keep) * speed", "rope_is_a_complex_rotation"),
        ("fast pairs are stretched", "speed = keep * speed + (1 - keep) * speed / config.rope_factor",
         "speed = (1 - keep) * speed + keep * speed / config.rope_factor", "rope_is_a_complex_rotation"),
        ("sine and cosine swapped", "return angles.cos(), angles.sin()", "return angles.sin(), angles.cos()",
         "rope_is_a_complex_rotation"),
        ("keys are not rotated", "attend(rotate(q, *rope), rotate(k, *rope), v)", "attend(rotate(q, *rope), k, v)",
         "the_logits_are_those_of_the_formulas"),
        ("values are rotated", "attend(rotate(q, *rope), rotate(k, *rope), v)",
         "attend(rotate(q, *rope), rotate(k, *rope), rotate(v, *rope))", "the_logits_are_those_of_the_formulas"),
        ("cached positions are off by one",
         "positions = self.lengths[:, None] + torch.arange(T, device=device)  # (B, T)",
         "positions = self.lengths[:, None] + torch.arange(T, device=device) + (self.used > 0)",
         "cached_steps_equal_the_full_pass"),
        ("cached positions are those of the longest row",
         "positions = self.lengths[:, None] + torch.arange(T, device=device)  # (B, T)",
         "positions = self.lengths.max() + torch.arange(T, device=device).expand(len(self.lengths), T)",
         "cached_steps_equal_the_full_pass"),
        ("angles from 0 in every cached step",
         "cos, sin = cache.rope[0][positions], cache.rope[1][positions]",
         "cos, sin = cache.rope[0][positions - positions[:, :1]], cache.rope[1][positions - positions[:, :1]]",
         "cached_steps_equal_the_full_pass"),
        ("a cached step does not see itself", "<= positions[:, None, :, None]", "< positions[:, None, :, None]",
         "cached_steps_equal_the_full_pass"),
        ("a cached step sees garbage", "torch.where(seen, zero, -math.inf)", "torch.where(seen, zero, 0.0)",
         "cached_steps_equal_the_full_pass"),
        ("a cached step sees one position too many", "<= positions[:, None, :, None]",
         "<= positions[:, None, :, None] + 1", "cached_steps_equal_the_full_pass"),
        ("the cache does not advance", "        self.lengths = self.lengths + T\n",
         "        self.lengths = self.lengths + T * (self.used == 0)\n", "cached_steps_equal_the_full_pass"),
        ("rows leave the cache without their lengths",
         "        self.lengths[target] = self.lengths[source]\n", "",
         "cached_steps_equal_the_full_pass"),
        ("rows leave the keys alone",
         "for stored in (*self.keys, *self.values):", "for stored in self.values:",
         "cached_steps_equal_the_full_pass"),
        ("query rows of a group out of order", "(0, 2, 3, 1, 4).reshape(B, K, -1, E)",
         "(0, 2, 1, 3, 4).reshape(B, K, -1, E)",
         "cached_steps_equal_the_full_pass"),
        ("keys of one head for another", "heads[:, :, None] * S", "heads.flip(1)[:, :, None] * S",
         "cached_steps_equal_the_full_pass"),
        ("attention sees the future", "is_causal=True, enable_gqa=True", "is_causal=False, enable_gqa=True",
         "logits_depend_on_the_past_and_the_present_only"),
        ("attention without its scale", "enable_gqa=True).transpose", "enable_gqa=True, scale=1.0).transpose",
         "the_logits_are_those_of_the_formulas"),
        ("query heads grouped the other way", "k = self.k_proj(x).view(B, T, -1, self.head_dim)",
         "k = self.k_proj(x).view(B, T, -1, self.head_dim).flip(2)",
         "the_logits_are_those_of_the_formulas"),
        ("norm subtracts the mean", "F.rms_norm(x.float(),",
         "F.rms_norm(x.float() - x.float().mean(-1, keepdim=True),", "rmsnorm_is_x_over_root_mean_square"),
        ("the norm in the input's type", "wide = F.rms_norm(x.float(), self.weight.shape, eps=self.eps)",
         "wide = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)", "rmsnorm_squares_in_fp32_for_bf16"),
        ("gate and up swapped", "F.silu(self.gate_proj(x)) * self.up_proj(x)",
         "F.silu(self.up_proj(x)) * self.gate_proj(x)", "the_logits_are_those_of_the_formulas"),
        ("no residual around attention", "x = x + self.self_attn(", "x = self.self_attn(",
         "the_logits_are_those_of_the_formulas"),
        ("the feed-forward reads the wrong norm", "return x + self.mlp(self.post_attention_layernorm(x))",
         "return x + self.mlp(self.input_layernorm(x))", "masked_logprobs_equal_token_logprobs"),
        ("no final norm", "        return self.norm(x)\n", "        return x\n",
         "masked_logprobs_equal_token_logprobs"),
        ("the head is not tied again", "    model.tie()\n"
         "    return model", "    return model", "saved_model_comes_back_bit_for_bit"),
        ("logits in the weights' type", "return self.lm_head(self.model(tokens, cache)).float()",
         "return self.lm_head(self.model(tokens, cache))", "dtype_can_be_chosen_when_loading"),
        ("scores in the weights' type", "hidden = self.model(tokens).float()  # (B, T, D); bf16 scores would tie\n"
         "        return (hidden @ self.score.weight[0].float()) - self.score_mean",
         "hidden = self.model(tokens)  # (B, T, D); bf16 scores would tie\n"
         "        return (hidden @ self.score.weight[0]) - self.score_mean", "saved_scalar_model_comes_back"),
        ("the mean of the scores is added", "- self.score_mean  # (B, T)", "+ self.score_mean  # (B, T)",
         "saved_scalar_model_comes_back"),
        ("the mean of the scores is ignored", "- self.score_mean  # (B, T)", "# (B, T)",
         "saved_scalar_model_comes_back"),
        ("the mean of the scores is not saved", "        extra[\"score_mean\"] = model.score_mean\n", "",
         "saved_scalar_model_comes_back"),
        ("the mean of the scores is not loaded", "model.score_mean = _read_object(path).get(\"score_mean\", 0.0)",
         "model.score_mean = 0.0", "saved_scalar_model_comes_back"),
        ("a large new head", "std=1 / math.sqrt(model.config.hidden_size + 1)", "std=1.0",
         "normal_head_has_variance_one_over_d_plus_one"),
        ("a zero head is random", "        if new_head == \"normal\":\n", "        if new_head:\n",
         "zero_head_gives_exactly_zero"),
        ("log-probs of the token before", "chosen = logits.gather(-1, tokens[:, 1:, None]).squeeze(-1)",
         "chosen = logits.gather(-1, tokens[:, :-1, None]).squeeze(-1)",
         "token_logprobs_are_minus_the_cross_entropy"),
        ("logits of the token itself",
         "logits = logits[:, :-1] if logits.dtype == torch.float64 else logits[:, :-1].float()",
         "logits = logits[:, 1:] if logits.dtype == torch.float64 else logits[:, 1:].float()",
         "token_logprobs_are_minus_the_cross_entropy"),
        ("log-probs in bf16", "else logits[:, :-1].float()", "else logits[:, :-1]",
         "token_logprobs_are_minus_the_cross_entropy"),
        ("log-probs times the temperature", "    logits = logits / temperature  # (B, T-1, V)",
         "    logits = logits * temperature  # (B, T-1, V)", "token_logprobs_are_minus_the_cross_entropy"),
        ("the temperature on the chosen logit alone", "    logits = logits / temperature  # (B, T-1, V)\n"
         "    chosen = logits.gather(-1, tokens[:, 1:, None]).squeeze(-1)",
         "    chosen = logits.gather(-1, tokens[:, 1:, None]).squeeze(-1) / temperature",
         "token_logprobs_are_minus_the_cross_entropy"),
        ("exponentials that overflow", "return chosen - logits.logsumexp(-1)  #",
         "return chosen - logits.exp().sum(-1).log()  #", "token_logprobs_are_minus_the_cross_entropy"),
        ("masked log-probs without the temperature", "logits = model.lm_head(hidden).float() / temperature  # (N, V)",
         "logits = model.lm_head(hidden).float()  # (N, V)", "masked_logprobs_equal_token_logprobs"),
        ("masked log-probs of the token itself", "hidden = model.model(tokens)[:, :-1][mask]",
         "hidden = model.model(tokens)[:, 1:][mask]", "masked_logprobs_equal_token_logprobs"),
        ("masked log-probs of the token before", "tokens[:, 1:][mask][:, None]", "tokens[:, :-1][mask][:, None]",
         "masked_logprobs_equal_token_logprobs"),
        ("masked log-probs without the normaliser", "zeros.masked_scatter(mask, chosen - log_norm)",
         "zeros.masked_scatter(mask, chosen)", "masked_logprobs_equal_token_logprobs"),
        ("masked log-probs have no gradient", "zeros.masked_scatter(mask, chosen - log_norm)",
         "zeros.masked_scatter(mask, (chosen - log_norm).detach())", "masked_logprobs_equal_token_logprobs"),
        ("the normaliser has no gradient", "log_norm = logits.logsumexp(-1)  # (N,)",
         "log_norm = logits.logsumexp(-1).detach()  # (N,)", "masked_logprobs_equal_token_logprobs"),
        ("entropy of the other sign", "entropy = log_norm - (torch.softmax(logits, -1) * logits).sum(-1)",
         "entropy = (torch.softmax(logits, -1) * logits).sum(-1) - log_norm", "masked_logprobs_equal_token_logprobs"),
        ("entropy is the surprise of the token", "entropy = log_norm - (torch.softmax(logits, -1) * logits).sum(-1)",
         "entropy = log_norm - chosen", "masked_logprobs_equal_token_logprobs"),
        ("the last column instead of the last token", "return values.gather(1, lengths[:, None] - 1)[:, 0]",
         "return values[:, -1]", "last_value_is_that_of_the_last_real_token"),
        ("the token after the last", "values.gather(1, lengths[:, None] - 1)",
         "values.gather(1, lengths[:, None].clamp(max=values.shape[1] - 1))",
         "last_value_is_that_of_the_last_real_token"),
        ("the mean of all tokens for the last", "return values.gather(1, lengths[:, None] - 1)[:, 0]",
         "return values.cumsum(1).gather(1, lengths[:, None] - 1)[:, 0] / lengths",
         "last_value_is_that_of_the_last_real_token"),
        ("the masked mean divides by all cells", "torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)",
         "torch.where(mask, x, 0.0).mean()", "masked_mean_sees_only_the_mask"),
        ("the masked mean counts masked cells", "torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)",
         "x.sum() / mask.sum().clamp(min=1)", "masked_mean_sees_only_the_mask"),
        ("the masked mean of nothing is NaN", "mask.sum().clamp(min=1)", "mask.sum()",
         "masked_mean_sees_only_the_mask"),
    ],
    "generate.py": [
        ("the prompt's end is read one token late", "lengths - 1][which]",
         "lengths.clamp(max=width - 1)][which]",
         "greedy_is_the_argmax_of_the_full_forward_pass"),
        ("the last column instead of the prompt's end",
         "hidden[torch.arange(len(distinct), device=device), lengths - 1][which]",
         "hidden[:, -1][which]",
         "greedy_is_the_argmax_of_the_full_forward_pass"),
        ("padding stays in the cache", "cache.lengths[rows] = lengths[which]",
         "cache.lengths[rows] = width",
         "greedy_is_the_argmax_of_the_full_forward_pass"),
        ("prompts padded on the left", "[*prompt, *[0] * (width - len(prompt))]",
         "[*[0] * (width - len(prompt)), *prompt]",
         "greedy_is_the_argmax_of_the_full_forward_pass"),
        ("answers in the order of length", "responses[index] = Response(",
         "responses[sorted(range(len(prompts)), key=lambda i: len(prompts[i]))[index]] = Response(",
         "greedy_is_the_argmax_of_the_full_forward_pass"),
        ("equal prompts are read again", "if len(distinct) < len(rows):",
         "if False:",
         "equal_prompts_are_read_once"),
        ("lengths of the distinct prompts", "cache.lengths[rows] = lengths[which]",
         "cache.lengths[rows] = lengths[torch.arange(len(which)) % len(lengths)]",
         "equal_prompts_are_read_once"),
        ("copies of the wrong row", "cache.copy(rows[which], rows)",
         "cache.copy(rows[which * 0], rows)",
         "equal_prompts_are_read_once"),
        ("one chance for all prompts", "np.random.default_rng((seed % 2**64, i))",
         "np.random.default_rng((seed % 2**64, 0))",
         "generated_tokens_follow_the_model"),
        ("the seed is ignored", "np.random.default_rng((seed % 2**64, i))",
         "np.random.default_rng((0, i))",
         "a_seed_repeats_the_text_and_another_does_not"),
        ("chances of the row and not of the prompt", "for i in group]  # whoever",
         "for i in range(len(group))]  # whoever",
         "sampled_text_does_not_depend_on_the_batch"),
        ("one chance for all tokens of a row", "temperature, chances[cell])",
         "temperature, chances[:, 0])", "sampled_text_does_not_depend_on_the_batch"),
        ("only the first stop id stops", "torch.tensor(sorted(stop_ids), dtype",
         "torch.tensor(sorted(stop_ids)[:1], dtype",
         "a_stop_id_ends_the_text_and_is_kept"),
        ("the end token is left out", "Response(ids[:n], chosen[:n]",
         "Response(ids[: n - 1], chosen[: n - 1]",
         "a_stop_id_ends_the_text_and_is_kept"),
        ("a token after the end is kept", "Response(ids[:n], chosen[:n]",
         "Response(ids[: n + 1], chosen[: n + 1]",
         "a_stop_id_ends_the_text_and_is_kept"),
        ("an answer that was cut says stop", "\"stop\" if stop_seen else \"length\"",
         "\"stop\"",
         "greedy_is_the_argmax_of_the_full_forward_pass"),
        ("a row at its end goes on", "length += active",
         "length += 1",
         "looking_less_often_changes_nothing"),
        ("a row at its end moves on in the cache",
         "        cache.lengths = cache.lengths - (stopped | (length == max_new_tokens)).long()\n",
         "",
         "looking_less_often_changes_nothing"),
        ("other rows leave", "stay = (asked >= 0).nonzero()[:, 0]  # (B',)",
         "stay = torch.arange(int((asked >= 0).sum()))  # (B',)",
         "rows_that_end_early_leave_the_others_unchanged"),
        ("the cache keeps the rows that left", "cache.keep(stay.to(device))",
         "cache.keep(torch.arange(len(stay)))",
         "rows_that_end_early_leave_the_others_unchanged"),
        ("the cache is cut too short", "cache.used = int(cache.lengths.max())",
         "cache.used = int(cache.lengths.min())",
         "rows_that_end_early_leave_the_others_unchanged"),
        ("rows that ended never leave", "if not waiting and len(stay) <=",
         "if False and len(stay) <=",
         "rows_that_ended_cost_nothing"),
        ("no refill before all have ended", "4 * (asked < 0).sum() >= B",
         "(asked < 0).all()",
         "rows_that_ended_cost_nothing"),
        ("a new row starts where the old one ended",
         "asked[free], length[free], stopped[free] = torch.tensor(group), 0, False",
         "asked[free], stopped[free] = torch.tensor(group), False",
         "sampled_text_does_not_depend_on_the_batch"),
        ("times the temperature", "torch.softmax(logits / (temperature or 1.0), dim=-1)",
         "torch.softmax(logits * (temperature or 1.0), dim=-1)",
         "logprobs_are_those_of_the_full_forward_pass"),
        ("the temperature is ignored", "torch.softmax(logits / (temperature or 1.0), dim=-1)",
         "torch.softmax(logits, dim=-1)",
         "logprobs_are_those_of_the_full_forward_pass"),
        ("log-probs without the temperature", "return token[:, 0], probs.gather(-1, token)",
         "return token[:, 0], torch.softmax(logits, -1).gather(-1, token)",
         "logprobs_are_those_of_the_full_forward_pass"),
        ("top-k sampling", "below = probs.cumsum(",
         "below = probs.where(probs >= probs.topk(5).values[:, -1:], 0).cumsum(",
         "sampling_follows_the_softmax"),
        ("top-p sampling", "below = probs.cumsum(",
         "below = probs.where(probs > 0.02, 0).cumsum(",
         "a_token_is_drawn_where_its_share_of_the_chance_lies"),
        ("rare tokens are lost", "probs.cumsum(-1, dtype=torch.float64)",
         "probs.cumsum(-1).double()",
         "a_token_is_drawn_where_its_share_of_the_chance_lies"),
        ("the token before", "token = token.clamp(max=logits.shape[-1] - 1)",
         "token = (token - 1).clamp(min=0)",
         "sampling_follows_the_softmax"),
        ("a token of no probability", "* below[:, -1:], right=True)", "* below[:, -1:], right=False)",
         "temperature_0_takes_the_largest_logit"),
        ("always greedy", "if temperature == 0:",
         "if temperature <= 1:",
         "sampled_rows_end_at_the_first_stop_id_or_at_the_limit"),
        ("probabilities squared", "below = probs.cumsum(",
         "below = probs.square().cumsum(",
         "sampling_follows_the_softmax"),
        ("NaN passes for text", "if not math.isfinite(sum(chosen[:n])):",
         "if False:",
         "nan_is_never_taken_for_text"),
        ("one token too few", "(length == max_new_tokens)).cpu()",
         "(length == max_new_tokens - 1)).cpu()",
         "greedy_is_the_argmax_of_the_full_forward_pass"),
        ("every temperature draws with one seed", "cfg.seed + index)", "cfg.seed)",
         "every_sample_is_of_its_question_and_temperature"),
        ("only the first temperature", "for index, temperature in enumerate(temperatures):",
         "for index, temperature in enumerate(temperatures[:1]):", "every_sample_is_of_its_question_and_temperature"),
        ("the recorded log-prob is a mean", "\"logprob\": round(sum(response.logprobs), 4)",
         "\"logprob\": round(sum(response.logprobs) / len(response.logprobs), 4)",
         "every_sample_is_of_its_question_and_temperature"),
        ("samples of other questions", "flat[i : i + samples] for i in range(0, len(flat), samples)",
         "flat[i :: len(flat) // samples] for i in range(len(flat) // samples)",
         "every_sample_is_of_its_question_and_temperature"),
    ],
    "data.py": [
        ("the mask begins one token late", "positions >= starts[:, None]", "positions > starts[:, None]",
         "collate_by_hand"),
        ("the mask begins one token early", "positions >= starts[:, None]", "positions >= starts[:, None] - 1",
         "collate_by_hand"),
        ("the mask ends before the end token", "positions < lengths[:, None]", "positions < lengths[:, None] - 1",
         "collate_by_hand"),
        ("the mask holds a cell of padding", "positions < lengths[:, None]", "positions <= lengths[:, None]",
         "collate_by_hand"),
        ("the mask holds the prompt", "(positions >= starts[:, None]) & (positions < lengths[:, None])",
         "positions < lengths[:, None]", "collate_by_hand"),
        ("the mask is told by token ids", "(positions >= starts[:, None]) & (positions < lengths[:, None])",
         "(positions >= starts[:, None]) & (tokens[:, 1:] != 0)", "collate_by_hand"),
        ("positions from 0", "positions = torch.arange(1, tokens.shape[1])",
         "positions = torch.arange(tokens.shape[1] - 1)", "collate_by_hand"),
        ("padding on the left", "tokens[row, : lengths[row]] = torch.tensor(prompt + response)",
         "tokens[row, -lengths[row] :] = torch.tensor(prompt + response)", "collate_by_hand"),
        ("batches of one length", "    order = torch.randperm(len(lengths), generator=rng).tolist()\n",
         "    order = sorted(torch.randperm(len(lengths), generator=rng).tolist(), key=lengths.__getitem__)\n",
         "epochs_differ_and_a_batch_is_a_fair_sample_sorted_by_length"),
        ("batches in the order of the file", "    order = torch.randperm(len(lengths), generator=rng).tolist()\n",
         "    order = list(range(len(lengths)))\n", "an_epoch_has_every_index_once"),
        ("batches drawn without the generator", "    order = torch.randperm(len(lengths), generator=rng).tolist()\n",
         "    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0)).tolist()\n",
         "an_epoch_has_every_index_once"),
        ("the short last batch is dropped", "    for i in range(0, len(order), size):\n"
         "        yield sorted(order[i : i + size]", "    for i in range(0, len(order) - size + 1, size):\n"
         "        yield sorted(order[i : i + size]", "an_epoch_has_every_index_once"),
        ("batches are not sorted", "yield sorted(order[i : i + size], key=lengths.__getitem__)",
         "yield order[i : i + size]", "epochs_differ_and_a_batch_is_a_fair_sample_sorted_by_length"),
        ("the split follows the id", "\"\\n\".join(question.key).encode()", "question.id.encode()",
         "mmlu_pro_is_split_by_what_is_asked"),
        ("a split of another size", "return \"train\" if number < 70", "return \"train\" if number <= 70",
         "the_borders_of_the_hash_split"),
        ("the options are no part of a question", "return _plain(self.question), *sorted(map(_plain, self.options))",
         "return (_plain(self.question),)", "mmlu_pro_is_split_by_what_is_asked"),
        ("copies of a question are kept",
         "unique = list({question.key: question for question in questions}.values())", "unique = list(questions)",
         "the_script_keeps_questions_that_differ_in_options_alone"),
        ("train and valid overlap", "    stream = iter(pool)\n"
         "    return {split: [next(stream) for _ in range(count)] for split, count in counts.items()}",
         "    return {split: pool[:count] for split, count in counts.items()}",
         "the_script_keeps_questions_that_differ_in_options_alone"),
        ("the pool is not shuffled", "    random.Random(seed).shuffle(unique)\n", "", "the_script_splits_mmlu_pro"),
        ("the gold answer is read loosely", "canonical(last, kind) or extract_answer(str(answer), kind)",
         "extract_answer(str(answer), kind, lenient=True)", "a_users_own_choices_load"),
        ("the prompt without its instruction", "*_lettered(self.options), self.instruction]",
         "*_lettered(self.options)]", "a_users_own_file_loads"),
    ],
    "chat.py": [
        ("the beginning of the text twice", "        ids = []\n"
         "        for special, group", "        ids = self.backend.encode(\"\").ids\n"
         "        for special, group", "a_chat_of_llama_3_written_out"),
        ("responses without the end token", "return [*self.encode(text), self.end_id]", "return self.encode(text)",
         "prompt_and_response_are_the_rendered_conversation"),
        ("responses with a beginning of their own", "return [*self.encode(text), self.end_id]",
         "return [*self.text(text), self.end_id]", "prompt_and_response_are_the_rendered_conversation"),
        ("a text may spell a special token", "        self.backend.encode_special_tokens = True\n", "",
         "text_never_becomes_a_special_token"),
        ("only one token stops", "self.stop_ids = frozenset([self.end_id, *stops])",
         "self.stop_ids = frozenset([self.end_id])", "stop_ids_are_those_of_every_file"),
        ("the template's end token does not stop", "self.stop_ids = frozenset([self.end_id, *stops])",
         "self.stop_ids = frozenset(stops)", "stop_ids_are_those_of_every_file"),
        ("special tokens are decoded", "[id for id in ids if id not in self.special_ids]", "list(ids)",
         "prompt_and_response_are_the_rendered_conversation"),
    ],
    "answers.py": [
        ("the thought is the answer", "text.split(\"</think>\")[:2][-1]", "text.split(\"</think>\")[0]",
         "numbers_as_models_write_them"),
        ("the first number is read leniently", "maxlen=1)", "maxlen=None)", "number_answers"),
        ("lenient reading for all", "finditer(text) if lenient else (), maxlen=1)", "finditer(text), maxlen=1)",
         "number_answers"),
        ("an answer that was taken back counts",
         "            if not TAKEN_BACK.search(text, stated.end(), stated.end() + 100):  # ... unless it is "
         "'7. Wait, ...'\n"
         "                break\n", "            break\n", "numbers_as_models_write_them"),
        ("the last of several statements", "if not TAKEN_BACK.search(text, stated.end(), stated.end() + 100):",
         "if False:", "number_answers"),
        ("no answer equals no gold", "    if answer is None or gold is None:\n"
         "        return False\n", "    if answer is None or gold is None:\n"
         "        return answer is gold\n", "is_correct"),
        ("the sign is lost", "(-1 if \"-\" in number[\"sign\"] else 1)", "1", "number_answers"),
        ("mixed numbers are only their fraction", "+ Fraction(int(top), int(number[\"bottom\"] or 1))",
         "* 0 + Fraction(int(top), int(number[\"bottom\"] or 1))", "number_answers"),
    ],
    "eval.py": [
        ("the interval is that of a normal", "centre = (right + z * z / 2) / (n + z * z)", "centre = right / n",
         "wilson_interval_examples"),
        ("lenient reading for strict", "    answer = extract_answer(text, question.kind)\n",
         "    answer = extract_answer(text, question.kind, lenient=True)\n",
         "accuracy_grades_every_answer_strictly_and_leniently"),
        ("scores in the order of length", "scores[batch] = last_value(", "scores[i : i + len(batch)] = last_value(",
         "scores_are_read_at_the_last_token_in_the_order_of_the_rows"),
        ("scores read at the padding", "last_value(model(tokens.to(device)), lengths.to(device)).cpu()",
         "model(tokens.to(device))[:, -1].cpu()", "scores_are_read_at_the_last_token_in_the_order_of_the_rows"),
        ("the worst of n", "best = int(row.argmax())", "best = int(row.argmin())",
         "best_of_n_keeps_the_answer_that_the_reward_model_likes_best"),
        ("accuracy is sampled", "questions, max_new_tokens, 0.0, 0, batch_size, label, shots=shots, compile",
         "questions, max_new_tokens, 1.0, 0, batch_size, label, shots=shots, compile",
         "accuracy_grades_every_answer_strictly_and_leniently"),
    ],
    "runtime.py": [
        ("warm-up begins at 0", "min((step + 1) / max(warmup, 1)", "min(step / max(warmup, 1)",
         "learning_rate_warms_up_and_falls_linearly_to_zero"),
        ("the schedule ends above 0", "(total - step) / max(total - warmup, 1))", "(total - step) / max(total, 1))",
         "learning_rate_warms_up_and_falls_linearly_to_zero"),
        ("no decay", "return min((step + 1) / max(warmup, 1), (total - step) / max(total - warmup, 1))",
         "return min((step + 1) / max(warmup, 1), 1.0)", "learning_rate_warms_up_and_falls_linearly_to_zero"),
        ("only the first group gets the rate", "    for group in optimizer.param_groups:\n",
         "    for group in optimizer.param_groups[:1]:\n", "set_lr_reaches_every_group"),
        ("a seed for all", "return torch.Generator().manual_seed(seed)", "return torch.Generator().manual_seed(0)",
         "seed_all_repeats_every_kind_of_draw"),
    ],
}.items() for entry in entries]


# ---- running -------------------------------------------------------------------------------------------------------


@functools.cache
def program(path: Path):
    return compile(path.read_text(encoding="utf-8"), str(path), "exec")


class OwnModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports of scripts and tests get programs that are compiled once, a mutant's script the one with the bug."""

    def __init__(self):
        self.files = {path.stem: path for folder in (TESTS, ROOT) for path in folder.glob("*.py")}
        self.mutated = {}

    def find_spec(self, fullname, path=None, target=None):
        if fullname in self.files:
            return importlib.util.spec_from_file_location(fullname, self.files[fullname], loader=self)

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
                code = compile(mutant.source(), str(ROOT / mutant.file), "exec")
            except ValueError as error:
                stale.append(label)
                print(f"{label}: STALE, {error}", flush=True)
                continue
            modules.forget()
            modules.mutated = {Path(mutant.file).stem: code}
            catcher = failing(mutant.node_ids, folder)
            survived += [] if catcher else [label]
            print(f"{label}: {f'caught by {catcher}' if catcher else 'SURVIVED'}", flush=True)
    for label in survived + stale:
        print(f"not caught: {label}")
    seconds = time.monotonic() - start
    print(f"{len(chosen)} mutants, {len(survived)} survived, {len(stale)} stale, {seconds:.0f} s")
    return int(bool(survived or stale or not chosen))


if __name__ == "__main__":
    sys.exit(main())
