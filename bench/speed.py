"""How fast we are: against transformers and TRL, in turns, on the same weights; and against what the machine can do.

    python bench/speed.py                                           # shapes tiny and smollm2, no TRL
    python bench/speed.py --make_trl_venv trl                       # once: a virtual environment with TRL 1.11, then
    python bench/speed.py --trl_python trl/bin/python --threads 1
    python bench/speed.py --shape tiny --only sft,generate --profile                   # where our time goes

Rows. `sft`: an optimiser step of sft.py; the peer is LlamaForCausalLM with fused AdamW, fed the same examples: as many
tokens of prompt, without loss, as when generating. `score`: log-probs of given responses; the peer computes logits for
the responses only. `generate B`: B prompts, every answer of full length. `generate B ragged`: one draw in 16 or so is
the end token, so that answers end at different times. The peer is `generate` with a dynamic or a static cache, whichever
is faster. Only real new tokens count, the end included. `ppo`: a whole iteration of ppo.py (ragged sampling, scores,
four readings, update, its log line); the peer is PPOTrainer of TRL with as many sequences, minibatches and epochs,
without gradient checkpointing, sample generations and saving.

Fair play. Weights are random, in the real shape, in files that both sides load; prompts are all of one length, so that
nobody pads. Each side runs in a process of its own, started anew for every row: the peak of its memory is that row's.
The sides take turns (one step, one call, one iteration each) after a turn that does not count. A third process takes
turns with them and measures the machine: a matrix product, and a read of as many bytes as the weights have. All numbers
are medians over the rounds; a spread is the middle half of the rounds. Losses and log-probs must agree between the
sides, and so must the counts of tokens, or the run stops.

The limit adds, over forward, backward and decoding passes, the larger of FLOPs / rate of the matrix product and bytes /
rate of the read, and AdamW's bytes. Bytes are weights, and the cache when decoding; activations are free.

On CUDA the same happens in bf16, for --shape llama-1b, llama-3b and llama-8b too. Nobody has run that yet.
"""

import itertools
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import runtime
from model import Llama, ModelConfig, ScalarModel, load_model, masked_logprobs, save_model

CUDA = torch.cuda.is_available()
DTYPE = torch.bfloat16 if CUDA else torch.float32  # of the files, and of whatever only answers
END_SHARE = 1 / 16  # of a random model's draws are the end token


@dataclass(frozen=True)
class Config:
    """Measure ours in turns with transformers, TRL and the machine; write speed-MACHINE.json and a picture."""

    shape: str = "tiny,smollm2"  # comma-separated: tiny, smollm2, llama-1b, llama-3b, llama-8b
    only: str = ""  # rows that begin with one of these, comma-separated: sft, score, generate, ppo; none: all
    threads: int = 0  # of every side; 0: what each side takes by itself
    seconds: int = 40  # a row begins no further round after these, but has three at least
    peer: bool = True  # --no-peer: ours alone, against the machine
    trl_python: str = ""  # the python of an environment with TRL; none: the row `ppo` has no peer
    make_trl_venv: str = ""  # make such an environment in this folder, and do nothing else
    profile: bool = False  # instead: print which operations our time goes to, row by row
    quick: bool = False  # two rounds of small batches: only whether everything runs
    out: str = "results"  # folder for speed-MACHINE.json and .png


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
    ppo: tuple[int, int, int]  # sequences of a rollout, minibatches, sequences of a forward pass


def llama(vocab: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, head: int, tied: bool = True):
    numbers = (vocab, hidden, inner, layers, heads, kv_heads, head)
    return ModelConfig(*numbers, tie_word_embeddings=tied, pad_token_id=vocab - 2, eos_token_id=vocab - 1)


LARGE = dict(prompt=128, new=256, sft=(4, 1024), score=8, generate=(1, 256), ragged=(256,), ppo=(512, 4, 8))
SHAPES = {
    "tiny": Shape(llama(480, 96, 256, 4, 6, 3, 16), 24, 32, (64, 48), 64, (1, 32, 256), (32,), (256, 4, 256)),
    "smollm2": Shape(llama(49152, 576, 1536, 30, 9, 3, 64), 64, 32, (4, 128), 8, (1, 32), (32,), (8, 2, 8)),
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

    def texts(self) -> tuple[list[list[int]], list[list[int]]]:
        """Prompts and responses as token ids, a response of `sft` with the end token."""
        texts = json.loads(Path(self.folder, "texts.json").read_text(encoding="utf-8"))
        responses = [response[: self.shape.new] for response in texts["responses"]]
        if self.row == "sft":
            length, end = self.shape.sft[1] - self.shape.prompt, self.shape.model.eos_token_id
            responses = [[*response[: length - 1], end] for response in texts["responses"]]
        return texts["prompts"][: self.size], responses[: self.size]


# ---- the same files for everybody ----------------------------------------------------------------------------------


def files(job: Job) -> None:
    """model/ and reward/: random weights and a tokenizer of words t0, t1, ...; texts.json, questions.jsonl, sft.jsonl."""
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


# ---- a worker's end of the line ------------------------------------------------------------------------------------


class Turns:
    """`turn()`, work, `turn(tokens=...)`, work, `turn(tokens=...)`: what happens between two calls is on the clock.

    A call reports the work since the last one, and waits until more is wanted. Made after the imports, whose memory is
    told apart.
    """

    def __init__(self, job: Job):
        self.line, self.start, self.profiler, self.profile = os.fdopen(os.dup(1), "w"), None, None, job.profile
        os.dup2(2, 1)  # what the work prints is not for the line
        self.imports_mb = runtime.peak_memory_mb()

    def __call__(self, **result: object) -> None:
        if self.start is not None:
            result["seconds"] = clock() - self.start
            if self.profiler:
                self.profiler.stop()
                order = "self_device_time_total" if CUDA else "self_cpu_time_total"
                result["profile"] = self.profiler.key_averages().table(order, row_limit=18, max_name_column_width=50)
            self.say(result)
            self.profiler = torch.profiler.profile() if self.profile else None  # not yet in the first turn
        if not sys.stdin.readline():
            threads = torch.get_num_threads()
            self.say({"peak_mb": runtime.peak_memory_mb(), "imports_mb": self.imports_mb, "threads": threads})
            os._exit(0)  # a training loop would go on
        if self.profiler:
            self.profiler.start()
        self.start = clock()

    def say(self, message: dict) -> None:
        print(json.dumps(message), file=self.line, flush=True)


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


def our_loop(job: Job, turn: Turns, main, cfg, result) -> None:
    """Run a script's own training loop, with a turn's end wherever it has logged a step."""
    log = runtime.Stage.log

    def log_and_pause(stage: runtime.Stage, step: int, **metrics: float) -> None:
        log(stage, step, **metrics)
        turn(**result(metrics))

    runtime.Stage.log = log_and_pause
    turn()
    main(cfg)


def our_sft(job: Job) -> None:
    import sft

    B, T = job.shape.sft
    cfg = sft.Config(
        model=f"{job.folder}/model",
        data=f"{job.folder}/sft.jsonl",
        out=f"{job.folder}/out",
        epochs=10**6,  # of one step each
        batch_size=B,
        micro_batch=B,
        lr=1e-5,
        warmup=1,
    )
    our_loop(job, Turns(job), sft.main, cfg, lambda metrics: {"lengths": [T] * B, "check": metrics["loss"]})


@torch.no_grad()
def our_score(job: Job) -> None:
    turn = Turns(job)
    model = load_model(f"{job.folder}/model", DTYPE, runtime.default_device())
    tokens, mask = collated(job)
    turn()
    while True:
        logprobs, _ = masked_logprobs(model, tokens, mask)  # (B, T-1)
        turn(lengths=[tokens.shape[1]] * job.size, check=-logprobs[mask].mean().item())


def our_generate(job: Job) -> None:
    from generate import generate

    turn = Turns(job)
    model = load_model(f"{job.folder}/model", DTYPE, runtime.default_device())
    stop = [job.shape.model.eos_token_id] if "ragged" in job.row else []
    prompts, _ = job.texts()
    turn()
    for seed in itertools.count():
        answers = generate(model, prompts, job.shape.new, 1.0, stop, seed=seed, batch_size=job.size)
        turn(lengths=[len(answer.tokens) for answer in answers])


def our_ppo(job: Job) -> None:
    import ppo

    turn, split, lengths = Turns(job), {}, []

    def timed(name: str):
        inner = getattr(ppo, name)

        def call(*args, **kwargs):
            start = clock()
            out = inner(*args, **kwargs)
            split[name] = clock() - start
            if name == "generate":
                lengths[:] = [len(answer.tokens) for answer in out]
            return out

        return call

    for name in ("generate", "rollout", "update"):
        setattr(ppo, name, timed(name))
    rollout, minibatches, micro = job.shape.ppo
    cfg = ppo.Config(
        policy=f"{job.folder}/model",
        reward_model=f"{job.folder}/reward",
        questions=f"{job.folder}/questions.jsonl",
        out=f"{job.folder}/out",
        iterations=10**6,
        eval_every=10**6,
        rollout_size=rollout,
        minibatches=minibatches,
        micro_batch=micro,
        max_new_tokens=job.shape.new,
        lr=1e-6,  # lengths stay what they are
        critic_lr=1e-6,
    )
    our_loop(job, turn, ppo.main, cfg, lambda metrics: {"lengths": lengths, "split": split})


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
        ends = (answers(best, job.shape.new) == end).long()  # (B, new)
        if "ragged" in job.row:
            lengths = ((ends.cumsum(1) - ends) == 0).sum(1)  # (B,): up to the first end
        else:
            lengths = (ends >= 0).sum(1)  # (B,): all
        turn(lengths=lengths.tolist(), setting=f"{best} cache")


# ---- the machine ---------------------------------------------------------------------------------------------------


def machine(job: Job) -> None:
    """Rates of a matrix product (FLOP/s) and of reading the weights' size in bytes, by a sum or a product (byte/s)."""
    turn, device = Turns(job), runtime.default_device()
    n = 8192 if CUDA else 1024
    square = torch.randn(n, n, device=device).to(DTYPE)
    matrix = torch.randn(weights(job.shape.model)[1] // 1024 + 1, 1024, device=device).to(DTYPE)
    vector = matrix[0].clone()

    def best_of_three(work) -> float:
        times = []
        for _ in range(3):
            start = clock()
            work()
            times.append(clock() - start)
        return min(times)

    turn()
    while True:
        product = best_of_three(lambda: square @ square)
        read = min(best_of_three(lambda: matrix @ vector), best_of_three(lambda: matrix.sum()))
        turn(flops=2 * n**3 / product, bytes=matrix.nbytes / read)


def weights(config: ModelConfig) -> tuple[int, int]:
    """Weights that every token is multiplied by in the blocks, and all of the model."""
    with torch.device("meta"):
        model = Llama(config)
    return sum(p.numel() for p in model.model.layers.parameters()), sum(p.numel() for p in model.parameters())


def limit(job: Job, lengths: list[int], rate: dict[str, float]) -> float:
    """Seconds that the work of a turn takes at least, were it done at the machine's rates (see the top of the file)."""
    shape, c, B = job.shape, job.shape.model, job.size
    (blocks, parameters), size = weights(c), DTYPE.itemsize
    head = c.vocab_size * c.hidden_size
    pair = 4 * c.num_hidden_layers * c.num_attention_heads * c.head_dim  # FLOPs of one query looking at one key
    cell = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * size  # bytes of one cached position

    def forward(tokens: int, heads: int, passes: int = 1) -> float:
        """B rows of `tokens` each, logits of `heads` positions in all; a backward pass counts as two more."""
        flops = 2 * blocks * B * tokens + 2 * head * heads + pair * B * tokens * (tokens + 1) / 2
        return passes * max(flops / rate["flops"], (blocks + head) * size / rate["bytes"])

    def decode() -> float:
        total = 0.0
        for t in range(1, max(lengths)):
            alive = sum(length > t for length in lengths)
            seen = alive * (shape.prompt + t)
            flops = 2 * (blocks + head) * alive + pair * seen
            total += max(flops / rate["flops"], ((blocks + head) * size + seen * cell) / rate["bytes"])
        return forward(shape.prompt, B) + total

    step = 7 * 4 * parameters / rate["bytes"]  # AdamW in fp32: reads weight, gradient and moments, writes all but one
    kind = job.row.split()[0]
    if kind == "sft":
        return forward(shape.sft[1], B * (shape.sft[1] - shape.prompt), 3) + step
    if kind == "score":
        return forward(shape.prompt + shape.new, B * shape.new)
    if kind == "generate":
        return decode()
    tokens = shape.prompt + sum(lengths) / B  # policy and reference with logits, critic and reward model without
    reads = 2 * forward(tokens, sum(lengths)) + 2 * forward(tokens, 0)
    return decode() + reads + forward(tokens, sum(lengths), 3) + forward(tokens, 0, 3) + 2 * shape.ppo[1] * step


# ---- the one who asks ----------------------------------------------------------------------------------------------


class Worker:
    """A side at work in a process of its own."""

    def __init__(self, side: str, job: Job, threads: int, python: str = sys.executable):
        script = ROOT / "bench" / ("trl_ppo.py" if side == "trl" else "speed.py")
        self.name, self.log = f"{side}, {job.row}", Path(job.folder, f"{side}.log").open("w+", encoding="utf-8")
        environment = os.environ | ({"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)} if threads else {})
        command = [python, str(script), "worker", side, json.dumps(asdict(job))]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log}
        self.process = subprocess.Popen(command, text=True, env=environment, **pipes)

    def turn(self) -> dict:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.hear()

    def end(self) -> dict:
        self.process.stdin.close()
        return self.hear()

    def hear(self) -> dict:
        if line := self.process.stdout.readline():
            return json.loads(line)
        self.log.seek(0)
        raise RuntimeError(f"{self.name}: the process ended:\n" + "".join(self.log.readlines()[-30:]))


def measure(cfg: Config, job: Job, sides: list[str]) -> dict:
    """One row: rounds of one turn each, ours first, the machine last. Three numbers are median and quartiles."""
    pythons = {"trl": cfg.trl_python}
    workers = [Worker(side, job, cfg.threads, pythons.get(side, sys.executable)) for side in (*sides, "machine")]
    first, rounds, start = [worker.turn() for worker in workers], [], time.monotonic()
    while len(rounds) < (2 if cfg.quick else 3) or (time.monotonic() - start < cfg.seconds and not cfg.quick):
        rounds.append([worker.turn() for worker in workers])
    ends = [worker.end() for worker in workers]

    *turns, rates = ([round[i] for round in rounds] for i in range(len(workers)))
    speeds = [[sum(turn["lengths"]) / turn["seconds"] for turn in side] for side in turns]
    row = {
        "rounds": len(rounds),
        "share_of_limit": middle(limit(job, turn["lengths"], rate) / turn["seconds"] for turn, rate in zip(*turns[:1], rates)),
        "gflop_per_second": middle(rate["flops"] / 1e9 for rate in rates),
        "gbyte_per_second": middle(rate["bytes"] / 1e9 for rate in rates),
    }
    for side, of, speed, end in zip(("ours", "peer"), turns, speeds, ends):
        row[side] = {"tokens_per_second": middle(speed), "seconds": middle(turn["seconds"] for turn in of)}
        row[side] |= {"tokens": sum(sum(turn["lengths"]) for turn in of)} | {k: round(v) for k, v in end.items()}
        if "split" in of[0]:
            row[side]["split"] = {part: middle(turn["split"][part] for turn in of) for part in of[0]["split"]}
    if len(sides) > 1:
        agree(job, first, turns)
        row["peer"]["name"] = " ".join((sides[1], turns[1][0].get("setting", ""))).strip()
        ours, peer = (row[side]["tokens_per_second"][0] for side in ("ours", "peer"))
        row["ratio"] = [round(ours / peer, 3), *middle(a / b for a, b in zip(*speeds))[1:]]
    return row


def middle(values) -> list[float]:
    """Median, lower and upper quartile."""
    return [float(f"{x:.4g}") for x in np.percentile(list(values), [50, 25, 75])]


def agree(job: Job, first: list[dict], turns: list[list[dict]]) -> None:
    """Raises RuntimeError if the two sides did not do the same work."""
    if "check" in first[0]:  # a loss or a mean log-prob, before any update
        ours, peer = (turn["check"] for turn in first[:2])
        if not math.isclose(ours, peer, rel_tol=2e-2 if CUDA else 1e-4):
            raise RuntimeError(f"{job.row}: ours computes {ours}, the peer {peer}")
    ours, peer = (np.concatenate([turn["lengths"] for turn in side]) for side in turns)
    error = math.sqrt(ours.var() / len(ours) + peer.var() / len(peer))  # 0 where all answers have full length
    if len(ours) != len(peer) or abs(ours.mean() - peer.mean()) > 5 * error:
        raise RuntimeError(
            f"{job.row}: ours has {len(ours)} rows of {ours.mean():.1f} tokens, the peer {len(peer)} of {peer.mean():.1f}"
        )


def profile(cfg: Config, job: Job) -> None:
    worker = Worker("ours", job, cfg.threads)
    _, turn = worker.turn(), worker.turn()
    worker.end()
    print(f"{job.shape_name} {job.row}: {turn['seconds']:.3f} s, the profiler's own work included {turn.get('split', '')}")
    print(turn["profile"], flush=True)


# ---- table and picture ---------------------------------------------------------------------------------------------


def table(name: str, rows: dict[str, dict]) -> str:
    """A line per row."""
    lines = [f"{'':22}{'tokens/s':>9}{'peer':>9}{'ratio':>8} {'spread':14}{'of limit':>9}{'MB':>8}{'peer':>7}  peer"]
    for kind, row in rows.items():
        peer, speed = row.get("peer", {}), row["ours"]["tokens_per_second"][0]
        line = f"{name + ' ' + kind:22}{speed:9,.0f}"
        if peer:
            spread = "{:.2f} to {:.2f}".format(*row["ratio"][1:])
            line += f"{peer['tokens_per_second'][0]:9,.0f}{row['ratio'][0]:8.2f} {spread:14}"
        else:
            line += f"{'-':>9}{'-':>8} {'-':14}"
        line += f"{row['share_of_limit'][0]:9.0%}{row['ours']['peak_mb']:8,}"
        lines.append(line + (f"{peer['peak_mb']:7,}  {peer['name']}" if peer else f"{'-':>7}"))
    return "\n".join(lines)


def draw(result: dict, path: Path) -> None:
    """Ratio to the peer and share of the limit of every row, with their spreads."""
    from matplotlib.figure import Figure

    rows = {f"{name}  {kind}": row for name, kinds in result["shapes"].items() for kind, row in kinds.items()}
    figure = Figure(figsize=(12, 1.6 + 0.42 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axis, key, colour in ((left, "ratio", "#0072B2"), (right, "share_of_limit", "#E69F00")):
        for place, row in enumerate(rows.values()):
            if key in row:
                value, low, high = row[key]
                axis.barh(place, value, color=colour)
                axis.plot([low, high], [place, place], color="black", linewidth=2.5)
                text = f" {value:.2f} x" if key == "ratio" else f" {value:.0%}"
                axis.text(max(value, high), place, text, va="center", fontsize=15)
        axis.set_xlim(0, 1.25 * max([1, *(row[key][2] for row in rows.values() if key in row)]))
        axis.axvline(1, color="black", linestyle="--", linewidth=1)
        axis.tick_params(labelsize=15)
        axis.spines[["top", "right"]].set_visible(False)
    left.set_yticks(range(len(rows)), rows)
    left.invert_yaxis()
    left.set_xlabel("speed, tokens/s over the peer's", fontsize=15)
    right.set_xlabel("share of the machine's limit", fontsize=15)
    figure.suptitle(f"{result['machine']}, {result['threads']} threads, {result['dtype']}", fontsize=16)
    figure.savefig(path, dpi=100)


def machine_name() -> str:
    """The processor that computes, without the name of the host."""
    if CUDA:
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text(encoding="utf-8")) if cpuinfo.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def make_trl_venv(folder: str) -> None:
    venv.create(folder, with_pip=True)
    python = str(Path(folder, "bin", "python"))
    for package in (f"torch=={torch.__version__.split('+')[0]}", "trl==1.11.*"):  # torch first: the same on both sides
        subprocess.run([python, "-m", "pip", "install", package], check=True)
    print(f"now: python bench/speed.py --trl_python {python}")


def main(cfg: Config) -> None:
    if cfg.make_trl_venv:
        return make_trl_venv(cfg.make_trl_venv)
    names = cfg.shape.split(",")
    for name in names:
        runtime.require(name in SHAPES, f"--shape {name}: one of {', '.join(SHAPES)}")
    kinds = cfg.only.split(",") if cfg.only else ["sft", "score", "generate", "ppo"]
    for kind in kinds:
        runtime.require(kind.split()[0] in ("sft", "score", "generate", "ppo"), f"--only {kind}: sft, score, generate or ppo")
    result = {"machine": machine_name(), "dtype": str(DTYPE).removeprefix("torch."), "torch": torch.__version__}
    result |= {"shapes": {}}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            job = Job("files", name, folder, cfg.quick, cfg.profile)
            Worker("files", job, cfg.threads).process.wait()  # not here: what this process holds, its children start with
            generate = [f"generate {n}" for n in job.shape.generate] + [f"generate {n} ragged" for n in job.shape.ragged]
            rows = [row for row in ("sft", "score", *generate, "ppo") if row.startswith(tuple(kinds))]
            measured = result["shapes"][name] = {}
            for row in rows:
                job = replace(job, row=row)
                if cfg.profile:
                    profile(cfg, job)
                    continue
                peer = ("trl" if cfg.trl_python else None) if row == "ppo" else "transformers"
                measured[row] = measure(cfg, job, ["ours", peer] if peer and cfg.peer else ["ours"])
                print(table(name, {row: measured[row]}), flush=True)
    if cfg.profile:
        return
    result["threads"] = max(row["ours"]["threads"] for rows in result["shapes"].values() for row in rows.values())
    print("\n".join(["", f"{result['machine']}, {result['threads']} threads, {result['dtype']}"]))
    print("\n".join(table(name, rows) for name, rows in result["shapes"].items()))
    slug = re.sub(r"[^a-z0-9]+", "-", f"{result['machine']} {result['threads']} threads".lower()).strip("-")
    path = Path(cfg.out, f"speed-{slug}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    runtime.write_json(path, result)
    draw(result, path.with_suffix(".png"))
    print(f"written: {path} and {path.with_suffix('.png').name}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        side, job = sys.argv[2], Job(**json.loads(sys.argv[3]))
        kind = job.row.split()[0]
        globals()["files" if side == "files" else "machine" if side == "machine" else f"{'our' if side == 'ours' else side}_{kind}"](job)
    else:
        runtime.launch(main, Config)
