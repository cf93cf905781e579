# Two bundled models and built-in word problems: a laptop, about 7 minutes on one core.
: "${TEACHER:=$here/weights/tiny-teacher}" "${STUDENT:=$here/weights/tiny-student-base}" "${QUESTIONS:=arith}"
: "${needs:=a laptop and about 7 minutes on one core}"
: "${train:=2000}" "${valid:=200}" "${test:=1000}" "${instruction:=}" "${lenient:=0}"
: "${teacher_samples:=8}" "${temperatures:=1.0}" # variety for the vote
: "${student_samples:=4}" "${temperature:=0.7}"  # near its greedy self
: "${max_new_tokens:=96}" "${best_of:=8}"
: "${keep_duplicates:=1}" "${sft_per_question:=2}" "${sft_epochs:=2}" "${sft_lr:=5e-4}" "${train_batch:=64}"
: "${min_share:=0.3}" "${pairs_per_question:=4}" "${held_out:=0.1}" "${reward_epochs:=2}" "${reward_lr:=1e-3}"
: "${iterations:=20}" "${rollout_size:=128}" "${minibatches:=4}" "${eval_every:=4}"
if [ "${lora:=0}" != 0 ]; then : "${ppo_lr:=8e-4}" "${critic_lr:=2e-3}"; fi # adapters learn, and move less at a rate
: "${ppo_lr:=2e-4}" "${critic_lr:=5e-4}" "${kl_coef:=0.1}" "${zero_values:=0}"
: "${batch_size:=512}" "${micro_tokens:=4096}" "${gradient_checkpointing:=0}" # memory alone
