"""Public tests: small cases worked by hand, and properties that every right answer has.

    python -m pytest                # all exercises
    python -m pytest -m E7          # one of them
    python -m pytest -m E7 -x -q    # its first failure only

A test is named test_EXERCISE_FUNCTION__PROPERTY and says in words what is wrong. The first one of a function is its
formula: without it the others earn nothing.
"""
# fmt: off

import math
import random

import torch
from checks import same

from answers import extract_answer
from data import collate
from generate import sample_token
from model import RMSNorm, last_token, rotate, token_logprobs
from ppo import gae, policy_loss, shape_rewards, value_loss, whiten
from pseudo_reward import Sample, majority_vote, make_pairs, pseudo_rewards, winners
from reward import bradley_terry_loss
from sft import sft_loss

T, F, NAN = True, False, float("nan")

def row(*values):
    return torch.tensor([values])

def test_E1_extract_answer__a_stated_answer_is_found_in_its_canonical_form():
    assert extract_answer("3+4=7\n#### 1,007.", "number") == "1007", "the example of the docstring"
    assert extract_answer("So the answer is $2.50.", "number") == "2.5", "the canonical form of $2.50 is 2.5"
    assert extract_answer("A: -12", "number") == "-12", "a label at the beginning of the text states an answer"
    assert extract_answer("The answer is (c).", "choice") == "C", "letters are canonical in upper case"

def test_E1_extract_answer__the_strongest_mark_wins_and_of_one_mark_the_first():
    text = "The answer is 3, I think.\n#### 5"
    assert extract_answer(text, "number") == "5", "#### is a stronger mark than a sentence, wherever it stands"
    text = "2+2=4\n#### 4\nQ: What is 3+3?\n#### 6"
    assert extract_answer(text, "number") == "4", "a model that runs on to another question has answered the first"

def test_E1_extract_answer__what_is_taken_back_does_not_count():
    text = "The answer is 7. Wait, I forgot one. The answer is 8."
    assert extract_answer(text, "number") == "8", "the first statement was taken back"

def test_E1_extract_answer__strict_and_lenient():
    text = "Two of the 12 pens are red, 10 are blue"
    assert extract_answer(text, "number") is None, "strict: nothing is stated here, that is None"
    assert extract_answer(text, "number", lenient=True) == "10", "lenient: the last number that is mentioned"
    assert extract_answer("#### 3 of 9", "number", lenient=True) == "3", "lenient still prefers what is stated"
    assert extract_answer("who knows", "number", lenient=True) is None, "no number at all is None"

def test_E1_extract_answer__thoughts_are_no_answer():
    text = "<think>the answer is 4</think>The answer is 5"
    assert extract_answer(text, "number") == "5", "what stands before </think> was only thought"

def test_E2_collate__the_example():
    tokens, mask, _ = collate([[5, 6]], [[7, 8]])
    assert tokens.tolist() == [[5, 6, 7, 8]], "tokens are the prompt and then the response"
    assert mask.tolist() == [[F, T, T]], "entry t is about token t + 1: the first True is for the first response token"

def test_E2_collate__rows_of_different_lengths():
    tokens, mask, _ = collate([[1, 2, 3], [4]], [[5, 9], [6, 7, 8, 9, 9]])
    assert tokens.shape == (2, 6) and mask.shape == (2, 5), "T is the longest row; the mask has one column less"
    assert tokens[0, :5].tolist() == [1, 2, 3, 5, 9], "padding is on the right"
    assert mask.tolist() == [[F, F, T, T, F], [T, T, T, T, T]], "True on the response with its end token, on no padding"

def test_E2_collate__lengths():
    _, _, lengths = collate([[1, 2, 3], [4]], [[5, 9], [6, 7, 8, 9, 9]])
    assert lengths.tolist() == [5, 6], "lengths count prompt and response, and leave the padding out"

def test_E2_collate__a_response_may_hold_the_id_that_pads():
    _, mask, _ = collate([[1], [1, 1]], [[0, 0], [0, 0, 0]])
    assert mask.tolist() == [[T, T, F, F], [F, T, T, T]], "padding is known from lengths, never from token ids"

def test_E2_collate__types():
    tokens, mask, lengths = collate([[1]], [[2]])
    assert tokens.dtype == torch.long and lengths.dtype == torch.long, "tokens and lengths are torch.long"
    assert mask.dtype == torch.bool, "the mask is boolean"

def test_E3_RMSNorm_forward__by_hand():
    norm = RMSNorm(2, 0.0)
    same(norm(row(3.0, 4.0)), [[0.8485281, 1.1313708]], "[3, 4] has a mean square of 12.5")
    norm.weight.data = torch.tensor([2.0, -1.0])
    same(norm(row(3.0, 4.0)), [[1.6970563, -1.1313708]], "the weight multiplies the normalised vector")

def test_E3_RMSNorm_forward__normalises_each_vector_by_itself():
    x = torch.tensor([[[1.0, 1.0], [10.0, 10.0]]])
    same(RMSNorm(2, 0.0)(x), [[[1.0, 1.0], [1.0, 1.0]]], "over the last dimension, without a mean to subtract")
    same(RMSNorm(2, 1.0)(row(1.0, -1.0)), [[0.5**0.5, -(0.5**0.5)]], "eps is added to the mean square, inside")

def test_E3_RMSNorm_forward__squares_in_fp32():
    norm = RMSNorm(2, 0.0).half()
    got = norm(torch.tensor([[300.0, 400.0]], dtype=torch.float16))
    why = "300 squared is too large for fp16: the mean of squares needs fp32, the result has the type of x"
    same(got, [[0.8485, 1.1314]], why, 2e-3, torch.float16)

def test_E3_rotate__a_quarter_turn():
    got = rotate(torch.tensor([[[[1.0, 2.0]]]]), row(0.0, 0.0), row(1.0, 1.0))
    same(got, [[[[-2.0, 1.0]]]], "a quarter turn takes (1, 2) to (-2, 1)")

def test_E3_rotate__pairs_feature_i_with_i_plus_half():
    cos, sin = row(0.0, 1.0, 0.0, 1.0), row(1.0, 0.0, 1.0, 0.0)  # the first pair a quarter, the second not at all
    got = rotate(torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]]), cos, sin)
    same(got, [[[[-3.0, 2.0, 1.0, 4.0]]]], "of four features the pairs are (0, 2) and (1, 3)")

def test_E4_token_logprobs__by_hand():
    logits = torch.tensor([[[0.0, math.log(3)], [math.log(4), 0.0], [9.0, -9.0]]])  # (1, 3, 2)
    got = token_logprobs(logits, row(0, 1, 0))
    same(got, [[math.log(0.75), math.log(0.8)]], "entry t is log softmax(logits[:, t]) at tokens[:, t+1]")

def test_E4_token_logprobs__the_temperature_divides_the_logits():
    logits = torch.tensor([[[0.0, math.log(3)], [0.0, 0.0]]])
    same(token_logprobs(logits, row(0, 1), 0.5), [[math.log(0.9)]], "at temperature 1/2 odds of 3 become 9")

def test_E4_token_logprobs__hopeless_tokens_stay_finite():
    logits = torch.tensor([[[500.0, -500.0], [0.0, 0.0]]])
    same(token_logprobs(logits, row(0, 1)), [[-1000.0]], "the log of a softmax that is 0 in fp32 is no infinity")

def test_E4_token_logprobs__half_precision_becomes_fp32():
    got = token_logprobs(torch.tensor([[[0.0, math.log(3)], [0.0, 0.0]]]).bfloat16(), row(0, 1))
    assert got.dtype in (torch.float32, torch.float64), "log-probs are fp32 or wider whatever the logits are"

def test_E5_sft_loss__by_hand():
    same(sft_loss(row(-1.0, -2.0, -9.0), row(T, T, F), 2), 1.5, "the example of the docstring")
    same(sft_loss(row(-1.0, -2.0, -9.0), row(T, T, F), 6), 0.5, "divide by total, the tokens of the whole step")

def test_E5_sft_loss__every_token_counts_alike():
    logprobs = torch.tensor([[-1.0, -1.0, -1.0], [-4.0, -9.0, -9.0]])
    mask = torch.tensor([[T, T, T], [T, F, F]])
    same(sft_loss(logprobs, mask, 4), 1.75, "a mean over tokens, not over the means of the rows")
    parts = sft_loss(logprobs[:1], mask[:1], 4) + sft_loss(logprobs[1:], mask[1:], 4)
    same(parts, 1.75, "micro-batches add up to the whole batch")

def test_E5_sft_loss__masked_cells_may_hold_NaN():
    logprobs = row(-1.0, NAN, -math.inf).requires_grad_()
    loss = sft_loss(logprobs, row(T, F, F), 1)
    loss.backward()
    same(loss, 1.0, "NaN in a masked cell must not reach the loss")
    same(logprobs.grad, [[-1.0, 0.0, 0.0]], "the gradient is -1/total on the response and 0 elsewhere")

def chances(*values):
    return torch.tensor(values, dtype=torch.float64)

def test_E6_sample_token__the_first_token_whose_cumulative_probability_exceeds_the_chance():
    logits = torch.tensor([[0.0, math.log(3)]]).repeat(2, 1)
    token, logprob = sample_token(logits, 1.0, chances(0.2, 0.3))
    assert token.tolist() == [0, 1], "the example of the docstring: token 0 has the chances up to 1/4"
    same(logprob, [math.log(0.25), math.log(0.75)], "the log-prob is that of the drawn token")
    assert sample_token(torch.zeros(1, 2), 1.0, chances(0.5))[0].tolist() == [1], "1/2 does not exceed 1/2"

def test_E6_sample_token__temperature_zero_is_greedy():
    logits = torch.tensor([[0.0, math.log(3)], [math.log(4), 0.0]])
    token, logprob = sample_token(logits, 0.0, chances(0.1, 0.9))
    assert token.tolist() == [1, 0], "the largest logit of each row, whatever the chance"
    same(logprob, [math.log(0.75), math.log(0.8)], "with the log-prob of the plain softmax")

def test_E6_sample_token__the_temperature_divides_the_logits():
    token, logprob = sample_token(torch.tensor([[0.0, math.log(3)]]).repeat(2, 1), 0.5, chances(0.09, 0.11))
    assert token.tolist() == [0, 1], "at temperature 1/2 odds of 3 become 9: token 0 has the chances up to 1/10"
    same(logprob, [math.log(0.1), math.log(0.9)], "the log-prob is that of the distribution that was drawn from")

def test_E7_majority_vote__the_most_frequent_answer_and_its_share_of_all():
    assert majority_vote(["7", "8", "7", None]) == ("7", 0.5), "2 of 4: a None counts in the share"
    assert isinstance(majority_vote(["3"]), tuple) and majority_vote(["3"]) == ("3", 1.0), "one answer is a majority"

def test_E7_majority_vote__none_never_wins():
    assert majority_vote([None, None, None, "4"]) == ("4", 0.25), "None is no answer, however frequent"
    assert majority_vote([None, None]) == (None, 0.0), "without an answer nobody wins"
    assert majority_vote([]) == (None, 0.0), "without a vote nobody wins"

def test_E7_majority_vote__ties():
    answers = ["7", "8", "8", "7", "1"]
    assert majority_vote(answers) == (None, 0.0), "a tie without log-probs has no winner"
    assert majority_vote(answers, [-2.0, -1.0, -1.5, -1.0, -0.1]) == ("8", 0.4), "-2.5 beats -3: the greater sum wins"
    assert majority_vote(answers, [-2.0, None, -1.5, -1.0, -0.1]) == (None, 0.0), "one log-prob is missing: no winner"
    assert majority_vote(answers, [-1.0, -1.0, -1.5, -1.5, -0.1]) == (None, 0.0), "equal sums: no winner"

def test_E7_majority_vote__log_probs_decide_ties_alone():
    assert majority_vote(["7", "7", "8"], [-9.0, -9.0, -0.1]) == ("7", 2 / 3), "more votes win whatever their log-probs"

def sample(response, answer="7", source="student", ended=True):
    return Sample("q", source, response, answer, ended)

def test_E8_pseudo_rewards__by_hand():
    samples = [sample("a"), sample("b", "8", "teacher"), sample("c", None), sample("d", ended=False)]
    assert pseudo_rewards(samples, "7") == [1, 0, 0, 0], "the example of the docstring"
    assert pseudo_rewards(samples, "8") == [0, 1, 0, 0], "whoever speaks: what counts is that it ended and agrees"

def test_E8_winners__by_hand():
    samples = [sample(text, source=source) for text, source in (("b", "teacher"), ("c", "student"), ("a", "teacher"))]
    samples += [sample("b", source="teacher"), sample("z", source="teacher")]
    assert winners(samples, [1, 1, 1, 1, 0], 9) == ["b", "a"], "the teacher's winning texts, each once, in their order"
    assert winners(samples, [1, 1, 1, 1, 0], 9, True) == ["b", "a", "b"], "keep_duplicates: as often as sampled"
    assert winners(samples, [1, 1, 1, 1, 0], 1) == ["b"], "at most `most`"

def texts(pairs):
    return [(chosen.response, rejected.response) for chosen, rejected in pairs]

def test_E9_make_pairs__the_example():
    pairs = make_pairs([sample("a"), sample("b"), sample("c")], [1, 0, 1], 4, random.Random(0))
    assert sorted(texts(pairs)) == [("a", "b"), ("c", "b")], "chosen has reward 1, rejected reward 0"

def test_E9_make_pairs__no_pair_twice_and_not_too_many():
    samples = [sample("a"), sample("a"), sample("b"), sample("b"), sample("c")]
    pairs = make_pairs(samples, [1, 1, 0, 0, 0], 9, random.Random(0))
    assert sorted(texts(pairs)) == [("a", "b"), ("a", "c")], "no two pairs have the same two texts"
    assert len(make_pairs(samples, [1, 1, 0, 0, 0], 1, random.Random(0))) == 1, "at most `most` pairs"

def test_E9_make_pairs__what_was_cut_off_is_in_no_pair():
    samples = [sample("a"), sample("b", ended=False), sample("c")]
    assert texts(make_pairs(samples, [1, 0, 0], 9, random.Random(0))) == [("a", "c")], "PPO never shows a cut text"
    assert make_pairs(samples, [1, 1, 1], 9, random.Random(0)) == [], "without a rejected text there is no pair"

def test_E9_make_pairs__the_students_pairs_come_first():
    samples = [sample(f"t{i}", source="teacher") for i in range(6)] + [sample("s")]
    for seed in range(5):
        pairs = texts(make_pairs(samples, [1, 1, 1, 0, 0, 0, 0], 3, random.Random(seed)))
        assert all("s" in pair for pair in pairs), "three of the pairs have a text of the student: they come first"

def test_E9_make_pairs__the_rest_is_drawn():
    samples = [sample(f"s{i}") for i in range(10)]
    draw = [texts(make_pairs(samples, [1, 0] * 5, 4, random.Random(seed))) for seed in (0, 0, 1, 2)]
    assert draw[0] == draw[1], "the same seed draws the same pairs"
    assert len({tuple(pairs) for pairs in draw}) > 1, "another seed draws others"

def test_E10_last_token__by_hand():
    got = last_token(torch.tensor([2, 1, 3]), 3)
    assert got.dtype == torch.bool, "a mask, to read with"
    same(got, [[False, True, False], [True, False, False], [False, False, True]], "position length - 1 of each row")

def test_E10_last_token__padding_in_all_rows():
    same(last_token(torch.tensor([1, 2]), 4), [[True, False, False, False], [False, True, False, False]],
         "the last column may be padding in every row")

def test_E11_bradley_terry_loss__by_hand():
    got = bradley_terry_loss(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0]))
    same(got, (math.log(1 + math.exp(-1)) + math.log(2)) / 2, "the example of the docstring, a mean over pairs")

def test_E11_bradley_terry_loss__weights():
    chosen, rejected = torch.tensor([2.0, 0.0, -1.0]), torch.tensor([1.0, 0.0, 0.0])
    want = (3 * math.log(1 + math.exp(-1)) + math.log(2) + 0.5 * math.log(1 + math.e)) / 4.5
    same(bradley_terry_loss(chosen, rejected, torch.tensor([3.0, 1.0, 0.5])), want, "a weighted mean")

def test_E11_bradley_terry_loss__a_hopeless_margin_is_finite_and_still_teaches():
    chosen = torch.tensor([-400.0], requires_grad=True)
    loss = bradley_terry_loss(chosen, torch.tensor([400.0]))
    loss.backward()
    same(loss, 800.0, "sigmoid(-800) is 0 in fp32, its log must not be infinite")
    same(chosen.grad, [-1.0], "the gradient of a hopeless margin is -1")

def test_E12_shape_rewards__by_hand():
    got = shape_rewards(torch.tensor([1.0]), row(0.0, 0.0, 0.0), row(-1.0, -2.0, -3.0), row(T, T, T), 0.1)
    same(got, [[-0.1, -0.2, 0.7]], "the example: minus kl_coef times the difference, the score on the last token")

def test_E12_shape_rewards__prompt_and_padding_earn_nothing():
    mask = torch.tensor([[F, T, T, F], [F, F, T, T]])
    zeros = torch.zeros(2, 4)
    got = shape_rewards(torch.tensor([1.0, -2.0]), zeros, zeros, mask, 0.1)
    same(got, [[0, 0, 1, 0], [0, 0, 0, -2]], "the score stands on the last True cell of its row")
    got = shape_rewards(torch.tensor([0.0, 0.0]), zeros, zeros + 1, mask, 0.5)
    same(got, [[0, 0.5, 0.5, 0], [0, 0, 0.5, 0.5]], "the KL is paid on the response alone")

def test_E12_shape_rewards__masked_cells_may_hold_NaN():
    got = shape_rewards(torch.tensor([1.0]), row(NAN, 0.0, NAN), row(0.0, 0.0, NAN), row(F, T, F), 0.1)
    same(got, [[0.0, 1.0, 0.0]], "NaN outside the mask must not come through")

def test_E13_gae__by_hand():
    advantages, _ = gae(row(0.0, 0.0, 1.0), row(0.5, 0.5, 0.5), row(T, T, T), 1.0, 0.95)
    same(advantages, [[0.45125, 0.475, 0.5]], "the example of the docstring")

def test_E13_gae__returns():
    _, returns = gae(row(0.0, 0.0, 1.0), row(0.5, 0.5, 0.5), row(T, T, T), 1.0, 0.95)
    same(returns, [[0.95125, 0.975, 1.0]], "a return is the advantage plus the value")

def test_E13_gae__discounts():
    advantages, _ = gae(row(1.0, 2.0), row(0.5, 3.0), row(T, T), 0.5, 0.0)
    same(advantages, [[2.0, -1.0]], "lam 0: A_t is r_t + gamma V_(t+1) - V_t")
    advantages, _ = gae(row(1.0, 2.0, 4.0), row(0.0, 0.0, 0.0), row(T, T, T), 0.5, 0.5)
    same(advantages, [[1.75, 3.0, 4.0]], "A_t takes gamma lam A_(t+1) along")

def check_gae_of_two_rows(garbage, why):
    mask = torch.tensor([[T, T, F, F], [F, T, T, T]])
    rewards = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    values = torch.tensor([[0.5, 0.5, garbage, 7.0], [garbage, 0.5, 0.5, 0.5]])
    advantages, _ = gae(rewards, values, mask, 1.0, 0.95)
    same(advantages, [[0.475, 0.5, 0, 0], [0, 0.45125, 0.475, 0.5]], why)

def test_E13_gae__ends_with_the_response():
    check_gae_of_two_rows(9.0, "the value after the last token is 0, and masked cells are 0")

def test_E13_gae__masked_cells_may_hold_NaN():
    check_gae_of_two_rows(NAN, "NaN in a masked value must not come through")

def test_E13_gae__leaves_its_arguments_alone():
    rewards, values = row(0.0, 1.0, 9.0), row(0.5, 0.5, 9.0)
    gae(rewards, values, row(T, T, F), 1.0, 0.95)
    same(torch.cat([rewards, values]), [[0.0, 1.0, 9.0], [0.5, 0.5, 9.0]], "a pure function changes no argument")

def test_E13_whiten__by_hand():
    same(whiten(row(1.0, 2.0, 3.0), row(T, T, T)), [[-1.2247449, 0, 1.2247449]], "the biased variance is 2/3")

def check_whiten_of_two_rows(garbage, why):
    x = torch.tensor([[1.0, garbage, 70.0], [-70.0, 2.0, 3.0]])
    same(whiten(x, torch.tensor([[T, F, F], [F, T, T]])), [[-1.2247449, 0, 0], [0, 0, 1.2247449]], why)

def test_E13_whiten__knows_the_mask():
    check_whiten_of_two_rows(9.0, "mean and variance over the True cells of all rows, else 0")

def test_E13_whiten__masked_cells_may_hold_NaN():
    check_whiten_of_two_rows(NAN, "NaN in a masked cell must not come through")

def test_E13_whiten__one_token():
    same(whiten(row(5.0, 9.0), row(T, F)), [[0.0, 0.0]], "one token has no variance, and gives 0")

def test_E14_policy_loss__by_hand():
    for advantage, ratio, want, slope in (
        (1.0, 1.5, -1.2, 0.0),  # likelier by enough already: no more push
        (1.0, 0.5, -0.5, -0.5),
        (-1.0, 1.5, 1.5, 1.5),
        (-1.0, 0.5, 0.8, 0.0),
        (2.0, 1.0, -2.0, -2.0),
    ):
        logprobs = row(math.log(ratio)).requires_grad_()
        loss, _ = policy_loss(logprobs, row(0.0), row(advantage), row(T), 0.2, 1)
        loss.backward()
        same(loss, want, f"the loss of advantage {advantage} at ratio {ratio} is {want}")
        same(logprobs.grad, [[slope]], f"its gradient in the log-prob is {slope}")

def test_E14_policy_loss__the_count():
    logprobs, advantages = row(1.5, 0.5, 1.5, 0.5, 1.0, 9.0).log(), row(1.0, 1.0, -1.0, -1.0, 2.0, 1.0)
    _, clipped = policy_loss(logprobs, torch.zeros(1, 6), advantages, row(T, T, T, T, T, F), 0.2, 1)
    assert int(clipped) == 2, "the first and the fourth are clipped: there the clipped term is the larger"

def check_policy_loss_of_two_rows(garbage, why):
    logprobs = torch.tensor([[0.0, garbage, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    advantages = torch.tensor([[1.0, garbage, 2.0], [4.0, 3.0, -3.0]])
    mask = torch.tensor([[T, F, T], [T, F, F]])
    loss, _ = policy_loss(logprobs, torch.zeros(2, 3), advantages, mask, 0.2, 10)
    loss.backward()
    same(loss, -0.7, f"{why}: 1 + 2 + 4, over a total of 10")
    same(logprobs.grad, [[-0.1, 0, -0.2], [-0.4, 0, 0]], f"{why}: a True cell pushes by its advantage, no other does")

def test_E14_policy_loss__is_a_sum_over_the_mask_by_the_total():
    check_policy_loss_of_two_rows(1.0, "a sum over the True cells")

def test_E14_policy_loss__masked_cells_may_hold_NaN():
    check_policy_loss_of_two_rows(NAN, "NaN in a masked cell reaches neither loss nor gradient")

def test_E14_policy_loss__stays_finite():
    loss, _ = policy_loss(row(500.0), row(-500.0), row(-1.0), row(T), 0.2, 1)
    assert torch.isfinite(loss), "exp(1000) overflows: the log of the ratio is kept within +-20"

def test_E14_value_loss__by_hand():
    for old, value, target, want, slope in (
        (0.0, 1.0, 1.0, 0.32, 0.0),  # moved by more than 0.2: no reward for that
        (0.0, 0.1, 1.0, 0.405, -0.9),
        (0.0, -1.0, 1.0, 2.0, -2.0),
        (1.0, 3.0, 0.0, 4.5, 3.0),
    ):
        values = row(value).requires_grad_()
        loss, _ = value_loss(values, row(old), row(target), row(T), 0.2, 1)
        loss.backward()
        same(loss, want, f"old value {old}, value {value}, return {target}: {want}")
        same(values.grad, [[slope]], f"its gradient in the value is {slope}")

def test_E14_value_loss__the_count():
    values, returns = row(1.0, 0.1, -1.0, 1.0), row(1.0, 1.0, 1.0, 1.0)
    _, clipped = value_loss(values, torch.zeros(1, 4), returns, row(T, T, T, F), 0.2, 1)
    assert int(clipped) == 1, "the first alone is clipped: there the clipped term is the larger"

def check_value_loss_of_two_rows(garbage, why):
    values = torch.tensor([[1.0, garbage], [2.0, 1.0]], requires_grad=True)
    returns, mask = torch.tensor([[0.0, garbage], [0.0, 7.0]]), torch.tensor([[T, F], [T, F]])
    loss, _ = value_loss(values, values.detach(), returns, mask, 0.2, 5)
    loss.backward()
    same(loss, 0.5, f"{why}: half of 1 + 4, over a total of 5")
    same(values.grad, [[0.2, 0.0], [0.4, 0.0]], f"{why}: the gradient is (value - return) / total")

def test_E14_value_loss__is_a_sum_over_the_mask_by_the_total():
    check_value_loss_of_two_rows(1.0, "a sum over the True cells")

def test_E14_value_loss__masked_cells_may_hold_NaN():
    check_value_loss_of_two_rows(NAN, "NaN in a masked cell reaches neither loss nor gradient")
