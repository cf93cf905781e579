"""Seeded bugs: wrong answers to the exercises, as students give them. check.py proves that the tests catch each one.

An entry is a name, a text that occurs exactly once in the function's body (the docstring does not count), and what
stands there instead; None stands for the whole body. Not in the handout, of course.
"""

LAST = "last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)"
KL = "torch.where(mask, -kl_coef * (logprobs - ref_logprobs), 0.0)"
SURROGATE = "torch.where(mask, torch.maximum(plain, clipped), 0.0)"
ROOT = "torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)"
NORM = f"        return self.weight * (x.float() * {ROOT}).to(x.dtype)\n"  # by hand, as most students write it

# fmt: off
BUGS: dict[str, list[tuple[str, str | None, str]]] = {
    "extract_answer": [
        ("the last statement counts", " " * 16 + "return canonical(stated", " " * 16 + "stated and canonical(stated"),
        ("the last mark counts", "MARKS):", "MARKS[::-1]):"),
        ("the last number, though another is stated", "if stated and not T", "if stated and not lenient and not T"),
        ("not canonical", '                return canonical(stated["answer"], kind)',
         '                return stated["answer"]'),
        ("an empty string for no answer", "if mentioned else None", 'if mentioned else ""'),
        ("what is taken back counts", "not TAKEN_BACK.search(text, stated.end(), stated.end() + 100)", "True"),
        ("taken back anywhere later", ", stated.end() + 100)", ")"),
        ("all taken back is no answer", "if stated and not MENTIONED[kind].search(text, stated.end())", "if False"),
        ("thoughts instead of the answer", "without_thoughts(text)", 'text.split("</think>")[0]'),
        ("the text does not begin like a line", '"\\n" + _plain(', "_plain("),
    ],
    "collate": [
        ("the mask is late by one", "1, tokens.shape[1]", "tokens.shape[1] - 1"),
        ("the end token is not trained", "(positions < lengths[:, None])", "(positions < lengths[:, None] - 1)"),
        ("padding is trained", " & (positions < lengths[:, None])", ""),
        ("the prompt is trained", "(positions >= starts[:, None]) & ", ""),
        ("padding by token id", "(positions < lengths[:, None])", "(tokens[:, 1:] != 0)"),
        ("the prompts are changed in place", " + response", ".extend(response) or prompt"),
    ],
    "RMSNorm.forward": [
        ("the mean is subtracted", "rms_norm(x,", "rms_norm(x - x.mean(-1, keepdim=True),"),
        ("eps outside of the root", None, NORM.replace(" + self.eps)", ") / (1 + self.eps)")),
        ("no eps", "self.eps", "0.0"),
        ("in half precision", None, NORM.replace("x.float()", "x")),
        ("never brought back to x's type", None, NORM.replace(".to(x.dtype)", "")),
        ("far values are cut", "rms_norm(x,", "rms_norm(x.clamp(-100, 100),"),
    ],
    "rotate": [
        ("the other way round", "[-second, first]", "[second, -first]"),
        ("neighbours are pairs", ".chunk(2, dim=-1)", "[..., ::2], x[..., 1::2]"),
        ("in place", "    return ", "    before = x.clone()\n    x.zero_()\n    x = before\n    return "),
    ],
    "token_logprobs": [
        ("probabilities", "chosen - logits.logsumexp(-1", "(chosen - logits.logsumexp(-1)).exp("),
        ("the temperature multiplies", "logits = logits / temperature", "logits = logits * temperature"),
        ("the token before", "tokens[:, 1:, None]", "tokens[:, :-1, None]"),
        ("logits of the token itself", "logits = logits / temp", "logits = logits.roll(-1, 1) / temp"),
        ("in half precision", " if logits.dtype == torch.float64 else logits[:, :-1].float()", ""),
        ("double precision is lost", " if logits.dtype == torch.float64 else logits[:, :-1]", ""),
        ("the log of a sum of exponentials", "logits.logsumexp(-1)", "logits.exp().sum(-1).log()"),
        ("no gradient through the norm", "logits.logsumexp(-1)", "logits.logsumexp(-1).detach()"),
        ("logits are cut", "logits = logits / temperature", "logits = (logits / temperature).clamp(-1e4, 1e4)"),
    ],
    "sft_loss": [
        ("sign", "return -torch", "return torch"),
        ("the mask as a factor", "torch.where(mask, logprobs, 0.0).sum()", "(mask * logprobs).sum()"),
        ("by its own tokens", "/ total", "/ mask.sum()"),
        ("the mask late by one", "torch.where(mask, logprobs", "torch.where(mask.roll(1, 1), logprobs"),
        ("no gradient", "torch.where(mask, logprobs,", "torch.where(mask, logprobs.detach(),"),
        ("NaN is made zero afterwards", "torch.where(mask, logprobs, 0.0)", "(mask * logprobs).nan_to_num()"),
        ("log-probs are cut", "torch.where(mask, logprobs,", "torch.where(mask, logprobs.clamp(min=-100),"),
    ],
    "sample_token": [
        ("the temperature multiplies", "logits / (temperature or 1.0)", "logits * (temperature or 1.0)"),
        ("the temperature is ignored", "logits / (temperature or 1.0)", "logits"),
        ("always greedy", "if temperature == 0", "if temperature >= 0"),
        ("a draw of its own", "chance[:, None]", "torch.rand_like(chance)[:, None]"),
        ("the chance in fp32", "chance[:, None]", "chance.float()[:, None]"),
        ("the chance is no share", " * below[:, -1:]", ""),
        ("the chance changes in place", " * below[:, -1:]", ".mul_(below[:, -1:])"),
        ("sums in fp32", "probs.cumsum(-1, dtype=torch.float64)", "probs.cumsum(-1).double()"),
        ("the first that reaches the chance", ", right=True", ""),
        ("the logit instead of the log-prob", "probs.gather(-1, token)[:, 0].log()", "logits.gather(-1, token)[:, 0]"),
        ("the logits change in place", "logits / (temperature or 1.0)", "logits.div_(temperature or 1.0)"),
        ("a temperature near 0 is greedy", "if temperature == 0", "if temperature < 0.05"),
        ("no temperature below a hundredth", "temperature or", "max(temperature, 0.01) if temperature else"),
    ],
    "majority_vote": [
        ("None can win", "Counter(answer for answer in answers if answer is not None)", "Counter(answers)"),
        ("the share of what was stated", "most / len(answers)", "most / sum(votes.values())"),
        ("the count", "return tied[0], most / len(answers)", "return tied[0], most"),
        ("a tie goes to the less likely", "reverse=True", "reverse=False"),
        ("the likeliest single answer", "math.fsum(", "max("),
        ("log-probs instead of votes", "if len(tied) > 1:", "tied = list(votes)\n    if len(tied) > 1:"),
        ("a log-prob of 0 is missing", "logprobs is None or None in logprobs", "not logprobs or not all(logprobs)"),
        ("answers are trimmed", "Counter(answer for", "Counter(answer.strip() for"),
    ],
    "pseudo_rewards": [
        ("what was cut off is rewarded", "sample.ended and sample.answer == vote", "sample.answer == vote"),
        ("turned round", "sample.answer == vote", "sample.answer != vote"),
        ("the teacher alone", "sample.ended and", 'sample.source == "teacher" and sample.ended and'),
        ("part of the vote", "sample.answer == vote", '(sample.answer or "x") in vote'),
        ("booleans", "int(sample.ended and sample.answer == vote)", "(sample.ended and sample.answer == vote)"),
        ("answers are trimmed", "sample.answer == vote", '(sample.answer or "").strip() == vote'),
    ],
    "winners": [
        ("the student's, too", ' and s.source == "teacher"', ""),
        ("the losers", "reward == 1", "reward == 0"),
        ("in the order of a set", "list(dict.fromkeys(won))", "list(set(won))"),
        ("capped before the duplicates go", ")))[:most", "[:most])))[:most"),
        ("texts are trimmed", "[s.response for", "[s.response.strip() for"),
        ("the last come first", "list(dict.fromkeys(won))", "list(dict.fromkeys(won[::-1]))"),
    ],
    "make_pairs": [
        ("swapped", "[(c, r) for c in chosen for r in rejected]", "[(r, c) for c in chosen for r in rejected]"),
        ("what was cut off is rejected", " and sample.ended]", "]"),
        ("unseeded", "rng.shuffle(pairs)", "random.shuffle(pairs)"),
        ("the teacher first", '== "teacher")', '== "teacher", reverse=True)'),
        ("the same texts twice", "(c.response, r.response), (c, r)", "(id(c), id(r)), (c, r)"),
        ("every chosen text once", "(c.response, r.response)", "c.response"),
        ("texts are trimmed", ", r.response", ".strip(), r.response.strip()"),
        ("sorted after the draw", "list(different.values())[:most]",
         "sorted(list(different.values())[:most], key=lambda p: p[0].source + p[0].response)"),
    ],
    "last_token": [
        ("the last column", "== lengths[:, None]", "== lengths[:, None].clamp(min=T)"),
        ("one too late", "arange(1, T + 1,", "arange(T,"),
        ("all real tokens", "== lengths", "<= lengths"),
        ("as long as the longest row", "T + 1", "int(lengths.max()) + 1"),
    ],
    "bradley_terry_loss": [
        ("sign", "return -(", "return ("),
        ("a sum", ".sum() / weight.sum()", ".sum()"),
        ("hinge", "-(F.logsigmoid(chosen - rejected)", "((1 - chosen + rejected).clamp(min=0)"),
        ("a margin that is cut", "chosen - rejected", "(chosen - rejected).clamp(-30, 30)"),
        ("right for small margins", "F.logsigmoid(chosen - rejected", "-F.softplus(rejected - chosen, threshold=4"),
    ],
    "shape_rewards": [
        ("the KL is a bonus", "-kl_coef *", "kl_coef *"),
        ("no KL", "-kl_coef *", "0 *"),
        ("the KL of prompt and padding", KL, "-kl_coef * (logprobs - ref_logprobs)"),
        ("the mask as a factor", KL, "mask * (-kl_coef * (logprobs - ref_logprobs))"),
        ("the score in the last column", LAST, "last = torch.arange(mask.shape[1]) == mask.shape[1] - 1"),
        ("the score on every token", LAST, "last = mask"),
        ("the score one token late", LAST, "last = (mask & (mask.flip(1).cumsum(1).flip(1) == 1)).roll(1, 1)"),
        ("the squared estimate", "(logprobs - ref_logprobs)", "0.5 * (logprobs - ref_logprobs) ** 2"),
        ("a KL that is cut", "(logprobs - ref_logprobs)", "(logprobs - ref_logprobs).clamp(-20, 20)"),
        ("scores that are cut", "scores[:, None]", "scores[:, None].clamp(-5, 5)"),
    ],
    "gae": [
        ("no gamma in the sum", "gamma * lam * next_advantage", "lam * next_advantage"),
        ("lambda in delta", "gamma * next_value", "gamma * lam * next_value"),
        ("forwards", "reversed(range(values.shape[1]))", "range(values.shape[1])"),
        ("the last value bootstraps", " = next_advantage =", ", next_advantage = values[:, -1],"),
        ("values of the padding", "values = torch.where(mask, values, 0.0)", "values = values.clone()"),
        ("no baseline", " - values[:, t]  # (B,)", "  # (B,)"),
        ("returns are advantages", "advantages + values", "advantages"),
        ("the rewards change in place", "values, 0.0)", "values, 0.0)\n    rewards *= mask"),
    ],
    "whiten": [
        ("unbiased", " + 1e-8)", " * mask.sum() / (mask.sum() - 1) + 1e-8)"),
        ("no eps", " + 1e-8", ""),
        ("the padding is set to zero in place", "mean = masked_mean", "x[~mask] = 0.0\n    mean = masked_mean"),
        ("NaN in the mean", "mean = masked_mean(x, mask)", "mean = (x * mask).sum() / mask.sum()"),
        ("outliers are cut", "x - mean) * torch.rsqrt(variance + 1e-8",
         "(x - mean) * torch.rsqrt(variance + 1e-8)).clamp(-2.5, 2.5"),
    ],
    "policy_loss": [
        ("minimum", "torch.maximum(plain, clipped)", "torch.minimum(plain, clipped)"),
        ("sign", "-advantages * ratio, -", "advantages * ratio, "),
        ("no clip", "ratio.clamp(1 - clip, 1 + clip)", "ratio"),
        ("the mask as a factor", SURROGATE, "(mask * torch.maximum(plain, clipped))"),
        ("the policy is detached", "torch.where(mask, logprobs -", "torch.where(mask, logprobs.detach() -"),
        ("NaN in the gradient", "torch.where(mask, logprobs - old_logprobs, 0.0)", "(logprobs - old_logprobs)"),
        ("overflow", ".clamp(-20, 20).exp()", ".exp()"),
        ("counts what is outside of the range", "(clipped > plain)).sum()", "((ratio - 1).abs() > clip)).sum()"),
        ("advantages are cut", "ratio = torch", "advantages = advantages.clamp(-10, 10)\n    ratio = torch"),
    ],
    "value_loss": [
        ("no half", "0.5 * ", ""),
        ("by its own tokens", "/ total", "/ mask.sum()"),
        ("the absolute error", "square(), (near - returns).square", "abs(), (near - returns).abs"),
        ("the sign of the return", "(values - returns).square()", "(values + returns).square()"),
        ("returns and old values exchanged", "old_values, returns)", "returns, old_values)"),
        ("counts every value outside of the range", "clipped > plain", "(values - old_values).abs() > clip"),
        ("far errors are cut", "(values - returns).square(", "(values - returns).clamp(-9, 9).square("),
        ("returns are cut", "(values, old_values, returns))", "(values, old_values, returns.clamp(-20, 20)))"),
    ],
}
# fmt: on


def seeded(body: str, old: str | None, new: str) -> str:
    """A function's body with a bug in it. ValueError if the entry no longer fits."""
    if old is None:
        return new
    if body.count(old) != 1:
        raise ValueError(f"{old!r} occurs {body.count(old)} times")
    return body.replace(old, new)
