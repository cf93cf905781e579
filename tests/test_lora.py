"""lora.py: adapters by hand, what they leave alone, and PPO's four roles on two trunks."""

import json

import pytest
import torch
from safetensors.torch import load_file
from test_ppo import run, scorer, tiny  # noqa: F401  fixtures
from test_sft import on_the_cpu  # noqa: F401  a fixture
from torch import nn

import lora
import ppo
import reward
import runtime
import sft
from data import Tokenizer, write_jsonl
from generate import generate
from model import Llama, ScalarModel, load_model, load_scalar_model, masked_logprobs, save_model
from runtime import checkpoint, steps

TOKENS = torch.tensor([[3, 9, 27, 20, 60, 1], [5, 25, 3, 15, 14, 9]])
KINDS = pytest.mark.parametrize("kind", [Llama, ScalarModel])


@pytest.fixture
def make(make_config, randomize):
    """make(kind, rank): a random network, a Llama with biases; with a rank it has new adapters."""

    def network(kind, rank=0):
        config = make_config(attention_bias=True, mlp_bias=True) if kind is Llama else make_config()
        return lora.adapt(randomize(kind(config)), rank, 7)

    return network


def teach(network):
    """As if the adapters had learned something."""
    rng = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=rng)
    return network


def learning(network):
    return {name for name, parameter in network.named_parameters() if parameter.requires_grad}


def test_an_adapter_by_hand():
    """[1, 2] A = [3] of rank 1, times 32, through B = [1, -1] onto W x + b = [4, 5]; with rank 2 half of it."""
    linear = nn.Linear(2, 2)
    linear.weight.data, linear.bias.data = torch.tensor([[1.0, 1], [0, 2]]), torch.tensor([1.0, 1])
    for rank, scale in ((1, 32), (2, 16)):
        adapted = lora.Adapted(linear, rank, torch.Generator())
        assert adapted.A.shape == (rank, 2) and adapted.B.shape == (2, rank)
        adapted.A.data, adapted.B.data = torch.tensor([[1.0, 1]] + [[0.0, 0]] * (rank - 1)), torch.zeros(2, rank)
        adapted.B.data[:, 0] = torch.tensor([1.0, -1])
        assert adapted(torch.tensor([1.0, 2])).tolist() == [4 + 3 * scale, 5 - 3 * scale]
        merged = adapted.state_dict()
        assert merged.keys() == {"weight", "bias"} and merged["bias"].tolist() == [1, 1]
        assert merged["weight"].tolist() == [[1 + scale, 1 + scale], [-scale, 2 - scale]]


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_adapters_change_no_bit_and_switched_off_ones_neither(make, kind, dtype):
    plain, adapted = make(kind).to(dtype), lora.adapt(make(kind).to(dtype), 4, 7)
    assert adapted(TOKENS).equal(plain(TOKENS))
    for module in adapted.modules():
        if isinstance(module, lora.Adapted):
            assert not module.B.any() and module.A.dtype == module.B.dtype == torch.float32
            assert 0.7 < (module.A.std() * module.A.shape[1] ** 0.5) < 1.3
    start = lora.as_it_started(adapted)
    teach(adapted)
    assert (adapted(TOKENS) - plain(TOKENS)).abs().max() > 0.05
    for _ in range(2):  # on again in between
        assert start(TOKENS).equal(plain(TOKENS)) and not start(TOKENS).requires_grad
        assert not adapted(TOKENS).equal(plain(TOKENS))


def test_every_adapter_is_drawn_by_itself_and_for_its_purpose(make):
    networks = [lora.adapt(make(Llama), 4, *purpose) for purpose in ((0, "policy"), (0, "policy"), (0, "critic"), (1,))]
    drawn = [[module.A for module in network.modules() if isinstance(module, lora.Adapted)] for network in networks]
    assert len(drawn[0]) == 14
    assert all(a.equal(b) for a, b in zip(drawn[0], drawn[1]))
    assert len({A.flatten()[:3].sum().item() for of in (drawn[0], *drawn[2:]) for A in of}) == 3 * 14


@KINDS
def test_with_rank_zero_all_weights_learn(make, kind):
    plain = make(kind)
    names = {name for name, _ in plain.named_parameters()}
    assert lora.adapt(plain, 0, 7) is plain and learning(plain) == names


@KINDS
def test_merged_is_unmerged(make, kind, tmp_path):
    """However often it is saved, and nothing but the maps of the blocks and a scalar head has changed."""
    start, adapted = make(kind), teach(make(kind, 4))
    expected = adapted(TOKENS)
    for name in "ab":
        save_model(adapted, tmp_path / name)
        merged = (load_model if kind is Llama else load_scalar_model)(tmp_path / name)
        torch.testing.assert_close(merged(TOKENS), expected, rtol=1e-5, atol=1e-5)
        assert adapted(TOKENS).equal(expected) and (expected - start(TOKENS)).abs().max() > 0.05
    moved = {name for name, weight in start.state_dict().items() if not weight.equal(merged.state_dict()[name])}
    maps = "self_attn.q self_attn.k self_attn.v self_attn.o mlp.gate mlp.up mlp.down".split()
    head = {"score.weight"} - {*Llama(start.config).state_dict()} if kind is ScalarModel else set()
    assert moved == {f"model.layers.{i}.{name}_proj.weight" for i in (0, 1) for name in maps} | head
    change = merged.model.layers[1].mlp.up_proj.weight - start.model.layers[1].mlp.up_proj.weight
    assert torch.linalg.matrix_rank(change, atol=1e-4) == 4


@KINDS
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_merged_weight(make, kind, checkpointing):
    """With S = 32 / 4 and the gradient G of W + S B A: S B' G for A, and S G A' for B. In float64."""
    adapted, merged = teach(make(kind, 4)).double(), make(kind).double()
    merged.load_state_dict(adapted.state_dict())
    adapted.model.gradient_checkpointing = checkpointing
    weights = torch.linspace(-1, 1, 12, dtype=torch.float64).view(2, 6)
    for network in (adapted, merged):
        out = network(TOKENS) if kind is ScalarModel else network.lm_head(network.model(TOKENS)).logsumexp(-1)
        (out.double() * weights).sum().backward()
    G = dict(merged.named_parameters())
    for name, module in adapted.named_modules():
        if isinstance(module, lora.Adapted):
            grad = G[f"{name}.weight"].grad
            torch.testing.assert_close(module.A.grad, 8 * module.B.T @ grad, rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(module.B.grad, 8 * grad @ module.A.T, rtol=1e-6, atol=1e-9)
    if kind is ScalarModel:
        torch.testing.assert_close(adapted.score.change.grad, G["score.weight"].grad, rtol=1e-4, atol=1e-5)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert trained == learning(adapted)
    assert {name.rpartition(".")[2] for name in trained} == ({"A", "B"} if kind is Llama else {"A", "B", "change"})


def test_log_probs_have_the_gradient_that_they_had_with_a_head_that_learns(make):
    adapted, mask = teach(make(Llama, 4)), torch.ones(2, 5, dtype=torch.bool)
    grads = []
    for frozen in (True, False):
        adapted.zero_grad()
        adapted.lm_head.weight.requires_grad_(not frozen)
        masked_logprobs(adapted, TOKENS, mask)[0].sum().backward()
        grads.append(adapted.model.layers[0].mlp.down_proj.A.grad)
        assert (adapted.lm_head.weight.grad is None) == frozen
    assert grads[0].equal(grads[1]) and grads[0].any()


def test_sampling_has_the_adapter_on(make):
    """Token by token with a cache as in the merged model."""
    adapted, merged = teach(make(Llama, 4)), make(Llama)
    merged.load_state_dict(adapted.state_dict())
    found, expected, start = (
        [row.tokens for row in generate(network, [[3, 9], [4]], 12)] for network in (adapted, merged, make(Llama)))
    assert found == expected != start


# ---- stages --------------------------------------------------------------------------------------------------------


@pytest.fixture
def half(tiny, scorer, tmp_path):  # noqa: F811
    """half(): the two model folders in bf16, as published models are."""
    for name, model in (("model", load_model(tiny)), ("scorer", load_scalar_model(scorer))):
        save_model(model.bfloat16(), tmp_path / "half" / name)
        Tokenizer(tiny).save(tmp_path / "half" / name)
    return str(tmp_path / "half/model"), str(tmp_path / "half/scorer")


def test_sft_and_the_reward_model_learn_in_adapters_and_save_a_whole_model(tiny, tmp_path):  # noqa: F811
    write_jsonl(tmp_path / "sft.jsonl", [{"prompt": f"{i}+1=", "response": str(i + 1)} for i in range(8)])
    write_jsonl(tmp_path / "pairs.jsonl", [
        {"id": f"q{i}", "prompt": f"{i}?", "chosen": "1", "rejected": "2"} for i in range(20)])
    write_jsonl(tmp_path / "questions.jsonl", [{"id": f"q{i}", "question": f"{i}?"} for i in range(9)])
    write_jsonl(tmp_path / "samples.jsonl", [
        {"id": f"q{i}", "response": "12"[: 1 + i % 2], "finish": "stop"} for i in range(9)])
    given = [f"--model={tiny}", "--lora=2", "--epochs=9", "--lr=1e-2", "--batch_size=4", "--warmup=1"]
    data = {"sft": [f"--data={tmp_path}/sft.jsonl"],
            "reward": [f"--pairs={tmp_path}/pairs.jsonl", f"--calibrate={tmp_path}/samples.jsonl",
                       f"--questions={tmp_path}/questions.jsonl"]}
    start, done = load_file(f"{tiny}/model.safetensors"), {}
    for script in (sft, reward):
        name = script.__name__
        script.main(runtime.cli(script.Config, [*given, *data[name], f"--out={tmp_path}/{name}"]))
        done[name] = json.loads((tmp_path / name / "done.json").read_text())
        weights = load_file(tmp_path / name / "model.safetensors")
        for key in start.keys() & weights.keys():
            change = weights[key] - start[key]
            assert change.any() == ("_proj" in key)
            assert not change.any() or torch.linalg.matrix_rank(change, atol=1e-5) <= 2
    losses = [json.loads(line)["loss"] for line in (tmp_path / "sft/metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.5 * losses[0]
    assert done["reward"]["results"]["pair_accuracy"] == 1.0
    judge, tokenizer = load_scalar_model(tmp_path / "reward"), Tokenizer(tiny)
    texts = [tokenizer.chat(f"{i}?") for i in range(9)], [tokenizer.response("12"[: 1 + i % 2]) for i in range(9)]
    scores = reward.score_responses(judge, *texts, 99)  # what is in the file has mean 0 and deviation 1
    assert scores.mean().item() == pytest.approx(0, abs=1e-4) and scores.std(correction=0).item() == pytest.approx(1)
    adapters = 2 * (7 * 32 + 2 * 32 + 2 * 16 + 3 * 64)
    parameters = sum(weight.numel() for weight in start.values()) + adapters
    scalar = parameters - start["lm_head.weight"].numel() + 2 * 32  # the head, and what it learned
    assert done["sft"]["flops"] == 4 * parameters * done["sft"]["tokens"]
    assert done["reward"]["flops"] == 4 * scalar * done["reward"]["tokens"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_reference_and_judge_stay_while_policy_and_critic_learn(half, tmp_path, monkeypatch, precision):
    """In each of four iterations, on fixed texts; the first ratio is 1, and a save in between changes nothing."""
    monkeypatch.setenv("PRECISION", precision)
    said, valued, sample, value = [], [], ppo.rollout, ppo.values_of
    tokens, mask = torch.arange(2, 14).view(2, 6), torch.ones(2, 5, dtype=torch.bool)

    @torch.no_grad()
    def rollout(cfg, policy, reference, score, *rest):
        with steps.mixed_precision():
            read = [masked_logprobs(network, tokens, mask)[0] for network in (policy, reference)]
            said.append([*read, score([], [[3, 4], [5]], [[6, 1], [7, 8, 1]], ["", ""])])
        assert policy.model.embed_tokens.weight.dtype == (runtime.inference_dtype() or torch.bfloat16)
        return sample(cfg, policy, reference, score, *rest)

    @torch.no_grad()
    def values_of(cfg, critic, *rest):
        with steps.mixed_precision():
            valued.append(critic(tokens))
        return value(cfg, critic, *rest)

    monkeypatch.setattr(ppo, "rollout", rollout)
    monkeypatch.setattr(ppo, "values_of", values_of)
    write_jsonl(tmp_path / "valid.jsonl", [{"question": "3+4?", "answer": "7"}])
    metrics = run(tmp_path, *half, lora=2, iterations=4, eval_every=1, valid=str(tmp_path / "valid.jsonl"))
    (policy, reference, judge), critic = zip(*said), valued
    assert policy[0].equal(reference[0])
    for i in range(1, 4):
        assert reference[i].equal(reference[0]) and judge[i].equal(judge[0])
        assert (policy[i] - policy[i - 1]).abs().max() > 1e-3 and (critic[i] - critic[i - 1]).abs().max() > 1e-3
    assert metrics[0]["objective/kl"] == 0 and max(row["val/ratio_first_gap"] for row in metrics) < 1e-4
    saved, start = load_file(tmp_path / "out/model.safetensors"), load_file(f"{half[0]}/model.safetensors")
    assert {name for name in start if not saved[name].equal(start[name])} <= {name for name in start if "_proj" in name}


def test_a_policy_that_was_merged_scores_as_it_did(tiny, scorer, tmp_path, monkeypatch):  # noqa: F811
    seen, real = [], ppo.conclude
    monkeypatch.setattr(ppo, "conclude", lambda cfg, stage, policy, *rest: seen.append(policy) or real(
        cfg, stage, policy, *rest))
    run(tmp_path, tiny, scorer, lora=2, eval_every=1)
    tokens = torch.arange(2, 14).view(2, 6)
    torch.testing.assert_close(load_model(tmp_path / "out")(tokens), seen[0](tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("judged_by", ["votes", "critic"])
def test_the_judge_may_be_another_or_none(tiny, scorer, tmp_path, judged_by):  # noqa: F811
    """Without a reward model the critic is the policy's trunk; with --critic the judge has a network of its own."""
    write_jsonl(tmp_path / "votes.jsonl", [{"id": f"q{i}", "vote": "7"} for i in range(6)])
    other = load_scalar_model(scorer)
    other.score_mean += 7
    save_model(other, tmp_path / "other")
    Tokenizer(tiny).save(tmp_path / "other")
    flags = {"votes": {"reward_model": "", "votes": str(tmp_path / "votes.jsonl")},
             "critic": {"critic": str(tmp_path / "other")}}[judged_by]
    full = run(tmp_path / "full", tiny, scorer, iterations=1, **flags)
    [row] = run(tmp_path / "lora", tiny, scorer, iterations=1, lora=2, **flags)
    for name in ("objective/scores", "val/values_mean", "objective/entropy"):
        assert row[name] == pytest.approx(full[0][name], abs=1e-5)


def test_a_saved_state_holds_the_adapters_and_their_moments_alone(tiny, scorer, tmp_path, monkeypatch, capsys):  # noqa: F811
    """A run that was killed goes on from it with the same bits."""
    states, real, update = [], checkpoint.write_tensors, ppo.update_critic
    monkeypatch.setattr(checkpoint, "PAUSE", 0)
    monkeypatch.setattr(checkpoint, "write_tensors", lambda path, kept: states.append(kept) or real(path, kept))
    run(tmp_path / "whole", tiny, scorer, lora=2)

    def killed(cfg, critic, adam, r, iteration):
        return 1 / 0 if iteration == 2 else update(cfg, critic, adam, r, iteration)

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(ppo, "update_critic", killed)
        run(tmp_path / "killed", tiny, scorer, lora=2)
    run(tmp_path / "killed", tiny, scorer, lora=2)
    assert "goes on after step 2" in capsys.readouterr().out
    whole, killed = ((tmp_path / name / "out/model.safetensors").read_bytes() for name in ("whole", "killed"))
    assert whole == killed
    adapters = 2 * (7 * 32 + 2 * 32 + 2 * 16 + 3 * 64)
    counters = sum(tensor.numel() == 1 for tensor in states[-1].values())
    assert sum(tensor.numel() for tensor in states[-1].values()) - counters == 3 * (2 * adapters + 32)
