"""PPO by hand: the student answers, the reward model scores, and answers that score above expectation become likelier.

    python ppo.py --policy runs/try/2_sft --reward_model runs/try/5_reward \\
        --questions runs/try/0_questions/train.jsonl --out runs/try/6_ppo

One iteration: (1) sample a response to each of a batch of questions; (2) reward = score at the end token, minus
kl_coef * (log-prob - reference log-prob) at every token; (3) advantages by GAE from the critic's values; (4) a few
epochs of the clipped policy loss and the clipped value loss. The reference is the policy as it starts, frozen; the
critic starts as the reward model. Everything lives in the (B, T-1) frame of `token_logprobs`: entry t is about the
token t + 1, a value at t has seen the tokens up to t only, and `mask` is True on the sampled tokens, the end token
included. health.py says what each number of metrics.jsonl is and where it should be.

Sources: PPO (arXiv 1707.06347), GAE (arXiv 1506.02438), details for language models (arXiv 1909.08593, 2203.02155,
2403.17031), one by one in docs/ppo_details.md.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.optim import AdamW

import health
import lora
import runtime
from data import Question, Tokenizer, collate, load_questions
from eval import accuracy
from generate import answers_to, prompts_of
from model import Llama, ScalarModel, load_model, load_scalar_model, masked_logprobs, masked_mean, masked_values
from reward import UNFINISHED_SCORE, make_score, replace_unfinished
from runtime import ranks, steps
from runtime.flags import AtOnce, Count, Function, Input, Natural, NotNegative, Positive, Questions, Saving, Share


@dataclass(frozen=True)
class Config:
    """Reinforcement learning of a student against a reward model, or against the vote itself."""

    policy: Input  # the SFT student, or the policy of the round before: where it starts
    questions: Questions  # training questions; their gold answers are not read
    out: str  # Hugging Face folder to write
    reward_model: Input = ""  # scores the answers; its copy becomes the critic
    votes: Input = ""  # instead of a reward model: rewards.jsonl, +1 for an answer that equals the vote, -1 otherwise
    reward: Function = ""  # instead: FILE.py:NAME, your own name(questions, prompts, responses, texts) -> (B,)
    gold: bool = False  # instead of all: +1 for the gold answer. An upper bound, for comparison; never the method
    critic: Input = ""  # another reward model to start the critic from
    zero_values: bool = False  # the critic gets a new head of zeros, so it starts at the mean score
    iterations: Count = 60  # rollouts
    rollout_size: Count = 256  # responses per iteration
    minibatches: Count = 4  # optimiser steps per epoch
    epochs: Count = 1  # passes over a rollout; more need the clip
    max_new_tokens: Count = 256  # a response that has not ended by then is cut
    temperature: Positive = 1.0  # of sampling, and of every log-prob
    lr: NotNegative = 2e-4  # of the policy, linear to 0
    critic_lr: NotNegative = 5e-4  # of the critic, linear to 0: it has more to learn
    warmup: Natural = 2  # iterations
    kl_coef: NotNegative = 0.05  # nats of reward per nat of divergence from the reference
    gamma: Share = 1.0  # no discount: the only score comes at the end
    lam: Share = 0.95  # GAE: 1 trusts the return, 0 the critic
    clip: NotNegative = 0.2  # policy ratio stays within 1 +- clip
    value_clip: NotNegative = 0.2  # value stays within +- value_clip of the old one, per update
    lenient: bool = False  # with --votes and --gold: read the last number or letter where no answer is stated
    unfinished_score: float = UNFINISHED_SCORE  # replaces the score of a response without an end
    max_grad_norm: Positive = 1.0
    valid: Questions = ""  # held-out questions: greedy score and accuracy now and then, for the report only
    eval_every: Count = 20  # iterations between those, and between entries of samples.txt
    lora: Natural = 0  # rank of the adapters that learn instead of all weights (lora.py); they want ten times the lr
    seed: int = 0  # of the order of the questions and of all sampling
    # what changes the memory that is needed and not the result
    batch_size: AtOnce = 256  # responses sampled together
    micro_tokens: AtOnce = 4096  # tokens per forward pass, padding included
    gradient_checkpointing: Saving = False  # a third more time for much less memory


# ---- the method: five pure functions -------------------------------------------------------------------------------


def shape_rewards(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Reward of every token: scores (B,), log-probs and mask (B, T-1) -> (B, T-1), 0 outside the mask.

    -kl_coef * (logprob - ref_logprob) on each sampled token (the k1 estimate of the KL), plus the score on the last.
    A masked cell may hold anything, NaN too: it is never used.
    Example: kl_coef 0.1, differences [1, 2, 3], score 1 -> [-0.1, -0.2, 0.7].
    """
    rewards = torch.where(mask, -kl_coef * (logprobs - ref_logprobs), 0.0)  # (B, T-1)
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)  # (B, T-1): the last True of each row
    return rewards + last * scores[:, None]


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, right to left: all (B, T-1) -> advantages, returns (B, T-1), 0 off the mask.

    delta_t = r_t + gamma * V_(t+1) - V_t;  A_t = delta_t + gamma * lam * A_(t+1);  return_t = A_t + V_t.
    V after the last token is 0: a response that ends, or is cut, is over. A masked cell of `values` may hold anything,
    NaN too. Example: rewards [0, 0, 1], values 0.5, gamma 1, lam 0.95 -> advantages [0.45125, 0.475, 0.5].
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

    All rows together, not row by row. Equal cells, or a single one, give 0. A masked cell may hold anything, NaN too.
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
    within +-20, so that nothing overflows. A masked cell may hold anything, NaN too, and changes neither the loss nor
    its gradient. Example: A = 1, ratio 1.5, clip 0.2 -> loss -1.2, gradient 0.
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
    old value. A masked cell may hold anything, NaN too, and changes neither the loss nor its gradient.
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
    """What was sampled, and what the networks said of it before any update. Nothing here has a gradient."""

    tokens: Tensor  # (B, T) prompt and response, right-padded
    mask: Tensor  # (B, T-1) True where tokens[:, t+1] was sampled
    lengths: list[int]  # of prompt and response, row by row
    scores: Tensor  # (B,)
    ended: Tensor  # (B,) False: cut at max_new_tokens
    questions: list[Question]
    texts: list[str]
    logprobs: Tensor | None = None  # (B, T-1) of the policy that sampled
    ref_logprobs: Tensor | None = None  # (B, T-1) of the frozen reference
    values: Tensor | None = None  # (B, T-1) of the critic, before each token
    entropy: Tensor | None = None  # (B, T-1) of the policy
    advantages: Tensor | None = None  # (B, T-1) whitened
    returns: Tensor | None = None  # (B, T-1)

    def rows(self, rows: list[int]) -> "Rollout":
        """Some rows, cut to the longest of them: (b, T') and (b, T'-1)."""
        T = max(self.lengths[row] for row in rows)
        cut = {"tokens": self.tokens[rows, :T]}
        for name in ("mask", "logprobs", "ref_logprobs", "values", "entropy", "advantages", "returns"):
            if (x := getattr(self, name)) is not None:
                cut[name] = x[rows, : T - 1]
        return replace(self, **cut)


def rollout(cfg, policy: Llama, reference: Llama, score, tokenizer, asked, iteration) -> Rollout:
    """Answer each of `asked`, pairs of question and prompt; score the answers, let policy and reference read them."""
    questions, prompts = map(list, zip(*asked))
    seeds = [runtime.seed_of(cfg.seed, "ppo", iteration, i) for i in range(len(prompts))]
    sampled = answers_to(policy, tokenizer, prompts, cfg.max_new_tokens, cfg.batch_size, cfg.temperature, seeds)
    responses, texts, finishes = [s.tokens for s in sampled], [s.text for s in sampled], [s.finish for s in sampled]
    tokens, mask, lengths = collate(prompts, responses, runtime.default_device())  # (B, T), (B, T-1), (B,)
    scores = score(questions, prompts, responses, texts)  # (B,)
    scores = replace_unfinished(scores, finishes, cfg.unfinished_score).to(tokens.device)
    ended = torch.tensor([finish == "stop" for finish in finishes], device=tokens.device)  # (B,)
    r = Rollout(tokens, mask, lengths.tolist(), scores, ended, questions, texts)

    def reader(rows: list[int]) -> Tensor:
        b = r.rows(rows)
        # the function that the update uses, not the sampler's numbers: then the first ratio is 1
        logprobs, entropy = masked_logprobs(policy, b.tokens, b.mask, cfg.temperature)  # (b, T'-1), (b, T'-1)
        ref_logprobs, _ = masked_logprobs(reference, b.tokens, b.mask, cfg.temperature)  # (b, T'-1)
        return torch.stack([logprobs, ref_logprobs, entropy])  # (3, b, T'-1)

    logprobs, ref_logprobs, entropy = read_all(cfg, r, reader, iteration)  # (B, T-1) each
    return replace(r, logprobs=logprobs, ref_logprobs=ref_logprobs, entropy=entropy)


def values_of(cfg, critic: ScalarModel, r: Rollout, iteration: int) -> Tensor:
    """What the critic expects before each sampled token: (B, T-1)."""

    def reader(rows: list[int]) -> Tensor:
        b = r.rows(rows)
        return masked_values(critic, b.tokens, b.mask)[None]  # (1, b, T'-1)

    return read_all(cfg, r, reader, iteration)[0]  # (B, T-1)


def read_all(cfg, r: Rollout, reader, iteration: int) -> Tensor:
    """reader(rows) of all rows, (k, B, T-1), in the update's first micro-batches: in others bf16 rounds otherwise."""
    batches = minibatches_of(cfg, len(r.tokens), iteration, epochs=1)
    return steps.read(r.lengths, cfg.micro_tokens, reader, r.mask, batches)


def minibatches_of(cfg, n: int, iteration: int, epochs: int) -> list[list[int]]:
    """Which of n responses each optimiser step takes: in every epoch all of them once, in a random order."""
    orders = [steps.permutation(n, cfg.seed, "minibatches", iteration, epoch) for epoch in range(epochs)]
    size = math.ceil(n / cfg.minibatches)
    return [order[i : i + size] for order in orders for i in range(0, n, size)]


# ---- update --------------------------------------------------------------------------------------------------------


def update_policy(cfg, policy: Llama, adam, r: Rollout, iteration: int) -> dict[str, float]:
    """`epochs` passes of minibatch steps over one rollout; returns the metrics, averaged over the tokens seen."""
    done = []
    for rows in minibatches_of(cfg, len(r.tokens), iteration, cfg.epochs):
        total = int(r.mask[rows].sum())  # tokens of the whole optimiser step

        def loss_of(rows: list[int], total: int = total) -> tuple[Tensor, dict[str, Tensor]]:
            b = r.rows(rows)
            logprobs, _ = masked_logprobs(policy, b.tokens, b.mask, cfg.temperature)  # (b, T'-1)
            loss, clipped = policy_loss(logprobs, b.logprobs, b.advantages, b.mask, cfg.clip, total)
            return loss, {"loss": loss * total, "clipped": clipped} | health.ratios(logprobs, b.logprobs, b.mask)

        done.append({"tokens": total} | steps.step(policy, adam, rows, r.lengths, cfg, loss_of))
    return health.of_policy_steps(done)


def update_critic(cfg, critic: ScalarModel, adam, r: Rollout, iteration: int) -> dict[str, float]:
    """The same steps for the critic."""
    done = []
    for rows in minibatches_of(cfg, len(r.tokens), iteration, cfg.epochs):
        total = int(r.mask[rows].sum())

        def loss_of(rows: list[int], total: int = total) -> tuple[Tensor, dict[str, Tensor]]:
            b = r.rows(rows)
            values = masked_values(critic, b.tokens, b.mask)  # (b, T'-1)
            loss, clipped = value_loss(values, b.values, b.returns, b.mask, cfg.value_clip, total)
            return loss, {"loss": loss * total, "clipped": clipped}

        done.append({"tokens": total} | steps.step(critic, adam, rows, r.lengths, cfg, loss_of))
    return health.of_critic_steps(done)


# ---- the script ----------------------------------------------------------------------------------------------------


@runtime.stage
def main(cfg: Config, stage: runtime.Stage) -> None:
    runtime.require(cfg.minibatches <= cfg.rollout_size, f"--minibatches {cfg.minibatches}: more than --rollout_size")
    tokenizer, dtype, device = Tokenizer(cfg.policy), runtime.trained_dtype(cfg.lora), runtime.default_device()
    tokenizer.require_same(cfg.reward_model, cfg.critic)
    # four roles: policy and critic learn; reference and reward model stay what these two start as. They are copies, or
    # with --lora the same two networks with their adapters off
    policy, adam = learner(cfg, load_model(cfg.policy, dtype, device), "policy")
    reference = lora.as_it_started(policy) or ranks.shard(load_model(cfg.policy, dtype, device).requires_grad_(False))
    critic, critic_adam, reward_model = critic_of(cfg, dtype, device)
    parts = {"policy": policy, "critic": critic, "adam": adam, "critic_adam": critic_adam}  # of a saved state
    score, questions = make_score(cfg, load_questions(cfg.questions), reward_model)
    valid = load_questions(cfg.valid) if cfg.valid else []
    prompts = prompts_of(policy.config, tokenizer, [*questions, *valid], cfg.max_new_tokens)  # all of them must fit
    runtime.set_threads(policy)

    watch = health.Health(cfg.rollout_size, stage.logged(), steps.bf16())
    for iteration in stage.steps(cfg.iterations, **parts):
        scale = runtime.lr_at(iteration, cfg.iterations, cfg.warmup)
        runtime.set_lr(adam, scale * cfg.lr)
        runtime.set_lr(critic_adam, scale * cfg.critic_lr)

        # 1. rollout: sample, score, and let policy and reference read
        asked = [(questions[i], prompts[i]) for i in questions_of(iteration, len(questions), cfg)]
        r = rollout(cfg, policy, reference, score, tokenizer, asked, iteration)

        # 2. rewards: a KL penalty on every sampled token, the score on the last
        rewards = shape_rewards(r.scores, r.logprobs, r.ref_logprobs, r.mask, cfg.kl_coef)  # (B, T-1)

        # 3. values of the critic; advantages, whitened for the policy; returns, raw, for the critic
        r = replace(r, values=values_of(cfg, critic, r, iteration))
        advantages, returns = gae(rewards, r.values, r.mask, cfg.gamma, cfg.lam)  # (B, T-1), (B, T-1)
        metrics = health.of_rollout(r, advantages, cfg.kl_coef)
        metrics |= health.of_values(r, returns)
        r = replace(r, advantages=whiten(advantages, r.mask), returns=returns)
        steps.require_finite(metrics)  # a broken reward model stops here, before a step is taken on NaN

        # now and then, before the update: keep the policy, and let it answer held-out questions greedily
        if iteration % cfg.eval_every == 0 or iteration == cfg.iterations - 1:
            metrics |= look_closer(cfg, stage, iteration, r, policy, tokenizer, valid, score)

        # 4. update
        metrics |= update_policy(cfg, policy, adam, r, iteration)
        metrics |= update_critic(cfg, critic, critic_adam, r, iteration)
        stage.log(iteration, metrics, health.line(metrics))
        watch.check(iteration, metrics)  # warnings, and an error where the update disagrees with the rollout

    conclude(cfg, stage, policy, tokenizer)


def learner(cfg: Config, network: nn.Module, role: str) -> tuple[nn.Module, AdamW]:
    """A network that learns, all of it or its adapters, and the optimiser that it learns with."""
    network = ranks.shard(lora.adapt(network, cfg.lora, cfg.seed, role))
    network.model.gradient_checkpointing = cfg.gradient_checkpointing
    return network, AdamW(network.parameters(), betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0, fused=True)


def critic_of(cfg: Config, dtype, device) -> tuple:
    """The critic, its optimiser, and the reward model if that is the critic as it started; else None."""
    start = cfg.critic or cfg.reward_model  # without one the critic is the policy's trunk with a head of zeros
    new_head = "zero" if cfg.zero_values or not start else None
    critic = load_scalar_model(start or cfg.policy, dtype, device, new_head=new_head)
    critic, adam = learner(cfg, critic, "critic")
    return critic, adam, lora.as_it_started(critic) if start == cfg.reward_model and not new_head else None


def questions_of(iteration: int, n: int, cfg: Config) -> list[int]:
    """Which of n questions an iteration asks: every question once, in a random order, before any comes again."""
    start = iteration * cfg.rollout_size
    passes = range(start // n, (start + cfg.rollout_size - 1) // n + 1)
    order = [i for epoch in passes for i in steps.permutation(n, cfg.seed, "questions", epoch)]
    return order[start % n :][: cfg.rollout_size]


def look_closer(cfg, stage, iteration, r, policy, tokenizer, valid, score) -> dict[str, float]:
    """Keep the policy and some of its answers; how it answers held-out questions, and their scores."""
    stage.keep(policy, tokenizer)
    stage.append("samples.txt", health.show_samples(iteration, r))
    print(health.two_answers(r))
    if not valid:
        return {}
    summary, transcripts = accuracy(policy, tokenizer, valid, cfg.max_new_tokens, cfg.batch_size)
    found = {"valid/accuracy": summary["strict"]}
    if cfg.reward_model:  # above, it is what PPO climbs; gold must follow
        prompts = [tokenizer.chat(question.prompt) for question in valid]
        texts = [row["response"] for row in transcripts]
        scores = score(valid, prompts, [tokenizer.response(text) for text in texts], texts)  # (valid,)
        finishes = [row["finish"] for row in transcripts]
        found["valid/score"] = replace_unfinished(scores, finishes, cfg.unfinished_score).mean().item()
    return found


def conclude(cfg: Config, stage: runtime.Stage, policy: Llama, tokenizer: Tokenizer) -> None:
    """Save the policy, where it came to, and what it cost."""
    log, parameters = stage.logged(), sum(p.numel() for p in policy.parameters())
    last, seen = log[-1], sum(row["tokens"] for row in log)
    results = {"score": last["objective/scores"], "kl": last["objective/kl"]}
    print(f"score {results['score']:+.2f}, KL {results['kl']:.2f} nats per answer, {last['val/eos_share']:.1%} ended")
    # per token: sampler, readers and reward model 2N each; what learns 6N per epoch, 4N where its weights are frozen
    flops = parameters * seen * (10 + (8 if cfg.lora else 12) * cfg.epochs)
    stage.save(policy, tokenizer, tokens=sum(row["sampled"] for row in log), flops=flops, **results)


if __name__ == "__main__":
    runtime.launch(main, Config, every_rank=True)
