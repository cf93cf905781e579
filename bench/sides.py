"""The work that bench/speed.py times: the files that all sides load, and what each side does, in a process of its own.

Read speed.py first. It starts a worker as `python bench/sides.py SIDE JOB`, which does its work as often as it is asked
to, and tells how long each time took. TRL's worker is trl_ppo.py.
"""

import itertools
import json
import math
import os
import re
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import runtime
from model import Llama, ModelConfig, ScalarModel, load_model, masked_logprobs, save_model
from runtime.checkpoint import Checkpoint

CUDA = torch.cuda.is_available()
DTYPE = torch.bfloat16 if CUDA else torch.float32  # of the files, and of whatever only answers
END_SHARE = 1 / 16  # of a random model's draws are the end token
RANK = 16  # of adapters


@dataclass(frozen=True)
class Shape:
    """A model, and the work it is given."""

    model: ModelConfig
    prompt: int  # tokens
    new: int  # tokens of a response, at most
    sft: tuple[int, int]  # sequences and tokens of a step, all in one forward pass
    score: int  # sequences of prompt + new tokens
    generate: tuple[int, ...]  # batch sizes
    ragged: tuple[int, ...]  # batch sizes
    ppo: tuple[int, int, int]  # sequences of a rollout, minibatches, sequences of the peer's forward passes
    micro_tokens: int  # of ours: they are sorted by length, and smaller ones stay in a core's own cache

    @property
    def rows(self) -> list[str]:
        """The rows of the table."""
        generate = [f"generate {size}" for size in self.generate] + [f"generate {size} ragged" for size in self.ragged]
        return ["sft", "sft lora", "score", *generate, "ppo", "ppo lora"]


def llama(vocab: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, head: int, tied: bool = True):
    numbers = (vocab, hidden, inner, layers, heads, kv_heads, head)
    return ModelConfig(*numbers, tie_word_embeddings=tied, pad_token_id=vocab - 2, eos_token_id=vocab - 1)


LARGE = dict(prompt=128, new=256, sft=(4, 1024), score=8, generate=(1, 128, 256, 512), ragged=(256,), ppo=(512, 4, 8))
LARGE |= dict(micro_tokens=3072)
SHAPES = {
    "tiny": Shape(
        llama(480, 96, 256, 4, 6, 3, 16), 24, 32, (64, 48), 64, (1, 32, 128, 256, 512), (32,), (256, 4, 256), 2048
    ),
    "smollm2": Shape(llama(49152, 576, 1536, 30, 9, 3, 64), 64, 32, (4, 128), 8, (1, 32), (32,), (8, 2, 8), 384),
    "llama-1b": Shape(llama(128256, 2048, 8192, 16, 32, 8, 64), **LARGE),
    "llama-3b": Shape(llama(128256, 3072, 8192, 28, 24, 8, 128), **LARGE),
    "llama-8b": Shape(llama(128256, 4096, 14336, 32, 32, 8, 128, tied=False), **LARGE),
}


@dataclass(frozen=True)
class Job:
    """What a worker is told: which row of which shape, in which folder."""

    row: str
    shape_name: str
    folder: str
    quick: bool = False
    profile: bool = False

    @property
    def shape(self) -> Shape:
        shape = SHAPES[self.shape_name]
        return replace(shape, generate=(1,), ragged=(8,), ppo=(8, 2, 8)) if self.quick else shape

    @property
    def size(self) -> int:
        """Sequences."""
        kind, *size = self.row.split()
        return {"sft": self.shape.sft[0], "score": self.shape.score, "ppo": self.shape.ppo[0]}.get(kind) or int(size[0])

    @property
    def lora(self) -> int:
        """The rank of the adapters that learn; 0: all weights do."""
        return RANK * self.row.endswith("lora")

    def texts(self) -> tuple[list[list[int]], list[list[int]]]:
        """Prompts and responses as token ids, a response of `sft` with the end token."""
        texts = json.loads(Path(self.folder, "texts.json").read_text(encoding="utf-8"))
        responses = [response[: self.shape.new] for response in texts["responses"]]
        if self.row.startswith("sft"):
            length, end = self.shape.sft[1] - self.shape.prompt, self.shape.model.eos_token_id
            responses = [[*response[: length - 1], end] for response in texts["responses"]]
        return texts["prompts"][: self.size], responses[: self.size]


# ---- the same files for everybody ----------------------------------------------------------------------------------


def files(job: Job) -> None:
    """model/, reward/: random weights and a tokenizer of words t0, t1, ...; questions.jsonl, sft.jsonl, texts.json."""
    config, shape, folder, rng = job.shape.model, job.shape, Path(job.folder), torch.Generator().manual_seed(0)
    V, end = config.vocab_size, config.eos_token_id
    words = {f"t{i}": i for i in range(V - 2)} | {"<pad>": V - 2, "<end>": V - 1}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": words[word], "content": word} | flags for word in ("<pad>", "<end>")],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "t0"},
    }
    for name, kind in (("model", Llama), ("reward", ScalarModel)):
        with torch.device("meta"):
            model = kind(config).to(DTYPE).requires_grad_(False)
        model.to_empty(device="cpu")
        if kind is Llama:
            model.tie()
        for weight in model.parameters():
            weight.fill_(1.0) if weight.dim() == 1 else weight.normal_(std=0.02, generator=rng)
        model.model.embed_tokens.weight[:, 0] = 1.0  # what all tokens have in common, and so every hidden state
        if kind is Llama:  # through it the end token is made as likely as wanted
            hidden = model.model(torch.randint(V - 2, (8, 32), generator=rng))[:, -1]  # (8, D)
            logits = model.lm_head(hidden).float()  # (8, V)
            wanted = logits[:, :end].logsumexp(1) + math.log(END_SHARE / (1 - END_SHARE))  # (8,)
            model.lm_head.weight[end, 0] += ((wanted - logits[:, end]) / hidden[:, 0]).mean()
        save_model(model, folder / name)
        runtime.write_json(folder / name / "tokenizer.json", tokenizer)
        runtime.write_json(folder / name / "tokenizer_config.json", {"eos_token": "<end>"})
    count = max(*shape.generate, *shape.ragged, shape.sft[0], shape.score, shape.ppo[0])
    texts = torch.randint(V - 2, (count, shape.prompt + max(shape.new, shape.sft[1])), generator=rng).tolist()
    prompts, responses = [text[: shape.prompt] for text in texts], [text[shape.prompt :] for text in texts]
    runtime.write_json(folder / "texts.json", {"prompts": prompts, "responses": responses})
    say = lambda tokens: " ".join(f"t{token}" for token in tokens)
    lines = {
        "questions": [{"question": say(prompt)} for prompt in prompts[: shape.ppo[0]]],
        "sft": [{"prompt": say(p), "response": say(r[:-1])} for p, r in zip(*replace(job, row="sft").texts())],
    }
    for name, rows in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print("{}")  # done


# ---- a worker's end of the line ------------------------------------------------------------------------------------


class Turns:
    """`turn()`, work, `turn(lengths=...)`, work, `turn(lengths=...)`: what happens between two calls is on the clock.

    A call reports the work since the last one, and waits until more is wanted. Made after the imports, whose memory is
    told apart. With job.profile every turn but the first is profiled.
    """

    def __init__(self, job: Job):
        self.line, self.start, self.profiler, self.profile = os.fdopen(os.dup(1), "w"), None, None, job.profile
        os.dup2(2, 1)  # what the work prints is not for the line
        self.imports_mb = peak_mb()

    def __call__(self, **result: object) -> None:
        if self.start is not None:
            result["seconds"], result["cpu_seconds"] = clock() - self.start, time.process_time() - self.cpu_start
            if self.profiler:
                self.profiler.stop()
                order = "self_device_time_total" if CUDA else "self_cpu_time_total"
                result["profile"] = self.profiler.key_averages().table(order, row_limit=18, max_name_column_width=50)
            self.say(result)
            self.profiler = torch.profiler.profile() if self.profile else None
        if not sys.stdin.readline():
            threads = torch.get_num_threads()
            self.say({"peak_mb": peak_mb(), "imports_mb": self.imports_mb, "threads": threads})
            os._exit(0)  # a training loop would go on
        if self.profiler:
            self.profiler.start()
        self.start, self.cpu_start = clock(), time.process_time()

    def say(self, message: dict) -> None:
        print(json.dumps(message), file=self.line, flush=True)


def peak_mb() -> float:
    """The most that this process has held; on Linux without what the one that started it did, which is in ru_maxrss."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="utf-8")) if status.is_file() else None
    return int(found[1]) / 1024 if found and not CUDA else runtime.peak_memory_mb()


def clock() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def collated(job: Job) -> tuple[torch.Tensor, torch.Tensor]:
    """tokens (B, T), mask (B, T-1): True where the next token is the response's."""
    from data import collate

    tokens, mask, _ = collate(*job.texts())
    return tokens.to(runtime.default_device()), mask.to(runtime.default_device())


# ---- ours ----------------------------------------------------------------------------------------------------------


def ours_model(job: Job) -> Llama:
    """The model as our scripts load it to answer or score, with the threads that they choose."""
    model = load_model(f"{job.folder}/model", DTYPE, runtime.default_device())
    runtime.set_threads(model)
    return model


def ours_loop(job: Job, turn: Turns, main, cfg, result) -> None:
    """Run a script's own training loop, with a turn's end wherever it has logged a step."""
    log = runtime.Stage.log

    def log_and_pause(stage: runtime.Stage, step: int, metrics: dict[str, float], line: str = "") -> None:
        log(stage, step, metrics, line)
        turn(**result(metrics))

    runtime.Stage.log = log_and_pause
    Checkpoint.save = lambda self: None  # nor does the peer save
    turn()
    main(cfg)


def ours_sft(job: Job) -> None:
    import sft

    B, T = job.shape.sft
    cfg = sft.Config(
        model=f"{job.folder}/model",
        data=f"{job.folder}/sft.jsonl",
        out=f"{job.folder}/out",
        epochs=10**4,  # of one step each
        batch_size=B,
        micro_tokens=B * T,  # one pass
        lora=job.lora,
        lr=1e-5,
        warmup=1,
    )
    ours_loop(job, Turns(job), sft.main, cfg, lambda metrics: {"lengths": [T] * B, "check": metrics["loss"]})


@torch.no_grad()
def ours_score(job: Job) -> None:
    turn = Turns(job)
    model = ours_model(job)
    tokens, mask = collated(job)
    turn()
    while True:
        logprobs, _ = masked_logprobs(model, tokens, mask)  # (B, T-1)
        turn(lengths=[tokens.shape[1]] * job.size, check=-logprobs[mask].mean().item())


def ours_generate(job: Job) -> None:
    from generate import generate

    turn = Turns(job)
    model, (prompts, _) = ours_model(job), job.texts()
    stop = [job.shape.model.eos_token_id] if "ragged" in job.row else []
    turn()
    for seed in itertools.count():
        answers = generate(model, prompts, job.shape.new, 1.0, stop, seed=seed, batch_size=job.size, compile=CUDA)
        turn(lengths=[len(answer.tokens) for answer in answers])


def ours_ppo(job: Job) -> None:
    import ppo

    turn, split, lengths = Turns(job), {}, []

    def timed(part: str, inner):
        def call(*args, **kwargs):
            start = clock()
            out = inner(*args, **kwargs)
            split[part] = clock() - start
            if part == "generate":
                lengths[:] = [len(answer.tokens) for answer in out]
            return out

        return call

    parts = {"generate": "answers_to", "rollout": "rollout", "values": "values_of"}
    for part, name in (parts | {"policy": "update_policy", "critic": "update_critic"}).items():
        setattr(ppo, name, timed(part, getattr(ppo, name)))
    rollout, minibatches, _ = job.shape.ppo
    cfg = ppo.Config(
        policy=f"{job.folder}/model",
        reward_model=f"{job.folder}/reward",
        questions=f"{job.folder}/questions.jsonl",
        out=f"{job.folder}/out",
        iterations=10**6,
        eval_every=10**6,
        rollout_size=rollout,
        batch_size=rollout,
        minibatches=minibatches,
        micro_tokens=job.shape.micro_tokens,
        lora=job.lora,
        max_new_tokens=job.shape.new,
        lr=1e-9,  # the work is the same, and lengths stay what they are
        critic_lr=1e-9,
    )
    ours_loop(job, turn, ppo.main, cfg, lambda metrics: {"lengths": lengths, "split": split})


# ---- transformers --------------------------------------------------------------------------------------------------


def transformers_model(job: Job, dtype: torch.dtype):
    from transformers import LlamaForCausalLM

    turn = Turns(job)
    return turn, LlamaForCausalLM.from_pretrained(f"{job.folder}/model", dtype=dtype).to(runtime.default_device())


def transformers_sft(job: Job) -> None:
    turn, model = transformers_model(job, torch.float32)
    model.train()
    tokens, mask = collated(job)
    labels = tokens.clone()  # (B, T)
    labels[:, 1:][~mask] = labels[:, 0] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    turn()
    while True:
        with torch.autocast("cuda", torch.bfloat16, enabled=CUDA):
            loss = model(tokens, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        turn(lengths=[tokens.shape[1]] * job.size, check=loss.item())


@torch.no_grad()
def transformers_score(job: Job) -> None:
    turn, model = transformers_model(job, DTYPE)
    tokens, _ = collated(job)
    new = job.shape.new
    turn()
    while True:
        logits = model(tokens, logits_to_keep=new + 1, use_cache=False).logits[:, :-1].float()  # (B, new, V)
        logprobs = logits.gather(-1, tokens[:, -new:, None])[..., 0] - logits.logsumexp(-1)  # (B, new)
        turn(lengths=[tokens.shape[1]] * job.size, check=-logprobs.mean().item())


def transformers_generate(job: Job) -> None:
    turn, model = transformers_model(job, DTYPE)
    prompts, end = torch.tensor(job.texts()[0], device=model.device), job.shape.model.eos_token_id  # (B, P)
    model.generation_config.eos_token_id = end if "ragged" in job.row else None
    sampling = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=job.shape.model.pad_token_id)

    def answers(cache: str, new: int) -> torch.Tensor:
        mask = torch.ones_like(prompts)
        out = model.generate(prompts, attention_mask=mask, max_new_tokens=new, cache_implementation=cache, **sampling)
        return out[:, prompts.shape[1] :]  # (B, new or less)

    seconds = {}
    for cache in ("dynamic", "static"):
        answers(cache, 8)
        start = clock()
        answers(cache, 8)
        seconds[cache] = clock() - start
    best = min(seconds, key=seconds.get)
    turn()
    while True:
        ends = (answers(best, job.shape.new) == end).long()  # (B, new or less)
        if "ragged" not in job.row:
            ends.zero_()  # a token like any other
        lengths = (ends.cumsum(1) - ends == 0).sum(1)  # (B,): the first end is the last that counts
        turn(lengths=lengths.tolist(), setting=f"{best} cache")


# ---- the machine ---------------------------------------------------------------------------------------------------


def machine(job: Job) -> None:
    """Rates of a matrix product (FLOP/s) and of reading as many bytes as the weights have, by a sum or a product."""
    turn, device = Turns(job), runtime.default_device()
    n = 8192 if CUDA else 1024
    square = torch.randn(n, n, device=device).to(DTYPE)
    parameters = sum(weight.numel() for weight in load_model(f"{job.folder}/model").parameters())
    matrix = torch.randn(-(-parameters // 1024), 1024, device=device).to(DTYPE)
    vector = matrix[0].clone()

    def per_second(work) -> float:
        """Over a tenth of a second or more: a busy machine slows this down as much as the turns of others."""
        start, count = clock(), 0
        while (elapsed := clock() - start) < 0.1:
            work()
            count += 1
        return count / elapsed

    turn()
    while True:
        read = max(per_second(lambda: matrix @ vector), per_second(lambda: matrix.sum()))
        turn(flops=2 * n**3 * per_second(lambda: square @ square), bytes=matrix.nbytes * read)


if __name__ == "__main__":
    side, job = sys.argv[1], Job(**json.loads(sys.argv[2]))
    together = (files, machine)  # one for all kinds of rows
    alone = (ours_sft, ours_score, ours_generate, ours_ppo, transformers_sft, transformers_score, transformers_generate)
    work = {function.__name__: function for function in together + alone}
    work[side if side in ("files", "machine") else f"{side}_{job.row.split()[0]}"](job)
