#!/usr/bin/env bash
# Half an hour on one GPU: real weights, real GSM8K, by train_all.sh's stages in the order of their worth.
#
#   DATA_DIR=data MODELS_DIR=models bash bench/gpu_run.sh
#
# TEACHER is Qwen2.5-Coder-1.5B-Instruct and STUDENT its 0.5B unless set, in MODELS_DIR; PRESET is qwen (smollm2 for
# STUDENT=.../SmolLM2-135M-Instruct). BUDGET: seconds in all, 1800. What this takes on paper: python bench/gpu_plan.py
#
#   until   stages, and what is there when they have ended
#   15 %    1. teacher and base student on the first FIRST=300 test questions: can this work at all?
#   45 %    2. the teacher's samples, 4 for each of 2,000 training questions: teacher.jsonl.gz is a recorded TEACHER
#   65 %    3. vote, SFT; until 70 %: the SFT student on all 1,319 test questions
#   85 %    4. student samples, pseudo-rewards, reward model; until 90 %: its quality against gold, best of 8
#   100 %   5. PPO, as many iterations as fit by what stages 3 and 4 have taken; then PPO's student, the teacher and the
#              base student on all test questions, for the paired tests
#   Tokens a second and share of the matrix product's rate, stage by stage, are in the report (6).
#
# Until: of BUDGET, at the latest; what a stage leaves is the next ones'. At its limit a stage gets a SIGTERM and saves
# its state. A later stage that can do without it goes on; else this ends, with exit code 143, and the same command
# continues. PPO that was stopped has left a checkpoint: that is evaluated. After each step RESULTS
# (results/gsm8k-STUDENT) has report.md, report.json, pictures, metrics, commands and times; the weights stay in OUT
# (runs/gsm8k-STUDENT). SET changes numbers, as in train_all.sh. At toy scale on a CPU:
#
#   STUDENT=models/SmolLM2-135M-Instruct TEACHER=models/SmolLM2-135M-Instruct FIRST=4 ROLLOUT=8 BUDGET=3600 \
#     SET="train=8;valid=2;test=8;new_tokens=256;batch=32;micro=1024;best_of=2;held_out=0.3" bash bench/gpu_run.sh
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
export CONTINUE="$(for name in PRESET SEED SET DATA_DIR MODELS_DIR TEACHER TEACHER_TEST STUDENT QUESTIONS OUT RESULTS FIRST ROLLOUT BUDGET; do
  [ -z "${!name:-}" ] || printf '%s=%q ' "$name" "${!name}"
done)bash $(printf %q "$0")"
models=${MODELS_DIR:-$here/models}
export PYTHON=${PYTHON:-$(command -v python || echo python3)} PRESET=${PRESET:-qwen} SEED=${SEED:-0}
export TEACHER=${TEACHER:-$models/Qwen2.5-Coder-1.5B-Instruct} STUDENT=${STUDENT:-$models/Qwen2.5-Coder-0.5B-Instruct}
export OUT=${OUT:-$here/runs/gsm8k-$(basename "$STUDENT")}
RESULTS=${RESULTS:-$here/results/gsm8k-$(basename "$STUDENT")} BUDGET=${BUDGET:-1800} FIRST=${FIRST:-300} ROLLOUT=${ROLLOUT:-256}
for name in BUDGET FIRST ROLLOUT; do
  [[ ${!name} =~ ^[1-9][0-9]*$ ]] || { echo "error: $name=${!name}: a number above 0" >&2; exit 2; }
done
mkdir -p "$OUT" "$RESULTS/metrics"
# two decisions that a later call must not change, or it would redo what they led to
few=$(cat "$OUT/few" 2>/dev/null || echo "$FIRST") iterations=$(cat "$OUT/iterations" 2>/dev/null || echo 1)
sizes="train=2000;valid=100;teacher_samples=4;student_samples=4;temperatures=0.7;batch=512;micro=8192;${SET:-}"

SECONDS=0 child= ended=
left() { echo $((BUDGET - SECONDS)); }
percent() { echo $((BUDGET * $1 / 100)); }
done_with() { [ -e "$OUT/$1/done.json" ]; }
trap 'ended=1; kill -s TERM "$child" 2>/dev/null || true' INT TERM HUP
limited() { # limited SECONDS COMMAND...: run it, with one SIGTERM at the limit; its exit code
  local end=$((SECONDS + $1)) code
  set -m; "${@:2}" & child=$!; set +m # in a group of its own: a Ctrl-C reaches it once, by the trap
  while kill -0 "$child" 2>/dev/null && [ "$SECONDS" -lt "$end" ]; do sleep 0.2; done
  kill -s TERM "$child" 2>/dev/null || true
  while true; do
    code=0; wait "$child" || code=$?
    kill -0 "$child" 2>/dev/null || return "$code"
  done
}
keep() { # what may be wanted of the run, weights aside, into RESULTS
  local stage
  for stage in 2_sft 5_reward 6_ppo; do cp "$OUT/$stage/metrics.jsonl" "$RESULTS/metrics/$stage.jsonl" 2>/dev/null || true; done
  cp "$OUT/6_ppo/samples.txt" "$RESULTS/" 2>/dev/null || true
  if [ -d "$TEACHER" ] && done_with 1_teacher; then gzip -c "$OUT/1_teacher/samples.jsonl" >"$RESULTS/teacher.jsonl.gz"; fi
  if ! ls "$OUT"/7_eval/*/done.json >/dev/null 2>&1; then return; fi
  echo "$CONTINUE" >"$OUT/command.txt" # for the report
  "$PYTHON" "$here/report.py" "$OUT" --preset "$PRESET" --seed "$SEED" >/dev/null || return 0
  cp "$OUT"/report.md "$OUT"/report.json "$OUT"/curves.png "$OUT"/reward.png "$RESULTS/"
}
step() { # step END STAGES...: stages of train_all.sh, stopped at END seconds
  local limit=$(($1 - SECONDS)) start=$SECONDS code=0
  if [ -n "$ended" ] || [ "$limit" -lt 1 ]; then return; fi
  echo "== ${*:2}: up to $limit s of $(left)"
  export ONLY="${*:2}" SET="$sizes;few=$few;ppo+=--iterations $iterations --rollout_size $ROLLOUT --eval_every $((iterations / 10 + 1))"
  limited "$limit" bash "$here/train_all.sh" || code=$?
  printf '%s\tbegan at %d s, took %d of %d s, exit code %d\n' "$ONLY" "$start" $((SECONDS - start)) "$limit" "$code" | tee -a "$RESULTS/times.txt"
  printf 'ONLY=%q SET=%q %s\n' "$ONLY" "$SET" "PRESET=$PRESET SEED=$SEED TEACHER=$TEACHER STUDENT=$STUDENT bash train_all.sh" >>"$RESULTS/commands.txt"
  case $code in 0 | 129 | 130 | 143) keep ;; *) exit "$code" ;; esac # an error has said what it is
}
finish() { # finish STAGE...: these must be done, or this is not the end
  local stage open=
  for stage in "$@"; do done_with "$stage" || open+=" $stage"; done
  if [ -z "$open" ]; then return; fi
  echo "not finished:$open; $RESULTS has what is there, and this goes on: $CONTINUE" >&2
  exit 143
}

teacher_too=$(if [ -d "$TEACHER" ] || [ -n "${TEACHER_TEST:-}" ]; then echo 7_eval/teacher; fi)
step "$(percent 15)" 0_questions $teacher_too 7_eval/base
if [ -d "$TEACHER" ]; then step "$(percent 45)" 1_teacher; finish 1_teacher; fi
step "$(percent 65)" 1_vote 2_sft
finish 2_sft
step "$(percent 70)" 7_eval/sft
step "$(percent 85)" 3_student 4_pseudo_reward 5_reward
finish 5_reward
step "$(percent 90)" 7_eval/best_of_n

read -r fit reserve < <("$PYTHON" "$here/bench/gpu_plan.py" --run "$OUT" --seconds "$(left)" --rollout "$ROLLOUT")
if [ ! -d "$OUT/6_ppo" ]; then iterations=$fit; echo "$fit" >"$OUT/iterations"; fi
step $((SECONDS + 95 * ($(left) - reserve) / 100)) 6_ppo # the rest is for saving its state, should it be stopped
if ! done_with 6_ppo && [ -d "$OUT/6_ppo/checkpoint" ]; then
  looked=$(grep -n valid/accuracy "$OUT/6_ppo/metrics.jsonl" | tail -n 1 | cut -d : -f 1 || true)
  echo "PPO was stopped after $(wc -l <"$OUT/6_ppo/metrics.jsonl") of $iterations iterations; its checkpoint, of $((${looked:-1} - 1)), is evaluated" |
    tee -a "$RESULTS/times.txt"
fi
if done_with 6_ppo || [ -d "$OUT/6_ppo/checkpoint" ]; then step "$BUDGET" 7_eval/ppo; fi
if done_with 7_eval/ppo && [ -z "$ended" ] && [ "$(left)" -gt 0 ]; then
  few=0
  echo 0 >"$OUT/few"
  step "$BUDGET" $teacher_too 7_eval/base
fi
finish $teacher_too 7_eval/base 7_eval/sft 7_eval/best_of_n 6_ppo 7_eval/ppo
echo "all done: $RESULTS/report.md"
