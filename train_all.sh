#!/usr/bin/env bash
# The whole method, one command per stage (arXiv 2502.19557).
#
#   bash train_all.sh                                two tiny bundled models, a laptop, no network: about 7 minutes
#   QUICK=1 bash train_all.sh                        every stage at small scale, about a minute: does it all work here?
#   train=500 kl_coef=0.2 bash train_all.sh          any number of presets/tiny.sh, by its name
#   PRESET=qwen DATA_DIR=folder bash train_all.sh    GSM8K on one GPU; with NPROC=8 on eight
#
# Environment: PRESET (a file of presets/), SEED, OUT (the run folder), QUICK=1, PRECISION (bf16 or fp32; not set:
# bf16 on a GPU, fp32 on a CPU), NPROC (ranks: every stage runs under torchrun), ROUNDS=2 (sample, vote, reward model
# and PPO again from the latest policy), FROM=6_ppo (redo from there), TEACHER (model folder, or a JSONL of recorded
# answers), TEACHER_TEST (its recorded answers to the test questions), STUDENT (model folder), QUESTIONS (arith,
# gsm8k, mmlu_pro, mawps, or a JSONL), MODELS_DIR and DATA_DIR (where the presets' models and question sets are),
# PYTHON. A finished stage is skipped on the next run; one whose settings or inputs changed is redone, the old kept
# aside.
case $(head -n 1 "$0") in *"$(printf '\r')") echo "error: $0: its lines end in CRLF, clone it anew" >&2; exit 2 ;; esac #
[ -n "${BASH_VERSION:-}" ] || { echo "error: this is a script for bash: bash train_all.sh" >&2; exit 2; }
set -euo pipefail
here=$(unset CDPATH && cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
source "$here/runtime/stages.sh" # `run`, which runs one stage, `switch`, and the numbers of the preset

run_folder "runs/$PRESET-$SEED" # RUN is OUT, or else this
questions=$RUN/0_questions/train.jsonl
run 0_questions data.py --questions "$QUESTIONS" --train "$train" --valid "$valid" --test "$test" \
  --instruction "$instruction"

# the teacher answers every training question several times; a recorded teacher has done so already
answers=$TEACHER
if [ -d "$TEACHER" ]; then
  run 1_teacher generate.py --model "$TEACHER" --questions "$questions" --source teacher --samples "$teacher_samples" \
    --temperatures "$temperatures" --max_new_tokens "$max_new_tokens" "$(switch lenient)"
  answers=$RUN/1_teacher/samples.jsonl TEACHER_TEST=$TEACHER
fi

# its answers vote; those that agree with the vote teach the student
run 1_vote pseudo_reward.py --questions "$questions" --teacher "$answers" "$(switch lenient)" \
  "$(switch keep_duplicates)" --sft_per_question "$sft_per_question"
report --only_teacher --min_share "$min_share" # is there anything to learn?
run 2_sft sft.py --model "$STUDENT" --data "$RUN/1_vote/sft.jsonl" --epochs "$sft_epochs" --lr "$sft_lr"

reinforce() { # reinforce STAGE FLAGS...: PPO with the numbers that all its runs share
  run "$1" ppo.py --questions "$questions" --valid "$RUN/0_questions/valid.jsonl" --max_new_tokens "$max_new_tokens" \
    --temperature "$temperature" --iterations "$iterations" --rollout_size "$rollout_size" \
    --minibatches "$minibatches" --eval_every "$eval_every" --lr "$ppo_lr" --critic_lr "$critic_lr" \
    --kl_coef "$kl_coef" "$(switch zero_values)" "${@:2}"
}
reward_model() { # reward_model STAGE PAIRS [FLAGS]: its scores have the scale of the first student's in every round,
  # because later students answer nearly alike: a tiny deviation made 1 would leave the KL penalty without weight
  run "$1" reward.py --model "$RUN/2_sft" --pairs "$2" --calibrate "$RUN/3_student/samples.jsonl" \
    --questions "$questions" --epochs "$reward_epochs" --lr "$reward_lr" --held_out "$held_out" "${@:3}"
}
policy=$RUN/2_sft rounds=()
for ((round = 1; round <= ROUNDS; round++)); do
  if [ "$round" = 1 ]; then again="" voters=teacher; else
    again=_r$round voters=both # by now the student may know better than its teacher
    seed=$((10#$SEED + (round - 1) * 2 ** 32)) # and it draws anew
    rounds+=("ppo_r$((round - 1))=$policy")
  fi
  # the student answers too, the vote rewards every answer, and a reward model learns from pairs of them
  run "3_student$again" generate.py --model "$policy" --questions "$questions" --source student \
    --samples "$student_samples" --temperatures "$temperature" --max_new_tokens "$max_new_tokens" "$(switch lenient)"
  run "4_pseudo_reward$again" pseudo_reward.py --questions "$questions" --teacher "$answers" \
    --student "$RUN/3_student$again/samples.jsonl" --voters "$voters" --min_share "$min_share" "$(switch lenient)"
  reward_model "5_reward$again" "$RUN/4_pseudo_reward$again/pairs.jsonl"
  # PPO: answers that the reward model likes become likelier, near the policy that it started from
  reinforce "6_ppo$again" --policy "$policy" --reward_model "$RUN/5_reward$again"
  policy=$RUN/6_ppo$again
done
seed=$SEED
# the baseline without a reward model: the vote itself is the reward
reinforce 6_ppo_raw --policy "$RUN/2_sft" --votes "$RUN/4_pseudo_reward/rewards.jsonl" "$(switch lenient)"

# everyone answers the same held-out questions, greedily; SFT and PPO also several times, sampled as in PPO: best-of-n
evaluate() { # evaluate SET QUESTIONS FLAGS... NAME=MODEL...
  run "7_eval/$1" eval.py --questions "$RUN/0_questions/$2.jsonl" --max_new_tokens "$max_new_tokens" "${@:3}"
}
students=("base=$STUDENT" "sft=$RUN/2_sft" "ppo=$policy" "ppo_raw=$RUN/6_ppo_raw" ${rounds[@]+"${rounds[@]}"})
evaluate test test ${TEACHER_TEST:+"teacher=$TEACHER_TEST"} "${students[@]}"
evaluate best_of_n test --reward_model "$RUN/5_reward" --samples "$best_of" --temperature "$temperature" \
  --seed "$SEED" "sft=$RUN/2_sft" "ppo=$policy"
if [ -f "$RUN/0_questions/hard.jsonl" ]; then # a difficulty that nobody was trained on
  hard=("sft=$RUN/2_sft" "ppo=$policy")
  if [ -d "$TEACHER" ]; then hard=("teacher=$TEACHER" "${hard[@]}"); fi
  evaluate hard hard "${hard[@]}"
fi
report
