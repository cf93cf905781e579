"""PPO by hand: the student answers, the reward model scores, and answers that score above expectation become likelier.

    python ppo.py --policy runs/try/2_sft --reward_model runs/try/5_reward \\
        --questions runs/try/0_questions/train.jsonl --out runs/try/6_ppo

One iteration: (1) sample a response to each of a batch of questions; (2) reward = score at the end token, minus
kl_coef * (log-prob - reference log-prob) at every token; (3) advantages by GAE from the critic's values; (4) a few
epochs of the clipped policy loss and the clipped value loss. The reference is the frozen SFT student, the critic starts
as the reward model. Everything lives in the (B, T-1) frame of `token_logprobs`: entry t is about the token t + 1, a
value at t has seen the tokens up to t only, and `mask` is True on the sampled tokens, the end token included.

Sources: PPO (arXiv 1707.06347), GAE (arXiv 1506.02438), details for language models (arXiv 1909.08593, 2203.02155,
2403.17031).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import runtime
from answers import extract_answer
from chat import Tokenizer
from data import Question, collate, load_questions, read_jsonl
from eval import accuracy, score_responses
from generate import generate
from model import Llama, ScalarModel, load_model, load_scalar_model, masked_logprobs, masked_mean, save_model


@dataclass(frozen=True)
class Config:
    """Reinforcement learning of a student against a reward model, or against the raw vote."""

    policy: str  # the SFT student: start and reference
    questions: str  # training questions; their gold answers are not read
    out: str  # Hugging Face folder to write
    reward_model: str = ""  # scores the answers; its copy becomes the critic
    votes: str = ""  # instead of a reward model: rewards.jsonl, +1 for an answer that equals the vote, -1 otherwise
    iterations: int = 60  # rollouts
    rollout_size: int = 256  # responses per iteration
    minibatches: int = 4  # optimiser steps per epoch
    epochs: int = 1  # passes over a rollout; more need the clip
    micro_batch: int = 64  # sequences per forward pass; changes memory, not the result
    max_new_tokens: int = 256  # a response that has not ended by then is cut
    temperature: float = 1.0  # of sampling, and of every log-prob
    lr: float = 2e-4  # of the policy, linear to 0
    critic_lr: float = 5e-4  # of the critic, linear to 0: it has more to learn
    warmup: int = 2  # iterations
    kl_coef: float = 0.05  # nats of reward per nat of divergence from the reference
    gamma: float = 1.0  # no discount: the only score comes at the end
    lam: float = 0.95  # GAE: 1 trusts the return, 0 the critic
    clip: float = 0.2  # policy ratio stays within 1 +- clip
    value_clip: float = 0.2  # value stays within +- value_clip of the old one, per update
    lenient: bool = False  # with --votes: read the last number or letter where no answer is stated
    unfinished_score: float = -2.0  # replaces the score of a response without an end: well below the mean of 0
    max_grad_norm: float = 1.0
    valid: str = ""  # held-out questions: greedy reward and accuracy now and then, for the report only
    eval_every: int = 20  # iterations
    seed: int = 0


# ---- the four pure functions ---------------------------------------------------------------------------------------


def shape_rewards(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Reward of every token: scores (B,), log-probs and mask (B, T-1) -> (B, T-1), 0 outside the mask.

    -kl_coef * (logprob - ref_logprob) on each sampled token (the k1 estimate of the KL), plus the score on the last.
    Example: kl_coef 0.1, differences [1, 2, 3], score 1 -> [-0.1, -0.2, 0.7].
    """
    rewards = torch.where(mask, -kl_coef * (logprobs - ref_logprobs), 0.0)  # (B, T-1)
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)  # (B, T-1): the last True of each row
    return rewards + last * scores[:, None]


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, right to left: all (B, T-1) -> advantages, returns (B, T-1), 0 off the mask.

    delta_t = r_t + gamma * V_(t+1) - V_t;  A_t = delta_t + gamma * lam * A_(t+1);  return_t = A_t + V_t.
    V after the last token is 0: a response that ends, or is cut, is over. Example: rewards [0, 0, 1], values 0.5,
    gamma 1, lam 0.95 -> advantages [0.45125, 0.475, 0.5].
    """
    values = torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(values)  # (B, T-1)
    next_value = next_advantage = torch.zeros_like(values[:, 0])  # (B,)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # (B,)
        advantages[:, t] = torch.where(mask[:, t], delta + gamma * lam * next_advantage, 0.0)
        next_value, next_advantage = values[:, t], advantages[:, t]
    return advantages, advantages + values


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and variance 1 (biased) over the True cells of (B, T-1), 0 elsewhere. Example: [1, 2, 3] -> +-1.2247."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean).square(), mask)
    return torch.where(mask, (x - mean) * torch.rsqrt(variance + 1e-8), 0.0)


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip: float, total: int
) -> tuple[Tensor, Tensor]:
    """Clipped surrogate (arXiv 1707.06347, eq. 7): all (B, T-1) -> loss, count of clipped tokens.

    sum over True cells of max(-A * ratio, -A * clamp(ratio, 1 - clip, 1 + clip)), over `total`, the number of True
    cells in the whole optimiser step. Example: A = 1, ratio 1.5, clip 0.2 -> loss -1.2, gradient 0.
    """
    ratio = torch.where(mask, logprobs - old_logprobs, 0.0).clamp(-20, 20).exp()  # (B, T-1)
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)  # (B, T-1), (B, T-1)
    loss = torch.where(mask, torch.maximum(plain, clipped), 0.0).sum() / total
    return loss, (mask & (clipped > plain)).sum()


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float, total: int
) -> tuple[Tensor, Tensor]:
    """Half the squared error to the returns, pessimistically clipped: all (B, T-1) -> loss, count of clipped tokens.

    Example: old value 0, value 1, return 1, clip 0.2 -> 0.5 * 0.8^2 = 0.32, gradient 0.
    """
    # 0 where masked, before the arithmetic: the gradient of a NaN would be NaN even behind the mask
    values, old_values, returns = (torch.where(mask, x, 0.0) for x in (values, old_values, returns))  # (B, T-1) each
    near = old_values + (values - old_values).clamp(-clip, clip)  # (B, T-1)
    plain, clipped = (values - returns).square(), (near - returns).square()  # (B, T-1), (B, T-1)
    loss = 0.5 * torch.where(mask, torch.maximum(plain, clipped), 0.0).sum() / total
    return loss, (mask & (clipped > plain)).sum()


# ---- rollout -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rollout:
    """What was sampled, and what the four models said of it before any update. Nothing here has a gradient."""

    tokens: Tensor  # (B, T) prompt and response, right-padded
    mask: Tensor  # (B, T-1) True where tokens[:, t+1] was sampled
    logprobs: Tensor  # (B, T-1) of the policy that sampled
    ref_logprobs: Tensor  # (B, T-1) of the frozen reference
    values: Tensor  # (B, T-1) of the critic, before each token
    entropy: Tensor  # (B, T-1) of the policy
    scores: Tensor  # (B,)
    ended: Tensor  # (B,) False: cut at max_new_tokens
    texts: list[str]


@torch.no_grad()
def rollout(
    cfg: Config,
    policy: Llama,
    reference: Llama,
    critic: ScalarModel,
    score,
    tokenizer: Tokenizer,
    questions: list[Question],
    seed: int,
) -> Rollout:
    """Sample one response to each question, score it, and let every model read it once.

    `score(questions, prompts, responses, texts) -> (B,)` judges finished responses, all as lists.
    """
    device = policy.lm_head.weight.device
    prompts = [tokenizer.chat(question.prompt) for question in questions]
    sampled = generate(policy, prompts, cfg.max_new_tokens, cfg.temperature, tokenizer.stop_ids, seed, cfg.rollout_size)
    responses = [response.tokens for response in sampled]
    texts = [tokenizer.decode(response) for response in responses]
    ended = torch.tensor([response.finish == "stop" for response in sampled])  # (B,)
    scores = torch.where(ended, score(questions, prompts, responses, texts), cfg.unfinished_score)  # (B,)
    tokens, mask, _ = collate(prompts, responses)  # (B, T), (B, T-1)
    tokens, mask = tokens.to(device), mask.to(device)
    parts = []
    for i in range(0, len(tokens), cfg.micro_batch):
        rows = slice(i, i + cfg.micro_batch)
        # the function that the update uses, not the sampler's numbers: then the first ratio is exactly 1
        logprobs, entropy = masked_logprobs(policy, tokens[rows], mask[rows], cfg.temperature)  # (b, T-1) each
        ref_logprobs, _ = masked_logprobs(reference, tokens[rows], mask[rows], cfg.temperature)  # (b, T-1)
        parts.append((logprobs, ref_logprobs, critic(tokens[rows])[:, :-1], entropy))
    logprobs, ref_logprobs, values, entropy = (torch.cat(part) for part in zip(*parts))  # (B, T-1) each
    return Rollout(tokens, mask, logprobs, ref_logprobs, values, entropy, scores.to(device), ended.to(device), texts)


# ---- update --------------------------------------------------------------------------------------------------------


def update(
    cfg: Config,
    policy: Llama,
    critic: ScalarModel,
    optimizers: tuple,
    r: Rollout,
    advantages: Tensor,
    returns: Tensor,
    rng: torch.Generator,
) -> dict[str, float]:
    """`epochs` passes of minibatch steps over one rollout; returns the metrics, averaged over the tokens seen."""
    size = -(-len(r.tokens) // cfg.minibatches)
    sums, first_ratio = (
        dict.fromkeys(("policy", "value", "clipped", "value_clipped", "kl", "ratio", "tokens"), 0.0),
        None,
    )
    grad_norms = []
    for _ in range(cfg.epochs):
        order = torch.randperm(len(r.tokens), generator=rng).to(r.tokens.device)  # (B,)
        for minibatch in order.split(size):
            total = int(r.mask[minibatch].sum())  # tokens of the whole optimiser step
            step = dict.fromkeys(sums, 0.0)
            for b in minibatch.split(cfg.micro_batch):
                mask = r.mask[b]
                logprobs, _ = masked_logprobs(policy, r.tokens[b], mask, cfg.temperature)  # (b, T-1)
                pg, clipped = policy_loss(logprobs, r.logprobs[b], advantages[b], mask, cfg.clip, total)
                pg.backward()  # at once: then only one network's activations are in memory
                values = critic(r.tokens[b])[:, :-1]  # (b, T-1)
                vf, value_clipped = value_loss(values, r.values[b], returns[b], mask, cfg.value_clip, total)
                vf.backward()
                log_ratio = (logprobs.detach() - r.logprobs[b])[mask]  # (N,)
                for name, value in (
                    ("policy", pg * total),
                    ("value", vf * total),
                    ("clipped", clipped),
                    ("value_clipped", value_clipped),
                    ("kl", 0.5 * log_ratio.square().sum()),
                    ("ratio", log_ratio.exp().sum()),
                    ("tokens", mask.sum()),
                ):
                    step[name] += value.item()
            norms = [
                torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm) for model in (policy, critic)
            ]
            grad_norms.append([norm.item() for norm in norms])
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if first_ratio is None:
                first_ratio = step["ratio"] / step["tokens"]
            for name in sums:
                sums[name] += step[name]
    mean = {name: value / sums["tokens"] for name, value in sums.items()}
    return {
        "loss/policy_avg": mean["policy"],
        "loss/value_avg": mean["value"],
        "policy/approxkl_avg": mean["kl"],
        "policy/clipfrac_avg": mean["clipped"],
        "val/clipfrac_avg": mean["value_clipped"],
        "val/ratio": mean["ratio"],
        "val/ratio_first": first_ratio,
        "policy/grad_norm": sum(norm for norm, _ in grad_norms) / len(grad_norms),
        "critic/grad_norm": sum(norm for _, norm in grad_norms) / len(grad_norms),
    }


def describe(r: Rollout, returns: Tensor, kl_coef: float) -> dict[str, float]:
    """The rollout's metrics: per sequence where the name is objective/*, else over tokens."""
    kl = torch.where(r.mask, r.logprobs - r.ref_logprobs, 0.0).sum(1)  # (B,)
    real_values, real_returns = r.values[r.mask], returns[r.mask]  # (N,), (N,)
    lengths = r.mask.sum(1).float()  # (B,)
    return {
        "objective/scores": r.scores.mean().item(),
        "objective/scores_std": r.scores.std(correction=0).item(),
        "objective/kl": kl.mean().item(),
        "objective/non_score_reward": -kl_coef * kl.mean().item(),
        "objective/rlhf_reward": (r.scores - kl_coef * kl).mean().item(),
        "objective/entropy": -torch.where(r.mask, r.logprobs, 0.0).sum(1).mean().item(),
        "policy/entropy_avg": masked_mean(r.entropy, r.mask).item(),
        "val/explained_variance": (
            1 - (real_returns - real_values).var(correction=0) / (real_returns.var(correction=0) + 1e-5)
        ).item(),
        "val/num_eos_tokens": int(r.ended.sum()),
        "val/eos_share": r.ended.float().mean().item(),
        "response_length/mean": lengths.mean().item(),
        "response_length/max": lengths.max().item(),
    }


# ---- the script ----------------------------------------------------------------------------------------------------


def main(cfg: Config) -> None:
    for name in (
        "iterations",
        "rollout_size",
        "minibatches",
        "epochs",
        "micro_batch",
        "max_new_tokens",
        "temperature",
        "eval_every",
    ):
        runtime.require(getattr(cfg, name) > 0, f"--{name} {getattr(cfg, name)}: must be greater than 0")
    for name in ("lr", "critic_lr", "kl_coef", "clip", "value_clip"):
        runtime.require(getattr(cfg, name) >= 0, f"--{name} {getattr(cfg, name)}: must not be negative")
    runtime.require(bool(cfg.reward_model) != bool(cfg.votes), "give one of --reward_model and --votes")
    stage = runtime.Stage(cfg, inputs=["policy", "questions", "reward_model", "votes", "valid"])
    if stage.finished:
        return
    rng = runtime.seed_all(cfg.seed)
    device = runtime.default_device()
    tokenizer = Tokenizer(cfg.policy)
    questions = load_questions(cfg.questions)
    valid = load_questions(cfg.valid) if cfg.valid else []
    policy = load_model(cfg.policy, torch.float32, device)
    reference = load_model(cfg.policy, torch.float32, device).requires_grad_(False)
    if cfg.reward_model:
        critic = load_scalar_model(cfg.reward_model, torch.float32, device)
        scorer = load_scalar_model(cfg.reward_model, torch.float32, device).requires_grad_(False)

        def score(questions, prompts, responses, texts):
            return score_responses(scorer, prompts, responses, cfg.micro_batch)  # (B,)
    else:
        critic = load_scalar_model(cfg.policy, torch.float32, device, new_head="zero")
        votes = {row["id"]: row["vote"] for row in read_jsonl(cfg.votes, required=["id", "vote"])}
        questions = [question for question in questions if question.id in votes]
        runtime.require(bool(questions), f"{cfg.votes}: no vote on any question of {cfg.questions}")

        def score(questions, prompts, responses, texts):
            return torch.tensor(
                [
                    1.0 if extract_answer(text, question.kind, cfg.lenient) == votes[question.id] else -1.0
                    for question, text in zip(questions, texts)
                ]
            )  # (B,)

    optimizers = tuple(
        torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
        for model, lr in ((policy, cfg.lr), (critic, cfg.critic_lr))
    )
    parameters = sum(p.numel() for p in policy.parameters())
    print(
        f"{parameters / 1e6:.2f}M parameters, {cfg.iterations} iterations of {cfg.rollout_size} responses to "
        f"{len(questions)} questions",
        flush=True,
    )

    bar, order, seen, sampled = runtime.Progress("ppo", cfg.iterations), [], 0, 0
    for iteration in range(cfg.iterations):
        for optimizer, lr in zip(optimizers, (cfg.lr, cfg.critic_lr)):
            runtime.set_lr(optimizer, lr * runtime.lr_at(iteration, cfg.iterations, cfg.warmup))
        while len(order) < cfg.rollout_size:  # every question once before any comes again
            order += torch.randperm(len(questions), generator=rng).tolist()
        batch, order = [questions[i] for i in order[: cfg.rollout_size]], order[cfg.rollout_size :]

        # now and then, greedy answers to held-out questions, for the report only; the first time before any update
        held_out = {}
        if valid and iteration % cfg.eval_every == 0:
            summary, _ = accuracy(policy, tokenizer, valid, cfg.max_new_tokens, label="valid")
            held_out = {"valid/accuracy": summary["strict"]}
        # 1. rollout: sample, score, and let the four models read
        r = rollout(cfg, policy, reference, critic, score, tokenizer, batch, seed=cfg.seed * 1_000_003 + iteration)
        # 2. rewards: a KL penalty on every sampled token, the score on the last
        rewards = shape_rewards(r.scores, r.logprobs, r.ref_logprobs, r.mask, cfg.kl_coef)  # (B, T-1)
        # 3. advantages, whitened for the policy; returns, raw, for the critic
        advantages, returns = gae(rewards, r.values, r.mask, cfg.gamma, cfg.lam)  # (B, T-1), (B, T-1)
        metrics = describe(r, returns, cfg.kl_coef)
        # 4. update
        metrics |= update(cfg, policy, critic, optimizers, r, whiten(advantages, r.mask), returns, rng)
        if abs(metrics["val/ratio_first"] - 1) > 1e-3:
            raise RuntimeError(
                f"the first minibatch has ratio {metrics['val/ratio_first']:.5f} instead of 1: the update "
                "and the rollout disagree about the same tokens"
            )
        stage.log(iteration, **metrics, **held_out)
        seen += r.tokens.numel()
        sampled += int(r.mask.sum())
        bar.update(
            1,
            f"score {metrics['objective/scores']:+.2f} KL {metrics['objective/kl']:.2f} "
            f"length {metrics['response_length/mean']:.0f} ended {metrics['val/eos_share']:.0%}",
        )
    bar.close()
    save_model(policy, cfg.out)
    tokenizer.save(cfg.out)
    print(
        f"score {metrics['objective/scores']:+.2f}, KL {metrics['objective/kl']:.2f} nats per answer, "
        f"{metrics['val/eos_share']:.1%} ended"
    )
    # per token: the sampler, three readers and the scorer 2N each; policy and critic 6N each per epoch
    stage.finish(
        tokens=sampled,
        flops=parameters * seen * (10 + 12 * cfg.epochs),
        score=metrics["objective/scores"],
        kl=metrics["objective/kl"],
    )


if __name__ == "__main__":
    runtime.launch(main, Config)
