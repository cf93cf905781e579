#!/usr/bin/env bash
# Where a learned reward pays: against the raw vote, with teachers of different quality and with fewer votes.
#
#   WEAK=models/weak GOOD=models/good bash bench/pays.sh     # the runs of three teachers, fewer votes; then pays.md
#   SEED=3 bash bench/pays.sh arms                           # one run with its arms, and no page
#
# Environment: SEEDS ("0 1 2"), JOBS (2), WEAK and GOOD (teacher folders beside the preset's own; either may be missing),
# VOTES ("20 50 100 400": how many questions have a vote), OUT (folder of the runs; that of bench/ablate.sh, whose runs
# are of use here), RESULTS (folder of the page; OUT), and what train_all.sh reads. What is finished is skipped.
[ -n "${BASH_VERSION:-}" ] || { echo "error: this is a script for bash: bash bench/pays.sh" >&2; exit 2; }
set -euo pipefail
here=$(unset CDPATH && cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

if [ "${1:-}" != arms ]; then # every seed of every teacher is a run of its own; that of the preset's is called SEED
  : "${SEEDS:=0 1 2}" "${JOBS:=2}" "${WEAK:=}" "${GOOD:=}"
  asked_here=$(printf '%s=%q ' SEEDS "$SEEDS" JOBS "$JOBS" WEAK "$WEAK" GOOD "$GOOD" VOTES "${VOTES-20 50 100 400}"
    [ -z "${RESULTS:-}" ] || printf 'RESULTS=%q ' "$RESULTS")
  source "$here/runtime/stages.sh"
  CONTINUE=$asked_here$CONTINUE
  runs=${OUT:-$here/runs/$PRESET-ablation$([ "$QUICK" != 1 ] || echo -quick)} names=() groups=()
  mkdir -p "$runs"
  for seed in $SEEDS; do
    must seed '^[0-9]+$' "SEEDS are numbers, 0 or greater"
    names+=("$seed") groups+=("default=$runs/$seed")
    for teacher in WEAK GOOD; do
      if [ -n "${!teacher}" ]; then names+=("$teacher-$seed") groups+=("$teacher=$runs/$teacher-$seed"); fi
    done
  done
  one() { # one SEED, or TEACHER-SEED: that teacher's run, all of whose votes count
    local teacher=${1%-*}
    if [ "$teacher" != "$1" ]; then export VOTES="" TEACHER=${!teacher}; fi
    SEED=${1#*-} OUT=$runs/$1 bash "$here/bench/pays.sh" arms >"$runs/$1.pays.log" 2>&1
  }
  export -f one && export runs here WEAK GOOD
  echo "${names[*]}, $JOBS at once; $runs/NAME.pays.log shows where each one is"
  work xargs -P "$JOBS" -I{} bash -c 'one {} && echo "{}: done" || { tail -n 3 "$runs/{}.pays.log" >&2; exit 1; }' \
    < <(printf '%s\n' "${names[@]}")
  exec "$PYTHON" "$here/bench/pays.py" --out "${RESULTS:-$runs}" "${groups[@]}"
fi

VOTES=${VOTES-20 50 100 400}
source "$here/train_all.sh" # the run itself; leaves `run`, `reward_model`, `reinforce` and `evaluate` behind

arms=()
arm() { # arm NAME FLAGS...: another PPO
  reinforce "6_ppo+$1" --policy "$RUN/2_sft" "${@:2}"
  arms+=("ppo+$1=$RUN/6_ppo+$1")
}
both() { # both NAME VOTES EPOCHS: a reward model from these votes; PPO on it, and on the votes themselves
  reward_model "5_reward+$1" "$2/pairs.jsonl" --epochs "$3"
  arm "$1" --reward_model "$RUN/5_reward+$1"
  arm "raw_$1" --votes "$2/rewards.jsonl" "$(switch lenient)"
}

# other KL penalties, as in bench/ablate.sh: each reward is drawn with the one that suits it, chosen on validation
for times in 0 0.25 0.5; do
  coefficient=$(awk "BEGIN { print $times * $kl_coef }")
  arm "kl$times" --reward_model "$RUN/5_reward" --kl_coef "$coefficient"
  arm "raw_kl$times" --votes "$RUN/4_pseudo_reward/rewards.jsonl" "$(switch lenient)" --kl_coef "$coefficient"
done

# votes of some questions alone. Few pairs are read more often, for otherwise a reward model of them would take no steps
all=$(wc -l <"$RUN/4_pseudo_reward/rewards.jsonl")
for n in $VOTES; do
  if [ "$n" -ge "$all" ]; then echo "only $all questions have a vote: no arm for $n"; continue; fi
  fewer=$RUN/4_pseudo_reward+votes$n times=$((all / n < 10 ? all / n : 10))
  "$PYTHON" "$here/bench/pays.py" cut --votes "$RUN/4_pseudo_reward" --questions "$n" --seed "$SEED" --out "$fewer"
  both "votes$n" "$fewer" $((times * reward_epochs))
done

# one answer of the teacher to each question, taken for right
if [ -n "$VOTES" ]; then
  "$PYTHON" "$here/bench/pays.py" cut --samples "$answers" --out "$RUN/1_teacher+one"
  run 4_pseudo_reward+one pseudo_reward.py --questions "$questions" --teacher "$RUN/1_teacher+one/samples.jsonl" \
    --student "$RUN/3_student/samples.jsonl" --min_share "$min_share" "$(switch lenient)"
  both one "$RUN/4_pseudo_reward+one" "$reward_epochs"
fi

evaluate arms test "${arms[@]}"
