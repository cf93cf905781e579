#!/usr/bin/env bash
# What each part contributes: train_all.sh's runs, and arms that differ from the method in one thing.
#
#   bash bench/ablate.sh                  # seeds 0 to 4, two at once; ablation.md compares them (bench/ablation.py)
#   SEED=3 bash bench/ablate.sh arms      # one run with its arms, and no comparison
#
# Environment: SEEDS ("0 1 2 3 4"), JOBS (2), OUT (folder of the runs), RESULTS (folder of the tables; OUT), and what
# train_all.sh reads. What is finished is skipped.
[ -n "${BASH_VERSION:-}" ] || { echo "error: this is a script for bash: bash bench/ablate.sh" >&2; exit 2; }
set -euo pipefail
here=$(unset CDPATH && cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

if [ "${1:-}" != arms ]; then # every seed is a run of its own
  : "${SEEDS:=0 1 2 3 4}" "${JOBS:=2}"
  asked_here=$(printf 'SEEDS=%q JOBS=%q ' "$SEEDS" "$JOBS"; [ -z "${RESULTS:-}" ] || printf 'RESULTS=%q ' "$RESULTS")
  source "$here/runtime/stages.sh"
  CONTINUE=$asked_here$CONTINUE
  runs=${OUT:-$here/runs/$PRESET-ablation$([ "$QUICK" != 1 ] || echo -quick)} folders=()
  mkdir -p "$runs"
  for seed in $SEEDS; do must seed '^[0-9]+$' "SEEDS are numbers, 0 or greater"; folders+=("$runs/$seed"); done
  one() { SEED=$1 OUT=$runs/$1 bash "$here/bench/ablate.sh" arms >"$runs/$1.log" 2>&1; }
  export -f one && export runs here
  echo "seeds $SEEDS, $JOBS at once; $runs/SEED.log shows where each one is"
  work xargs -P "$JOBS" -I{} bash -c 'one {} && echo "seed {}: done" || { tail -n 3 "$runs/{}.log" >&2; exit 1; }' \
    <<<"${SEEDS// /$'\n'}"
  exec "$PYTHON" "$here/bench/ablation.py" --out "${RESULTS:-$runs}" "${folders[@]}"
fi

source "$here/train_all.sh" # the run itself; leaves `run`, `reward_model`, `reinforce` and `evaluate` behind

arms=()
supervise() { # supervise NAME MODEL DATA EPOCHS: another SFT
  run "2_sft+$1" sft.py --model "$2" --data "$3" --epochs "$4" --lr "$sft_lr"
  arms+=("sft+$1=$RUN/2_sft+$1")
}
arm() { # arm NAME FLAGS...: another PPO
  reinforce "6_ppo+$1" "${@:2}"
  arms+=("ppo+$1=$RUN/6_ppo+$1")
}
learned=(--policy "$RUN/2_sft" --reward_model "$RUN/5_reward")
votes=(--policy "$RUN/2_sft" --votes "$RUN/4_pseudo_reward/rewards.jsonl" "$(switch lenient)")
pairs() { # pairs NAME STUDENT VOTERS: the student's answers, rewarded by other voters
  run "4_pseudo_reward+$1" pseudo_reward.py --questions "$questions" --teacher "$answers" \
    --student "$RUN/$2/samples.jsonl" --voters "$3" --min_share "$min_share" "$(switch lenient)"
}

# SFT on all of the teacher's answers, whoever won the vote; on a tenth of the winners; for as long as PPO
run 1_vote+all pseudo_reward.py --questions "$questions" --teacher "$answers" "$(switch keep_duplicates)" \
  "$(switch lenient)" --sft_per_question "$sft_per_question" --no-sft_filter
supervise all "$STUDENT" "$RUN/1_vote+all/sft.jsonl" "$sft_epochs"
awk 'NR % 10 == 1' "$RUN/1_vote/sft.jsonl" >"$RUN/1_vote+tenth.jsonl" # over all questions
supervise tenth "$STUDENT" "$RUN/1_vote+tenth.jsonl" "$sft_epochs"
supervise half "$STUDENT" "$RUN/1_vote/sft.jsonl" $(((sft_epochs + 1) / 2))
supervise twice "$STUDENT" "$RUN/1_vote/sft.jsonl" $((2 * sft_epochs))
epochs_of_ppo() { # epochs_of_ppo DATA: how many of them take as many FLOPs as PPO
  "$PYTHON" -c 'import json, sys
run, data, epochs = sys.argv[1:]
sft, ppo = (json.load(open(f"{run}/{stage}/done.json"))["flops"] for stage in ("2_sft", "6_ppo"))
rows = [sum(1 for _ in open(path)) for path in (f"{run}/1_vote/sft.jsonl", data)]
print(max(1, round(ppo / sft * int(epochs) * rows[0] / rows[1])))' "$RUN" "$1" "$sft_epochs"
}
supervise longer "$RUN/2_sft" "$RUN/1_vote/sft.jsonl" "$(epochs_of_ppo "$RUN/1_vote/sft.jsonl")"

# expert iteration: SFT on those of the student's own answers that equal the vote, for as long as PPO
control() { "$PYTHON" "$here/bench/controls.py" --kind "$1" --out "$RUN/1_vote+$1.jsonl" "${@:2}"; }
control own --rewards "$RUN/4_pseudo_reward/rewards.jsonl" --questions "$questions"
supervise own "$RUN/2_sft" "$RUN/1_vote+own.jsonl" "$(epochs_of_ppo "$RUN/1_vote+own.jsonl")"

# what learns nothing of right and wrong must not do as well: length as the reward, and as the choice of SFT's answers
for kind in longest shortest; do
  control "$kind" --sft "$RUN/1_vote/sft.jsonl"
  supervise "$kind" "$STUDENT" "$RUN/1_vote+$kind.jsonl" "$sft_epochs"
done
for kind in longer shorter; do arm "$kind" --policy "$RUN/2_sft" --reward "$here/bench/controls.py:$kind"; done

# another reward: gold (an upper bound, not the method); another KL penalty
arm gold --policy "$RUN/2_sft" --gold "$(switch lenient)"
for times in 0 0.25 0.5 2 4; do
  arm "kl$times" "${learned[@]}" --kl_coef "$(awk "BEGIN { print $times * $kl_coef }")"
  arm "raw_kl$times" "${votes[@]}" --kl_coef "$(awk "BEGIN { print $times * $kl_coef }")"
done

# another reward model: the student votes too; or it starts from the teacher, and the critic stays as it was
pairs both 3_student both
reward_model 5_reward+both "$RUN/4_pseudo_reward+both/pairs.jsonl"
arm both --policy "$RUN/2_sft" --reward_model "$RUN/5_reward+both"
if [ -d "$TEACHER" ]; then
  reward_model 5_reward+teacher "$RUN/4_pseudo_reward/pairs.jsonl" --model "$TEACHER"
  arm teacher --policy "$RUN/2_sft" --reward_model "$RUN/5_reward+teacher" --critic "$RUN/5_reward"
fi

# a second round, as ROUNDS=2 has it; and one with the teacher's votes alone
seed=$((10#$SEED + 2 ** 32))
run 3_student+r2 generate.py --model "$RUN/6_ppo" --questions "$questions" --source student \
  --samples "$student_samples" --temperatures "$temperature" --max_new_tokens "$max_new_tokens" "$(switch lenient)"
for round in "r2 both" "r2teacher teacher"; do
  read -r name voters <<<"$round"
  pairs "$name" 3_student+r2 "$voters"
  reward_model "5_reward+$name" "$RUN/4_pseudo_reward+$name/pairs.jsonl"
  arm "$name" --policy "$RUN/6_ppo" --reward_model "$RUN/5_reward+$name"
done

evaluate arms test "${arms[@]}"
report
