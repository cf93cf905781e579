#!/usr/bin/env bash
# The whole method, one command per stage (arXiv 2502.19557). The only home of settings that differ from the defaults.
#
#   bash train_all.sh                       the embedded default: two tiny bundled models, a laptop, no network
#   QUICK=1 bash train_all.sh               every stage at small scale, about a minute: does it all work here?
#   PRESET=qwen DATA_DIR=folder bash train_all.sh    GSM8K on one GPU; says first what it needs and how to get it
#   NPROC=8 PRESET=llama3 DATA_DIR=folder bash train_all.sh    the same on eight GPUs
#
# Environment: PRESET (tiny, smollm2, qwen, llama3), SEED, OUT (run folder), QUICK=1, FROM=stage (redo from there, such as
# FROM=6_ppo), ROUNDS=2 (sample, vote, reward model and PPO again from the latest policy), TEACHER (model folder, or a
# JSONL of recorded answers), TEACHER_TEST (recorded answers to the test questions: the teacher's row of the report),
# STUDENT (model folder), QUESTIONS (arith, gsm8k, mmlu_pro, or a JSONL), MODELS_DIR (holds the presets' model folders),
# DATA_DIR (holds gsm8k/ and mmlu_pro/), PYTHON, NPROC (ranks: every stage runs under torchrun, its models sharded, its
# questions shared), REFERENCE=kept (in later rounds the KL is still measured from the SFT
# student; moved, the default: from the policy that the round starts with).
# ONLY="2_sft 7_eval/sft": these stages and no report; SET="train=500; ppo+=--iterations 20": other numbers than the
# preset's, or (+=) flags after its flags, of which the last of a kind counts. bench/gpu_run.sh uses both.
# ABLATE=1: the whole comparison, on SEEDS ("0 1 2 3 4"), JOBS runs at once, tables in RESULTS; ABLATE=arms: one SEED.
# Memory: MICRO_TOKENS (of a pass of training), BATCH_SIZE (answers sampled at once), GRADIENT_CHECKPOINTING=1, OFFLOAD=1
# (PPO: the network at work alone is on the GPU); a run goes on with others. docs/scale.md says which GPU needs which.
# A finished stage is skipped on the next run; one whose settings or inputs changed is redone, the old kept aside.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
asked=$(for name in PRESET SEED QUICK NPROC SET ONLY ROUNDS REFERENCE ABLATE TEACHER TEACHER_TEST STUDENT QUESTIONS DATA_DIR MODELS_DIR \
  BATCH_SIZE MICRO_TOKENS GRADIENT_CHECKPOINTING OFFLOAD; do
  [ -z "${!name:-}" ] || printf '%s=%q ' "$name" "${!name}"
done)
PYTHON=${PYTHON:-$(command -v python || echo python3)} PRESET=${PRESET:-tiny} SEED=${SEED:-0} QUICK=${QUICK:-0} ROUNDS=${ROUNDS:-1} FROM=${FROM:-}
ONLY=${ONLY:-} REFERENCE=${REFERENCE:-moved} NPROC=${NPROC:-1} ABLATE=${ABLATE:-0} SEEDS=${SEEDS:-0 1 2 3 4} JOBS=${JOBS:-2}
models=${MODELS_DIR:-$here/models} lenient=--no-lenient
few=0 # test questions for the models before training and best-of-n; 0: all

# ---- presets: models, questions, sizes -----------------------------------------------------------------------------
case $PRESET in
tiny)
  TEACHER=${TEACHER:-$here/weights/tiny-teacher} STUDENT=${STUDENT:-$here/weights/tiny-student-base}
  QUESTIONS=${QUESTIONS:-arith} instruction="" needs="a laptop and about 5 minutes on one core"
  train=2000 valid=200 test=1000 teacher_samples=8 student_samples=4 best_of=16
  temperatures=1.0 temperature=0.7 # the teacher's: variety for the vote; the student's: near its greedy self
  new_tokens=64 batch=512 micro=4096 vote="--keep_duplicates" signal="--min_share 0.6" held_out=0.1
  sft="--epochs 2 --lr 5e-4" reward="--epochs 2 --lr 1e-3"
  ppo="--iterations 20 --rollout_size 128 --eval_every 4 --lr 2e-4 --critic_lr 5e-4" kl_coef=0.1 ;;
smollm2)
  TEACHER=${TEACHER:-$models/SmolLM2-1.7B-Instruct} STUDENT=${STUDENT:-$models/SmolLM2-135M-Instruct}
  batch=64 micro=1024 lr=1e-5 ppo_lr=2e-6 hub=HuggingFaceTB needs="a GPU of 8 GB, 14 GB disk with the weights, 4 h (computed, not measured)" ;;
qwen)
  TEACHER=${TEACHER:-$models/Qwen2.5-7B-Instruct} STUDENT=${STUDENT:-$models/Qwen2.5-0.5B-Instruct}
  batch=128 micro=1024 lr=1e-5 ppo_lr=1e-6 hub=Qwen needs="a GPU of 24 GB (16 GB with OFFLOAD=1), 52 GB \
disk with the weights, 7 h (computed, not measured)" ;;
llama3) # the paper's sizes: an 8B teacher, a 1B or 3B student
  TEACHER=${TEACHER:-$models/Llama-3.1-8B-Instruct} STUDENT=${STUDENT:-$models/Llama-3.2-1B-Instruct}
  batch=256 micro=2048 lr=1e-5 ppo_lr=1e-6 hub=meta-llama needs="a GPU of 80 GB (24 GB: docs/scale.md), 110 GB disk \
with the weights, 25 h for the 1B student (computed, not measured); a 3B student needs 130 GB of GPU memory" ;;
*) echo "error: PRESET=$PRESET: it is tiny, smollm2, qwen or llama3" >&2; exit 2 ;;
esac
if [ "$PRESET" != tiny ]; then # real questions, real models
  QUESTIONS=${QUESTIONS:-gsm8k} instruction=auto best_of=8
  train=7000 valid=200 test=1319 teacher_samples=4 student_samples=4 temperatures=0.7,1.0 temperature=1.0
  new_tokens=320 vote="" signal="" held_out=0.05
  if [[ $QUESTIONS != *mmlu_pro* ]]; then lenient=--lenient; fi # a lone letter is too often the pronoun I
  sft="--epochs 2 --lr $lr" reward="--epochs 1 --lr $lr"
  ppo="--iterations 150 --rollout_size 256 --eval_every 15 --lr $ppo_lr --critic_lr 5e-6" kl_coef=0.05
fi
if [ "$QUICK" = 1 ]; then
  held_out=0.3 best_of=2
  if [ "$PRESET" = tiny ]; then
    train=200 valid=20 test=100 student_samples=2 needs="a minute or two"
    ppo="--iterations 3 --rollout_size 64 --lr 2e-4 --critic_lr 5e-4"
  else
    train=16 valid=2 test=4 teacher_samples=2 student_samples=2 new_tokens=256
    needs="$needs; QUICK=1 is a trial of minutes, on a CPU up to an hour"
    ppo="--iterations 1 --rollout_size 8 --minibatches 2 --lr 1e-6 --critic_lr 5e-6"
  fi
fi
numbers=" train valid test few teacher_samples student_samples best_of temperatures temperature new_tokens batch micro \
vote signal held_out sft reward ppo kl_coef "
IFS=';' read -ra changes <<<"${SET:-}"
for change in ${changes[@]+"${changes[@]}"}; do # bash before 4.4 takes an empty array for an unset one
  if [ -z "${change// /}" ]; then continue; fi
  if ! [[ $change =~ ^\ *([a-z_]+)(\+?)=(.*)$ && $numbers == *" ${BASH_REMATCH[1]} "* ]]; then
    echo "error: SET: '$change' is not NAME=VALUE or NAME+=FLAGS with one of the names$numbers" >&2; exit 2
  fi
  key=${BASH_REMATCH[1]} value=${BASH_REMATCH[3]}
  if [ -n "${BASH_REMATCH[2]}" ]; then value="${!key} $value"; fi
  printf -v "$key" %s "$value"
done
# what changes the memory that is needed and not the result: a run that had too little goes on with less
batch=${BATCH_SIZE:-$batch} memory="--micro_tokens ${MICRO_TOKENS:-$micro}" offload=
[ "${GRADIENT_CHECKPOINTING:-0}" = 1 ] && memory="$memory --gradient_checkpointing"
[ "${OFFLOAD:-0}" = 1 ] && offload=--offload
name=$PRESET-$SEED
[ "$QUICK" = 1 ] && name=$name-quick
RUN=${OUT:-$here/runs/$name}
[[ $ROUNDS =~ ^[1-9]$ ]] || { echo "error: ROUNDS=$ROUNDS: a number from 1 to 9" >&2; exit 2; }
[[ $NPROC =~ ^[1-9][0-9]*$ ]] || { echo "error: NPROC=$NPROC: how many ranks, 1 or more" >&2; exit 2; }
[[ $REFERENCE =~ ^(moved|kept)$ ]] || { echo "error: REFERENCE=$REFERENCE: moved or kept" >&2; exit 2; }
[[ $ABLATE =~ ^(0|1|arms)$ ]] || { echo "error: ABLATE=$ABLATE: 1 (all of SEEDS), or arms (one SEED)" >&2; exit 2; }
[[ $SEED =~ ^[0-9]+$ ]] || { echo "error: SEED=$SEED: a number, 0 or greater" >&2; exit 2; }

# ---- helpers -------------------------------------------------------------------------------------------------------
export CONTINUE="${CONTINUE:-$asked${OUT:+OUT=$(printf %q "$OUT") }bash $(printf %q "$0")}" # what goes on after an interruption
child=
work() { # work COMMAND...: run it in a process group of its own, so that a signal reaches it once, and from here
  set -m; "$@" & child=$!; set +m
  wait "$child"
  child=
}
stopped() { # stopped SIGNAL CODE: pass the signal on and wait, for a stage at work saves its state first
  trap 'kill -s '"$1"' -- "-$child"' INT TERM HUP # again: it stops at once
  if [ -z "$child" ]; then echo "stopped; this goes on from there: $CONTINUE" >&2; exit "$2"; fi
  kill -s "$1" -- "-$child" 2>/dev/null || true
  while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done
  exit "$2"
}
trap 'stopped INT 130' INT; trap 'stopped TERM 143' TERM; trap 'stopped TERM 129' HUP

if [ "$ABLATE" = 1 ]; then # every seed is a run of its own, JOBS at once; what is finished is skipped
  runs=${OUT:-$here/runs/$PRESET-ablation$([ "$QUICK" != 1 ] || echo -quick)}
  mkdir -p "$runs"
  run_seed() { ABLATE=arms SEED=$1 OUT=$runs/$1 bash "$here/train_all.sh" >"$runs/$1.log" 2>&1; }
  export -f run_seed && export runs here PRESET QUICK
  echo "seeds $SEEDS, $JOBS at once; $runs/SEED.log shows where each one is"
  work xargs -P "$JOBS" -I{} bash -c 'run_seed {} && echo "seed {}: done" || { tail -n 3 "$runs/{}.log" >&2; exit 1; }' \
    <<<"${SEEDS// /$'\n'}"
  exec "$PYTHON" "$here/ablation.py" --out "${RESULTS:-$runs}" $(for s in $SEEDS; do echo "$runs/$s"; done)
fi

launch=("$PYTHON") redo=0 seen=" "
if [ "$NPROC" != 1 ]; then launch+=("$here/runtime/ranks.py" "$NPROC"); fi # torchrun
run() { # run STAGE SCRIPT FLAGS...: one stage, into its folder of the run
  local stage=$1 script=$2
  shift 2
  if [ "$FROM" = "$stage" ]; then redo=1; fi
  seen+="$stage "
  if [ -n "$ONLY" ] && [[ " $ONLY " != *" $stage "* ]]; then return; fi
  if [ "$redo" = 1 ] && [ -e "$RUN/$stage" ]; then
    local old=1
    while [ -e "$RUN/$stage.old$old" ]; do old=$((old + 1)); done
    mv "$RUN/$stage" "$RUN/$stage.old$old"
  fi
  echo "[$stage]"
  work "${launch[@]}" "$here/$script" --out "$RUN/$stage" "$@"
}
rl() { # rl STAGE FLAGS...: PPO with the settings that all its runs share
  run "$1" ppo.py --questions "$questions" --valid "$RUN/0_questions/valid.jsonl" --max_new_tokens "$new_tokens" \
    --batch_size "$batch" $memory $offload --temperature "$temperature" --seed "$SEED" --kl_coef "$kl_coef" $ppo "${@:2}"
}
sampling() { echo --max_new_tokens "$new_tokens" --batch_size "$batch"; }

PYTHONPATH="$here" "$PYTHON" -m runtime.preflight --run "$RUN" --preset "$PRESET" --seed "$SEED" --teacher "$TEACHER" --student "$STUDENT" \
  --teacher_test "${TEACHER_TEST:-}" --questions "$QUESTIONS" $memory $offload --batch_size $batch --new_tokens $new_tokens \
  --needs "$needs" --hub "${hub:-}" --nproc "$NPROC"

mkdir -p "$RUN" && exec 9<"$RUN" # a lock on the run's folder, until this script and its stages have ended
if command -v flock >/dev/null && ! flock -n 9; then
  echo "error: OUT=$RUN: another train_all.sh is at work there; wait for it, or choose another OUT" >&2; exit 2
fi
echo "${asked}bash train_all.sh" >"$RUN/command.txt" # for the report

# ---- the stages ----------------------------------------------------------------------------------------------------
questions=$RUN/0_questions/train.jsonl
run 0_questions data.py --questions "$QUESTIONS" --train $train --valid $valid --test $test --instruction "$instruction"

# the teacher answers every training question several times; a recorded teacher has done so already
answers=$TEACHER
if [ -d "$TEACHER" ]; then
  run 1_teacher generate.py --model "$TEACHER" --questions "$questions" --source teacher --seed "$SEED" \
    --samples $teacher_samples --temperatures $temperatures $lenient $(sampling)
  answers=$RUN/1_teacher/samples.jsonl
fi

# its answers vote; those that agree with the vote teach the student
run 1_vote pseudo_reward.py --questions "$questions" --teacher "$answers" --seed "$SEED" $lenient $vote
run 2_sft sft.py --model "$STUDENT" --data "$RUN/1_vote/sft.jsonl" --seed "$SEED" $memory $sft

policy=2_sft
for round in $(seq 1 "$ROUNDS"); do
  suffix=$([ "$round" = 1 ] || echo "_r$round")
  voters=$([ "$round" = 1 ] && echo teacher || echo both) # after a round the student may know better than its teacher
  # the student answers too, everything is rewarded by the vote, and a reward model learns from pairs; its
  # scale is the SFT student's in every round: a later student answers nearly alike, and a tiny deviation made 1 would
  # blow the scores up and leave the KL penalty without weight
  run 3_student$suffix generate.py --model "$RUN/$policy" --questions "$questions" --source student --seed "$SEED" \
    --samples $student_samples --temperatures $temperature $lenient $(sampling)
  run 4_pseudo_reward$suffix pseudo_reward.py --questions "$questions" --teacher "$answers" --seed "$SEED" $lenient $signal \
    --student "$RUN/3_student$suffix/samples.jsonl" --voters $voters
  run 5_reward$suffix reward.py --model "$RUN/2_sft" --pairs "$RUN/4_pseudo_reward$suffix/pairs.jsonl" --seed "$SEED" \
    --calibrate "$RUN/3_student/samples.jsonl" --questions "$questions" $memory \
    --held_out $held_out $reward
  # PPO: answers that the reward model likes become likelier, near the policy that it started from
  rl 6_ppo$suffix --policy "$RUN/$policy" --reward_model "$RUN/5_reward$suffix" \
    --reference "$([ "$REFERENCE" = moved ] || echo "$RUN/2_sft")"
  policy=6_ppo$suffix
done
# the baseline without a reward model: the vote itself is the reward
rl 6_ppo_raw --policy "$RUN/2_sft" --votes "$RUN/4_pseudo_reward/rewards.jsonl" $lenient

# everyone answers the same held-out questions, greedily
evaluate() { # evaluate NAME MODEL [FLAGS]
  local name=$1 model=$2
  shift 2
  run "7_eval/$name" eval.py --name "$name" --model "$model" --questions "$RUN/0_questions/test.jsonl" $(sampling) "$@"
}
if [ -d "$TEACHER" ]; then TEACHER_TEST=$TEACHER; fi
if [ -n "${TEACHER_TEST:-}" ]; then evaluate teacher "$TEACHER_TEST" --limit "$few"; fi
evaluate base "$STUDENT" --limit "$few"
evaluate sft "$RUN/2_sft"
if [ -d "$RUN/$policy/checkpoint" ] && [ ! -e "$RUN/$policy/done.json" ]; then policy=$policy/checkpoint; fi # PPO that was stopped
evaluate ppo "$RUN/$policy"
if [ "$ROUNDS" != 1 ]; then
  evaluate ppo_r1 "$RUN/6_ppo" # how far each round came
  for round in $(seq 2 $((ROUNDS - 1))); do evaluate ppo_r$round "$RUN/6_ppo_r$round"; done
fi
evaluate ppo_raw "$RUN/6_ppo_raw"
evaluate best_of_n "$RUN/2_sft" --reward_model "$RUN/5_reward" --samples $best_of --seed "$SEED" \
  --temperature $temperature --limit "$few"
if [ -f "$RUN/0_questions/hard.jsonl" ]; then # a difficulty that nobody was trained on
  hard="--questions $RUN/0_questions/hard.jsonl"
  if [ -d "$TEACHER" ]; then evaluate hard_teacher "$TEACHER" $hard; fi
  evaluate hard_sft "$RUN/2_sft" $hard
  evaluate hard_ppo "$RUN/$policy" $hard
fi

# ---- ablations: what each part contributes, one change at a time ---------------------------------------------------
arm() { # arm NAME FLAGS...: PPO with something else than the method, and its accuracy
  rl "6_ppo+$1" --policy "$RUN/2_sft" "${@:2}"
  evaluate "ppo+$1" "$RUN/6_ppo+$1"
}
if [ "$ABLATE" = arms ]; then
  # SFT on all of the teacher's answers, whoever won the vote; SFT on a tenth of the winners; SFT for as long as PPO
  run 1_vote+all pseudo_reward.py --questions "$questions" --teacher "$answers" --seed "$SEED" $lenient $vote --no-sft_filter
  run 2_sft+all sft.py --model "$STUDENT" --data "$RUN/1_vote+all/sft.jsonl" --seed "$SEED" $memory $sft
  evaluate sft+all "$RUN/2_sft+all"
  run 2_sft+tenth sft.py --model "$STUDENT" --data "$RUN/1_vote/sft.jsonl" --seed "$SEED" $memory $sft \
    --limit $((train * 4 / 10)) # of four a question
  evaluate sft+tenth "$RUN/2_sft+tenth"
  run 2_sft+longer sft.py --model "$RUN/2_sft" --data "$RUN/1_vote/sft.jsonl" --seed "$SEED" $memory $sft \
    --match_flops "$RUN/6_ppo"
  evaluate sft+longer "$RUN/2_sft+longer"
  # another reward: gold (an upper bound, not the method), no KL penalty, a stronger one
  learned="--reward_model $RUN/5_reward"
  arm gold --gold $lenient
  arm kl0 $learned --kl_coef 0
  arm kl4 $learned --kl_coef "$(awk "BEGIN { print 4 * $kl_coef }")"
  # another reward model: the student votes too, or it starts from the teacher
  run 4_pseudo_reward+both pseudo_reward.py --questions "$questions" --teacher "$answers" --seed "$SEED" $lenient $signal \
    --student "$RUN/3_student/samples.jsonl" --voters both
  judge() { # judge NAME MODEL PAIRS
    run "5_reward+$1" reward.py --model "$2" --pairs "$3" --calibrate "$RUN/3_student/samples.jsonl" --questions "$questions" --seed "$SEED" \
      $memory --held_out $held_out $reward
  }
  judge both "$RUN/2_sft" "$RUN/4_pseudo_reward+both/pairs.jsonl"
  arm both --reward_model "$RUN/5_reward+both"
  if [ -d "$TEACHER" ]; then # the critic stays as it was: only the judge is another
    judge teacher "$TEACHER" "$RUN/4_pseudo_reward/pairs.jsonl"
    arm teacher --reward_model "$RUN/5_reward+teacher" --critic "$RUN/5_reward"
  fi
  # a second round from the policy of the first, as above; and one with the teacher's votes alone
  run 3_student+r2 generate.py --model "$RUN/6_ppo" --questions "$questions" --source student --seed "$SEED" \
    --samples $student_samples --temperatures $temperature $lenient $(sampling)
  second_round() { # second_round NAME VOTERS
    run "4_pseudo_reward+$1" pseudo_reward.py --questions "$questions" --teacher "$answers" --seed "$SEED" $lenient $signal \
      --student "$RUN/3_student+r2/samples.jsonl" --voters "$2"
    judge "$1" "$RUN/2_sft" "$RUN/4_pseudo_reward+$1/pairs.jsonl"
    rl "6_ppo+$1" --policy "$RUN/6_ppo" --reward_model "$RUN/5_reward+$1"
    evaluate "ppo+$1" "$RUN/6_ppo+$1"
  }
  second_round r2 both
  second_round r2teacher teacher
fi
for stage in $ONLY; do
  [[ $seen == *" $stage "* ]] || { echo "error: ONLY: this run has no stage '$stage'; it has$seen" >&2; exit 2; }
done
if [ -z "$ONLY" ]; then "$PYTHON" "$here/report.py" "$RUN" --preset "$PRESET" --seed "$SEED"; fi
