#!/usr/bin/env bash
# Temporary. All models of models.txt at once, then all recipes at once, in 570 seconds; what matters of them into OUT.
#   bash bench/search.sh OUT [SECONDS]       PRETRAIN=cuda (the pretrainings on the GPU; default), PYTHON
set -uo pipefail
here=$(cd -- "$(dirname -- "$0")/.." && pwd) out=$1 end=$((SECONDS + ${2:-570})) work=${WORK:-/tmp/search}
python=${PYTHON:-python}; export PYTHON=$python OMP_NUM_THREADS=1
mkdir -p "$work" "$out"
[ "${PRETRAIN:-cuda}" = cuda ] || export CUDA_VISIBLE_DEVICES=""
while IFS='|' read -r name kind changes; do
  case $name in ''|\#*) continue ;; esac
  [ -f "$work/$name/$kind.json" ] || "$python" "$here/bench/recipe.py" make "$work/$name" "$kind" "$changes" >"$work/$name.log" 2>&1 &
done <"$here/bench/models.txt"
wait
echo "models: $SECONDS s"
pids=()
while IFS='|' read -r name teacher student seed; do
  case $name in ''|\#*) continue ;; esac
  mkdir -p "$work/$name"
  cp -rn "$work/$teacher/tiny-teacher" "$work/$teacher/teacher.json" "$work/$name/"
  cp -rn "$work/$student/tiny-student-base" "$work/$student/student-base.json" "$work/$name/"
  setsid timeout -k 5 $((end - SECONDS)) bash "$here/bench/recipe.sh" "$work/$name" "" "" "${seed:-0}" & pids+=($!)
done <"$here/bench/recipes.txt"
wait "${pids[@]}"
echo "recipes: $SECONDS s"
for name in "$work"/*/; do PYTHON=$python "$python" "$here/bench/recipe.py" summary "${name%/}" >"${name}line.txt" 2>/dev/null & done; wait
tar -C "$work" -czf "$out/recipes.tgz" --exclude=work --exclude=resume --exclude='*.jsonl' $(cd "$work" && ls -d */log */*.json */line.txt */tiny-* 2>/dev/null)
cat "$work"/*/line.txt
