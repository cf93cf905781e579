"""PPO by hand: the student answers, the reward model scores, and answers that score above expectation become likelier.

    python ppo.py --policy runs/try/2_sft --reward_model runs/try/5_reward \\
        --questions runs/try/0_questions/train.jsonl --out runs/try/6_ppo

One iteration: (1) sample a response to each of a batch of questions; (2) reward = score at the end token, minus
kl_coef * (log-prob - reference log-prob) at every token; (3) advantages by GAE from the critic's values; (4) a few
epochs of the clipped policy loss and the clipped value loss. The reference is the policy as it starts, frozen; the
critic starts as the reward model. Everything lives in the (B, T-1) frame of `token_logprobs`: entry t is about the
token t + 1, a value at t has seen the tokens up to t only, and `mask` is True on the sampled tokens, the end token
included.

metrics.jsonl has a line per iteration (docs/ppo_details.md says what each number is, docs/healthy.md what it should
look like), samples.txt a few answers with their scores, and checkpoint/ the policy as it last was, until the run ends.

Sources: PPO (arXiv 1707.06347), GAE (arXiv 1506.02438), details for language models (arXiv 1909.08593, 2203.02155,
2403.17031).
"""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import runtime
from answers import extract_answer, is_correct
from data import Question, collate, load_questions, read_jsonl
from eval import accuracy, score_responses
from generate import generate
from health import Health
from hf.tokenizer import Tokenizer
from model import (
    Llama,
    ModelConfig,
    ScalarModel,
    load_model,
    load_scalar_model,
    masked_logprobs,
    masked_mean,
    masked_values,
    save_model,
)
from runtime import memory, ranks
from runtime.checkpoint import Checkpoint
from runtime.steps import dealt


@dataclass(frozen=True)
class Config:
    """Reinforcement learning of a student against a reward model, or against the raw vote."""

    policy: str  # the SFT student, or the policy of the round before: where it starts
    questions: str  # training questions; their gold answers are not read
    out: str  # Hugging Face folder to write
    reward_model: str = ""  # scores the answers; its copy becomes the critic
    votes: str = ""  # instead of a reward model: rewards.jsonl, +1 for an answer that equals the vote, -1 otherwise
    gold: bool = False  # instead of both: +1 for the gold answer. An upper bound, for comparison; never the method
    reference: str = ""  # frozen, the KL is measured from it; none: the policy as it starts
    critic: str = ""  # another reward model to start the critic from
    iterations: int = 60  # rollouts
    rollout_size: int = 256  # responses per iteration
    minibatches: int = 4  # optimiser steps per epoch
    epochs: int = 1  # passes over a rollout; more need the clip
    batch_size: int = 256  # responses sampled together; changes memory, not the result
    micro_tokens: int = 4096  # tokens per forward pass, padding included; changes memory, not the result
    gradient_checkpointing: bool = False  # a third more time for much less memory; the result stays
    offload: bool = False  # all but the network at work wait in the CPU's memory, Adam's moments too; the result stays
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
    lenient: bool = False  # with --votes and --gold: read the last number or letter where no answer is stated
    unfinished_score: float = -2.0  # replaces the score of a response without an end: well below the mean of 0
    max_grad_norm: float = 1.0
    valid: str = ""  # held-out questions: greedy score and accuracy now and then, for the report only
    eval_every: int = 20  # iterations between those, between checkpoints, and between entries of samples.txt
    seed: int = 0
    compile: bool = False  # torch.compile for sampling, on a GPU with CUDA graphs: a minute at first, then faster


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
    """Mean 0 and variance 1 (biased) over the True cells of (B, T-1), 0 elsewhere. Example: [1, 2, 3] -> +-1.2247.

    All rows together, not row by row. Equal cells, or a single one, give 0.
    """
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean).square(), mask)
    return torch.where(mask, (x - mean) * torch.rsqrt(variance + 1e-8), 0.0)


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip: float, total: int
) -> tuple[Tensor, Tensor]:
    """Clipped surrogate (arXiv 1707.06347, eq. 7): all (B, T-1) -> loss, count of clipped tokens.

    sum over True cells of max(-A * ratio, -A * clamp(ratio, 1 - clip, 1 + clip)), over `total`, the number of True
    cells in the whole optimiser step. Clipped is a token whose second term is the larger; the log of the ratio stays
    within +-20, so that nothing overflows. Example: A = 1, ratio 1.5, clip 0.2 -> loss -1.2, gradient 0.
    """
    ratio = torch.where(mask, logprobs - old_logprobs, 0.0).clamp(-20, 20).exp()  # (B, T-1)
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)  # (B, T-1), (B, T-1)
    loss = torch.where(mask, torch.maximum(plain, clipped), 0.0).sum() / total
    return loss, (mask & (clipped > plain)).sum()


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float, total: int
) -> tuple[Tensor, Tensor]:
    """Half the squared error to the returns, pessimistically clipped: all (B, T-1) -> loss, count of clipped tokens.

    sum over True cells of 0.5 * max((V - R)^2, (near - R)^2), over `total`, where near is V kept within +-clip of the
    old value. Example: old value 0, value 1, return 1, clip 0.2 -> 0.5 * 0.8^2 = 0.32, gradient 0.
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
    questions: list[Question]
    texts: list[str]

    def lengths(self) -> list[int]:
        """Of prompt and response, row by row."""
        positions = torch.arange(2, self.tokens.shape[1] + 1, device=self.tokens.device)  # (T-1,)
        return (self.mask * positions).amax(1).tolist()


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
    stop, size = tokenizer.stop_ids, cfg.batch_size
    sampler = ranks.gathered(policy)
    sampled = generate(sampler, prompts, cfg.max_new_tokens, cfg.temperature, stop, seed, size, compile=cfg.compile)
    del sampler  # where it is a copy, it makes room
    responses = [response.tokens for response in sampled]
    texts = [tokenizer.decode(response) for response in responses]
    ended = torch.tensor([response.finish == "stop" for response in sampled])  # (B,)
    scores = torch.where(ended, score(questions, prompts, responses, texts), cfg.unfinished_score)  # (B,)
    tokens, mask, lengths = collate(prompts, responses)  # (B, T), (B, T-1), (B,)
    tokens, mask, lengths = tokens.to(device), mask.to(device), lengths.tolist()
    readings = torch.zeros(4, *mask.shape, device=device)  # (4, B, T-1)
    logprobs, ref_logprobs, values, entropy = readings  # (B, T-1) each
    if cfg.offload:
        for model in (reference, critic):
            model.to(device)
    for rows, counts in dealt(range(len(tokens)), lengths, cfg.micro_tokens):
        b, T = torch.tensor(rows, device=device), lengths[rows[0]]  # (b,); T of the longest, beyond is padding
        text, read = tokens[b, :T], mask[b, : T - 1] & counts  # (b, T), (b, T-1)
        with runtime.mixed_precision():
            # the function that the update uses, not the sampler's numbers: then the first ratio is 1
            logprobs[b, : T - 1], entropy[b, : T - 1] = masked_logprobs(policy, text, read, cfg.temperature)
            ref_logprobs[b, : T - 1], _ = masked_logprobs(reference, text, read, cfg.temperature)
            values[b, : T - 1] = masked_values(critic, text, read)
    ranks.total(readings)  # each row was read by one rank and is 0 on the others
    if cfg.offload:
        for model in (reference, critic):
            model.to("cpu")
    scores, ended = scores.to(device), ended.to(device)
    return Rollout(tokens, mask, logprobs, ref_logprobs, values, entropy, scores, ended, questions, texts)


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
    """`epochs` passes of minibatch steps over one rollout; returns the metrics, averaged over the tokens seen.

    First all steps of the policy, then all of the critic: neither asks the other, so with --offload only one of them is
    on the device. Raises FloatingPointError before a step that would be taken on NaN or infinity.
    """
    size, device = -(-len(r.tokens) // cfg.minibatches), r.tokens.device
    orders = [torch.randperm(len(r.tokens), generator=rng) for _ in range(cfg.epochs)]  # (B,) each
    minibatches = [minibatch for order in orders for minibatch in order.split(size)]
    if cfg.offload:
        place(device, policy, optimizers[0])
    metrics = update_policy(cfg, policy, optimizers[0], r, advantages, minibatches)
    if cfg.offload:
        place("cpu", policy, optimizers[0])
        place(device, critic, optimizers[1])
    metrics |= update_critic(cfg, critic, optimizers[1], r, returns, minibatches)
    if cfg.offload:
        place("cpu", critic, optimizers[1])
        policy.to(device)  # it samples next
    return metrics


def place(device: torch.device | str, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Move a network and what its optimiser keeps."""
    model.to(device)
    for state in optimizer.state.values():
        state.update({name: tensor.to(device) for name, tensor in state.items()})


def update_policy(
    cfg: Config, policy: Llama, optimizer, r: Rollout, advantages: Tensor, minibatches: list[Tensor]
) -> dict[str, float]:
    """A step of the clipped policy loss for each minibatch of rows."""
    lengths, device = r.lengths(), r.tokens.device
    names = ("loss", "clipped", "kl", "ratio", "ratio_squared", "ratio_max", "ratio_gap", "norm")
    steps = []
    for minibatch in minibatches:
        total = int(r.mask[minibatch].sum())  # tokens of the whole optimiser step
        sums, log_ratios = [], []
        for rows, counts in dealt(minibatch.tolist(), lengths, cfg.micro_tokens):
            b, T = torch.tensor(rows, device=device), lengths[rows[0]]  # (b,); T of the longest, beyond is padding
            tokens, mask = r.tokens[b, :T], r.mask[b, : T - 1] & counts  # (b, T), (b, T-1)
            old_logprobs = r.logprobs[b, : T - 1]  # (b, T-1)
            with runtime.mixed_precision():
                logprobs, _ = masked_logprobs(policy, tokens, mask, cfg.temperature)  # (b, T-1)
            loss, clipped = policy_loss(logprobs, old_logprobs, advantages[b, : T - 1], mask, cfg.clip, total)
            (ranks.SIZE * loss).backward()  # over ranks FSDP takes the mean, a step is their sum
            sums.append(torch.stack([loss.detach() * total, clipped]))
            log_ratios.append((logprobs.detach() - old_logprobs)[mask])  # (N,)
        log_ratio = ranks.joined(torch.cat(log_ratios)).double()  # (total,)
        ratio = log_ratio.exp()  # (total,)
        numbers = [*ranks.total(torch.stack(sums).sum(0))]
        numbers += [0.5 * log_ratio.square().sum(), ratio.sum(), ratio.square().sum()]
        numbers += [ratio.max(), (ratio - 1).abs().max()]
        numbers.append(ranks.whole(torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)))
        # read once a step: a GPU waits for every number that is read
        step = {"tokens": total} | dict(zip(names, torch.stack(numbers).tolist(), strict=True))
        require_finite({"loss/policy_avg": step["loss"], "policy/grad_norm": step["norm"]})
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps.append(step)
    tokens = sum(step["tokens"] for step in steps)
    mean = {name: sum(step[name] for step in steps) / tokens for name in names}
    return {
        "loss/policy_avg": mean["loss"],
        "policy/approxkl_avg": mean["kl"],
        "policy/clipfrac_avg": mean["clipped"],
        "val/ratio": mean["ratio"],
        "val/ratio_var": mean["ratio_squared"] - mean["ratio"] ** 2,
        "val/ratio_max": max(step["ratio_max"] for step in steps),
        # of the first step, when nothing was updated yet: the policy is the one that sampled
        "val/ratio_first": steps[0]["ratio"] / steps[0]["tokens"],
        "val/ratio_first_gap": steps[0]["ratio_gap"],
        "policy/grad_norm": sum(step["norm"] for step in steps) / len(steps),
    }


def update_critic(
    cfg: Config, critic: ScalarModel, optimizer, r: Rollout, returns: Tensor, minibatches: list[Tensor]
) -> dict[str, float]:
    """A step of the clipped value loss for each minibatch of rows."""
    lengths, device = r.lengths(), r.tokens.device
    names, steps = ("loss", "clipped", "norm"), []
    for minibatch in minibatches:
        total = int(r.mask[minibatch].sum())  # tokens of the whole optimiser step
        sums = []
        for rows, counts in dealt(minibatch.tolist(), lengths, cfg.micro_tokens):
            b, T = torch.tensor(rows, device=device), lengths[rows[0]]  # (b,); T of the longest, beyond is padding
            tokens, mask = r.tokens[b, :T], r.mask[b, : T - 1] & counts  # (b, T), (b, T-1)
            old_values = r.values[b, : T - 1]  # (b, T-1)
            with runtime.mixed_precision():
                values = masked_values(critic, tokens, mask)  # (b, T-1)
            loss, clipped = value_loss(values, old_values, returns[b, : T - 1], mask, cfg.value_clip, total)
            (ranks.SIZE * loss).backward()  # over ranks FSDP takes the mean, a step is their sum
            sums.append(torch.stack([loss.detach() * total, clipped]))
        norm = ranks.whole(torch.nn.utils.clip_grad_norm_(critic.parameters(), cfg.max_grad_norm))
        numbers = torch.stack([*ranks.total(torch.stack(sums).sum(0)), norm]).tolist()
        step = {"tokens": total} | dict(zip(names, numbers, strict=True))
        require_finite({"loss/value_avg": step["loss"], "critic/grad_norm": step["norm"]})
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps.append(step)
    tokens = sum(step["tokens"] for step in steps)
    return {
        "loss/value_avg": sum(step["loss"] for step in steps) / tokens,
        "val/clipfrac_avg": sum(step["clipped"] for step in steps) / tokens,
        "critic/grad_norm": sum(step["norm"] for step in steps) / len(steps),
    }


def require_finite(metrics: dict[str, float]) -> None:
    """Raises FloatingPointError naming the values that are NaN or infinite."""
    if bad := [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]:
        raise FloatingPointError(", ".join(bad))


# ---- what is logged ------------------------------------------------------------------------------------------------


def describe(cfg: Config, r: Rollout, advantages: Tensor, returns: Tensor) -> dict[str, float]:
    """The rollout's metrics: per sequence where the name is objective/* or response_length/*, else over tokens."""
    kl = torch.where(r.mask, r.logprobs - r.ref_logprobs, 0.0).sum(1)  # (B,)
    values, targets, raw = r.values[r.mask], returns[r.mask], advantages[r.mask]  # (N,) each
    spread = targets.var(correction=0) + 1e-5
    lengths = r.mask.sum(1).float()  # (B,)
    return {
        "objective/scores": r.scores.mean().item(),
        "objective/scores_std": r.scores.std(correction=0).item(),
        "objective/scores_min": r.scores.min().item(),
        "objective/scores_max": r.scores.max().item(),
        "objective/kl": kl.mean().item(),
        "objective/kl_coef": cfg.kl_coef,
        "objective/non_score_reward": -cfg.kl_coef * kl.mean().item(),
        "objective/rlhf_reward": (r.scores - cfg.kl_coef * kl).mean().item(),
        "objective/entropy": -torch.where(r.mask, r.logprobs, 0.0).sum(1).mean().item(),
        "policy/entropy_avg": masked_mean(r.entropy, r.mask).item(),
        # the critic's: of the variance, blind to a constant offset; and of the squared error, which sees one
        "val/explained_variance": (1 - (targets - values).var(correction=0) / spread).item(),
        "val/explained_variance_mse": (1 - (targets - values).square().mean() / spread).item(),
        "val/values_mean": values.mean().item(),
        "val/returns_mean": targets.mean().item(),
        "val/advantages_mean": raw.mean().item(),  # before whitening
        "val/advantages_std": raw.std(correction=0).item(),
        "val/num_eos_tokens": int(r.ended.sum()),
        "val/eos_share": r.ended.float().mean().item(),
        "val/repeated": 1 - len({text for text in r.texts if text.strip()}) / len(r.texts),  # or empty
        "response_length/mean": lengths.mean().item(),
        "response_length/min": lengths.min().item(),
        "response_length/max": lengths.max().item(),
        "response_length/clip_ratio": 1 - r.ended.float().mean().item(),
    }


def show_samples(iteration: int, r: Rollout) -> str:
    """The answers with the lowest, the middle and the highest score of a rollout, for samples.txt."""
    text = f"==== iteration {iteration}\n"
    for place, row in zip(("lowest", "middle", "highest"), r.scores.argsort()[[0, len(r.scores) // 2, -1]].tolist()):
        mask = r.mask[row]
        kl = (r.logprobs[row] - r.ref_logprobs[row])[mask].sum()
        text += (
            f"---- {place} score {r.scores[row]:+.2f}, KL {kl:+.2f} nats, {int(mask.sum())} tokens, "
            f"{'ended' if r.ended[row] else 'cut off'}\n{r.questions[row].prompt}\n> "
            + r.texts[row].replace("\n", "\n> ")
            + "\n"
        )
    return text + "\n"


# ---- the script ----------------------------------------------------------------------------------------------------


def look_closer(cfg, out: Path, iteration: int, r: Rollout, policy, tokenizer, valid, score) -> dict[str, float]:
    """Now and then: keep the policy and a few of its answers; let it answer held-out questions greedily."""
    new, checkpoint, policy = out / "checkpoint.new", out / "checkpoint", ranks.gathered(policy)
    if ranks.RANK == 0:
        save_model(policy, new)
        tokenizer.save(new)
        if checkpoint.exists():
            shutil.rmtree(checkpoint)
        new.rename(checkpoint)
        with (out / "samples.txt").open("a", encoding="utf-8") as file:
            file.write(show_samples(iteration, r))
    if not valid:
        return {}
    summary, transcripts = accuracy(policy, tokenizer, valid, cfg.max_new_tokens, cfg.batch_size, "valid")
    found = {"valid/accuracy": summary["strict"]}
    if cfg.reward_model:  # what the reward model thinks of them: above, it is what PPO climbs; gold must follow
        prompts = [tokenizer.chat(question.prompt) for question in valid]
        responses = [tokenizer.response(row["response"]) for row in transcripts]
        ended = torch.tensor([row["finish"] == "stop" for row in transcripts])  # (valid,)
        scores = score(valid, prompts, responses, None)  # (valid,)
        found["valid/score"] = torch.where(ended, scores, cfg.unfinished_score).mean().item()
    return found


def main(cfg: Config) -> None:
    for name in (
        "iterations",
        "rollout_size",
        "batch_size",
        "minibatches",
        "epochs",
        "micro_tokens",
        "max_new_tokens",
        "temperature",
        "max_grad_norm",
        "eval_every",
    ):
        runtime.require(getattr(cfg, name) > 0, f"--{name} {getattr(cfg, name)}: must be greater than 0")
    for name in ("lr", "critic_lr", "warmup", "kl_coef", "clip", "value_clip"):
        runtime.require(getattr(cfg, name) >= 0, f"--{name} {getattr(cfg, name)}: must not be negative")
    for name in ("gamma", "lam"):
        runtime.require(0 <= getattr(cfg, name) <= 1, f"--{name} {getattr(cfg, name)}: from 0 to 1")
    runtime.require(
        cfg.minibatches <= cfg.rollout_size,
        f"--minibatches {cfg.minibatches}: more than --rollout_size {cfg.rollout_size}",
    )
    given = [name for name in ("reward_model", "votes", "gold") if getattr(cfg, name)]
    runtime.require(not (cfg.offload and ranks.SIZE > 1), "--offload: several ranks hold shards anyway, leave it out")
    runtime.require(len(given) == 1, f"give one of --reward_model, --votes and --gold, not {given or 'none'}")
    inputs = ["policy", "questions", "reward_model", "votes", "reference", "critic", "valid"]
    stage = runtime.Stage(cfg, inputs, memory=["batch_size", "micro_tokens", "gradient_checkpointing", "offload"])
    if stage.finished:
        return
    rng = runtime.seed_all(cfg.seed)
    device = runtime.default_device()
    tokenizer = Tokenizer(cfg.policy)
    for folder in filter(None, (cfg.reward_model, cfg.reference, cfg.critic)):
        runtime.require(
            Tokenizer(folder).same_ids(tokenizer),
            f"{folder} and --policy {cfg.policy} have different tokenizers: one cannot read the other's tokens",
        )
    questions = load_questions(cfg.questions)
    valid = load_questions(cfg.valid) if cfg.valid else []
    lengths = [len(tokenizer.chat(question.prompt)) for question in [*questions, *valid]]
    folders = cfg.policy, cfg.critic or cfg.reward_model or cfg.policy, cfg.reference or cfg.policy, cfg.reward_model
    configs = [ModelConfig.from_folder(folder) if folder else None for folder in folders]
    rows, longest = min(cfg.batch_size, cfg.rollout_size), max(lengths) + cfg.max_new_tokens
    tokens = memory.pass_size(longest, -(-cfg.rollout_size // cfg.minibatches), cfg.micro_tokens)
    flags = cfg.gradient_checkpointing, cfg.offload, device.type == "cuda"
    memory.say(memory.ppo(*configs, rows, max(lengths), cfg.max_new_tokens, tokens, *flags))
    policy = ranks.shard(load_model(cfg.policy, torch.float32, device))
    context = policy.config.max_position_embeddings
    for question, length in zip([*questions, *valid], lengths):
        runtime.require(
            length + cfg.max_new_tokens <= context,
            f"question '{question.id}': a prompt of {length} tokens and --max_new_tokens {cfg.max_new_tokens} exceed "
            f"the model's context of {context}",
        )
    idle = torch.device("cpu") if cfg.offload else device  # where all but the policy wait
    reference = ranks.shard(load_model(cfg.reference or cfg.policy, torch.float32, idle).requires_grad_(False))
    if cfg.critic or cfg.reward_model:
        critic = load_scalar_model(cfg.critic or cfg.reward_model, torch.float32, idle)
    else:
        critic = load_scalar_model(cfg.policy, torch.float32, idle, new_head="zero")
    critic = ranks.shard(critic)
    if cfg.reward_model:
        scorer = ranks.shard(load_scalar_model(cfg.reward_model, torch.float32, idle).requires_grad_(False))

        def score(questions, prompts, responses, texts):
            with runtime.mixed_precision():
                scores = score_responses(scorer.to(device), prompts, responses, cfg.micro_tokens)  # (B,)
            if cfg.offload:
                scorer.to("cpu")
            return scores
    else:
        if cfg.gold:
            truth = {question.id: question.answer for question in questions if question.answer is not None}
        else:
            truth = {}
            for row in read_jsonl(cfg.votes, required=["id", "vote"]):
                other = truth.setdefault(row["id"], row["vote"])
                runtime.require(other == row["vote"], f"{cfg.votes}: two votes for '{row['id']}'")
        questions = [question for question in questions if question.id in truth]
        runtime.require(bool(questions), f"{cfg.votes or '--gold'}: no answer to any question of {cfg.questions}")

        def score(questions, prompts, responses, texts):
            answers = [extract_answer(text, q.kind, cfg.lenient) for q, text in zip(questions, texts)]
            right = [is_correct(answer, truth[q.id], q.kind) for q, answer in zip(questions, answers)]
            return torch.tensor(right) * 2.0 - 1.0  # (B,)

    optimizers = tuple(
        torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0, fused=True)
        for model, lr in ((policy, cfg.lr), (critic, cfg.critic_lr))
    )
    for model in (policy, critic):
        model.model.gradient_checkpointing = cfg.gradient_checkpointing
    parameters = sum(p.numel() for p in policy.parameters())
    runtime.set_threads(policy)
    print(
        f"{parameters / 1e6:.2f}M parameters, {cfg.iterations} iterations of {cfg.rollout_size} responses to "
        f"{len(questions)} questions",
        flush=True,
    )

    parts = {"policy": policy, "critic": critic, "policy_adam": optimizers[0], "critic_adam": optimizers[1], "rng": rng}
    at = {"order": [], "seen": 0, "sampled": 0, "metrics": {}}
    state, watch, checkpoint = Checkpoint(stage, parts, at), Health(cfg.rollout_size), stage.out / "checkpoint"
    for row in read_jsonl(stage.out / "metrics.jsonl") if state.step else ():
        watch.update(row.pop("step"), row)  # what was said before the interruption is not said again
    bar = runtime.Progress("ppo", cfg.iterations, state.step)
    for iteration in state.steps(cfg.iterations):
        for optimizer, lr in zip(optimizers, (cfg.lr, cfg.critic_lr)):
            runtime.set_lr(optimizer, lr * runtime.lr_at(iteration, cfg.iterations, cfg.warmup))
        order = at["order"]
        while len(order) < cfg.rollout_size:  # every question once before any comes again
            order += torch.randperm(len(questions), generator=rng).tolist()
        batch, at["order"] = [questions[i] for i in order[: cfg.rollout_size]], order[cfg.rollout_size :]
        try:
            # 1. rollout: sample, score, and let the four models read
            r = rollout(cfg, policy, reference, critic, score, tokenizer, batch, seed=cfg.seed * 1_000_003 + iteration)
            # 2. rewards: a KL penalty on every sampled token, the score on the last
            rewards = shape_rewards(r.scores, r.logprobs, r.ref_logprobs, r.mask, cfg.kl_coef)  # (B, T-1)
            # 3. advantages, whitened for the policy; returns, raw, for the critic
            advantages, returns = gae(rewards, r.values, r.mask, cfg.gamma, cfg.lam)  # (B, T-1), (B, T-1)
            metrics = describe(cfg, r, advantages, returns)
            require_finite(metrics)
            if iteration % cfg.eval_every == 0 or iteration == cfg.iterations - 1:  # before the update
                metrics |= look_closer(cfg, stage.out, iteration, r, policy, tokenizer, valid, score)
            # 4. update
            metrics |= update(cfg, policy, critic, optimizers, r, whiten(advantages, r.mask), returns, rng)
        except FloatingPointError as error:
            raise ValueError(
                f"iteration {iteration}: {error}; stopped. The last good policy is in {checkpoint}. Usual causes: --lr "
                f"or --critic_lr too high, a broken reward model; {stage.out / 'metrics.jsonl'} shows how it came"
            ) from None
        stage.log(iteration, **metrics)
        # in bf16 a token's log-prob depends a little on the shape of the batch that it is read in
        if (gap := metrics["val/ratio_first_gap"]) > (1e-3 if device.type == "cpu" else 0.5):
            raise RuntimeError(
                f"a token of the first minibatch has a ratio {gap:.2g} away from 1: update and rollout disagree "
                "about the same tokens (temperature, mask, dtype or dropout differ)"
            )
        for warning in watch.update(iteration, metrics):
            print(f"warning: {warning}", flush=True)
        at["seen"] += r.tokens.numel()
        at["sampled"] += int(r.mask.sum())
        at["metrics"] = metrics
        bar.update(
            1,
            f"score {metrics['objective/scores']:+.2f} KL {metrics['objective/kl']:.2f} "
            f"ratio0 {metrics['val/ratio_first']:.3f} clip {metrics['policy/clipfrac_avg']:.1%} "
            f"entropy {metrics['policy/entropy_avg']:.3f} ended {metrics['val/eos_share']:.0%} "
            f"length {metrics['response_length/mean']:.0f} EV {metrics['val/explained_variance']:.2f}",
        )
    bar.close()
    metrics, policy = at["metrics"], ranks.gathered(policy)
    if ranks.RANK:
        return
    save_model(policy, cfg.out)
    tokenizer.save(cfg.out)
    shutil.rmtree(checkpoint, ignore_errors=True)  # the policy itself is here now
    print(
        f"score {metrics['objective/scores']:+.2f}, KL {metrics['objective/kl']:.2f} nats per answer, "
        f"{metrics['val/eos_share']:.1%} ended"
    )
    # per token: the sampler, three readers and the scorer 2N each; policy and critic 6N each per epoch
    stage.finish(
        tokens=at["sampled"],
        flops=parameters * at["seen"] * (10 + 12 * cfg.epochs),
        score=metrics["objective/scores"],
        kl=metrics["objective/kl"],
    )


if __name__ == "__main__":
    runtime.launch(main, Config, every_rank=True)
