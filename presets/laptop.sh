# A real 135M student, the recorded answers of a real 0.5B teacher, one-step word problems: a laptop. The student writes
# a calculation ('8 - 4'), so an answer is ten tokens, and adapters alone learn (lora.py): half the time and memory of
# all weights, and no fewer right answers. Measured in results/mawps-smollm2.
: "${TEACHER:=$here/results/mawps-teacher/calculations-train.jsonl.gz}" "${STUDENT:=$models/SmolLM2-135M-Instruct}"
: "${TEACHER_TEST:=$here/results/mawps-teacher/calculations-test.jsonl.gz}" "${hub:=HuggingFaceTB}" "${QUESTIONS:=mawps}"
: "${needs:=a laptop, 5 GB of memory, about 1.5 h on one core with PRECISION=bf16}"
: "${train:=1277}" "${valid:=48}" "${test:=399}" "${lenient:=0}"
: "${student_samples:=8}" "${temperature:=1.0}" "${max_new_tokens:=32}" "${best_of:=4}"
: "${sft_per_question:=1}" "${sft_epochs:=2}" "${train_batch:=16}"
: "${min_share:=0.5}" "${held_out:=0.1}" "${pairs_per_question:=2}"
: "${iterations:=14}" "${rollout_size:=128}" "${minibatches:=4}" "${eval_every:=7}"
if [ "${lora:=16}" = 0 ]; then # all weights learn, and want smaller rates
  : "${sft_lr:=3e-4}" "${reward_lr:=1e-4}" "${ppo_lr:=1e-4}" "${critic_lr:=3e-4}"
fi
: "${sft_lr:=1e-3}" "${reward_lr:=1e-3}" "${ppo_lr:=4e-4}" "${critic_lr:=2e-3}"
: "${batch_size:=128}" "${micro_tokens:=768}"
source "$here/presets/_real.sh"
