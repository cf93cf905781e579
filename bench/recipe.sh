#!/usr/bin/env bash
# Temporary. One recipe of the reading task, from nothing to numbers on validation questions; everything resumes.
#   bash bench/recipe.sh OUT "TEACHER CHANGES" "STUDENT CHANGES" [SEED]
#   bash bench/recipe.sh runs/r/a "careful_topics=8 steps=2000" "steps=1500"
# PRETRAIN=cuda: the two pretrainings alone on a GPU, a minute or two in place of ten; all else stays on the CPU.
# Reuses models that are already there (OUT/tiny-teacher, OUT/tiny-student-base). Two processes of one thread each.
set -uo pipefail
here=$(cd -- "$(dirname -- "$0")/.." && pwd) out=$1 teacher=${2:-} student=${3:-} seed=${4:-0}
export OMP_NUM_THREADS=1
gpu=${CUDA_VISIBLE_DEVICES-0}; [ "${PRETRAIN:-cpu}" = cuda ] || gpu="" # PRETRAIN=cuda: the two pretrainings alone on the GPU
export CUDA_VISIBLE_DEVICES=""
until_gone() { while kill -0 "$1" 2>/dev/null; do sleep 1; done; } # a sibling: `wait` knows children alone
python=${PYTHON:-python}
mkdir -p "$out"
exec >>"$out/log" 2>&1
py() { "$python" "$here/bench/recipe.py" "$@"; }
stage() { echo "[$(date +%T) $1 $2]"; "$python" "$here/$1.py" --out "$out/$2" "${@:3}" || exit 1; }
Q=(--questions "$out/train.jsonl")
evaluate() { # NAME=FOLDER...
  "$python" "$here/eval.py" --questions "$out/valid.jsonl" --max_new_tokens 96 --batch_size 512 --out "$out/eval" "$@" || exit 1
}
sft() { # NAME MODEL DATA EPOCHS [FLAGS]
  stage sft "$1" --model "$2" --data "$3" --epochs "$4" --lr 5e-4 --seed "$seed" "${@:5}" && evaluate "$1=$out/$1"
}
ppo() { # NAME FLAGS: 20 x 128
  stage ppo "$1" --policy "$out/sft" "${Q[@]}" --max_new_tokens 96 --temperature 0.7 --iterations "${ITER:-20}" --rollout_size 128 \
    --lr 2e-4 --critic_lr 5e-4 --batch_size 512 --seed "$seed" "${@:2}" && evaluate "$1=$out/$1"
}
learned() { ppo "ppo-k$1" --reward_model "$out/reward" --kl_coef "$1"; }
raw() { ppo "raw-k$1" --votes "$out/rewards/rewards.jsonl" --kl_coef "$1"; }
sum() { py summary "$out" | tee "$out/line.txt"; }

# the models, both at once
[ -f "$out/valid.jsonl" ] || py questions "$out" "${TRAIN:-2000}" "${VALID:-1000}" || exit 1
[ -f "$out/teacher.json" ] || CUDA_VISIBLE_DEVICES=$gpu py make "$out" teacher "$teacher" & pid=$!
[ -f "$out/student-base.json" ] || CUDA_VISIBLE_DEVICES=$gpu py make "$out" student-base "$student"
wait $pid
[ -f "$out/tiny-teacher/config.json" ] && [ -f "$out/tiny-student-base/config.json" ] || exit 1

# the main line
(evaluate "teacher=$out/tiny-teacher" "base=$out/tiny-student-base") & pid=$!
stage generate teacher "${Q[@]}" --model "$out/tiny-teacher" --source teacher --samples 8 --temperatures 1.0 \
  --max_new_tokens 96 --batch_size 512 --seed "$seed"
stage pseudo_reward vote "${Q[@]}" --teacher "$out/teacher/samples.jsonl" --keep_duplicates --seed "$seed"
py tenth "$out"; py winners "$out" longest; py winners "$out" shortest
(sft tenth "$out/tiny-student-base" "$out/vote-tenth.jsonl" 2; sft half "$out/tiny-student-base" "$out/vote/sft.jsonl" 1) & half=$!
sft sft "$out/tiny-student-base" "$out/vote/sft.jsonl" 2
wait $pid; sum
stage generate student "${Q[@]}" --model "$out/sft" --source student --samples 4 --temperatures 0.7 \
  --max_new_tokens 96 --batch_size 512 --seed "$seed"
stage pseudo_reward rewards "${Q[@]}" --teacher "$out/teacher/samples.jsonl" --student "$out/student/samples.jsonl" \
  --min_share "${MIN_SHARE:-0.3}" --seed "$seed"
(until_gone $half; raw .02; raw .05; sft twice "$out/tiny-student-base" "$out/vote/sft.jsonl" 4) & raws=$!
stage reward reward --model "$out/sft" --pairs "$out/rewards/pairs.jsonl" --calibrate "$out/student/samples.jsonl" \
  "${Q[@]}" --epochs 2 --lr 1e-3 --held_out 0.1 --seed "$seed"
learned .05; sum
(stage generate valid-samples --questions "$out/valid.jsonl" --model "$out/sft" --source student --samples 8 \
  --temperatures 0.7 --max_new_tokens 96 --batch_size 512 --seed "$seed"; py judge "$out")
learned .1; sum
ppo ppo-fast --reward_model "$out/reward" --kl_coef .05 --lr 4e-4; sum

# the rest
(until_gone $raws; raw .1; ppo raw-fast --votes "$out/rewards/rewards.jsonl" --kl_coef .02 --lr 4e-4) & rest=$!
learned .02; sum
[ -f "$out/eval/ppo-length/done.json" ] || { py length "$out" 1 && evaluate "ppo-length=$out/ppo-length"; }
learned .2
sft longest "$out/tiny-student-base" "$out/vote-longest.jsonl" 2
sft shortest "$out/tiny-student-base" "$out/vote-shortest.jsonl" 2
[ -f "$out/eval/ppo-short/done.json" ] || { py length "$out" -1 && evaluate "ppo-short=$out/ppo-short"; }
wait $raws $rest; sum
echo finished
