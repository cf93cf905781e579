# A real 135M student, the recorded answers of a real 0.5B teacher, one-step word problems: a laptop. Each number is
# small because a core trains on a hundred tokens a second. Measured in results/mawps-smollm2, where PPO adds nothing.
: "${TEACHER:=$here/results/mawps-teacher/shots-train.jsonl.gz}" "${STUDENT:=$models/SmolLM2-135M-Instruct}"
: "${TEACHER_TEST:=$here/results/mawps-teacher/shots-test.jsonl.gz}" "${hub:=HuggingFaceTB}" "${QUESTIONS:=mawps}"
: "${needs:=a laptop, 9 GB of memory, 3 to 4 h on one core with PRECISION=bf16}"
: "${train:=600}" "${valid:=40}" "${test:=399}" "${lenient:=0}"
: "${student_samples:=2}" "${temperature:=0.7}" "${max_new_tokens:=96}" "${best_of:=4}"
: "${sft_per_question:=1}" "${sft_epochs:=1}" "${sft_lr:=3e-4}" "${train_batch:=16}"
: "${min_share:=0.5}" "${held_out:=0.15}" "${pairs_per_question:=2}" "${reward_lr:=1e-4}"
: "${iterations:=8}" "${rollout_size:=64}" "${eval_every:=4}"
: "${ppo_lr:=4e-5}" "${critic_lr:=8e-5}"
: "${batch_size:=128}" "${micro_tokens:=512}"
source "$here/presets/_real.sh"
