# What the presets with real models and real questions share.
: "${QUESTIONS:=gsm8k}" "${train:=7000}" "${valid:=200}" "${test:=1319}" "${instruction:=auto}"
: "${teacher_samples:=4}" "${temperatures:=0.7,1.0}" "${student_samples:=4}" "${temperature:=1.0}"
: "${max_new_tokens:=320}" "${best_of:=8}"
if [ "${lora:=0}" != 0 ]; then # adapters learn (lora.py), and want ten times the rates
  : "${sft_lr:=1e-4}" "${reward_lr:=1e-4}" "${ppo_lr:=1e-5}" "${critic_lr:=5e-5}"
fi
: "${keep_duplicates:=0}" "${sft_per_question:=4}" "${sft_epochs:=2}" "${sft_lr:=1e-5}" "${train_batch:=64}"
: "${min_share:=0}" "${pairs_per_question:=4}" "${held_out:=0.05}" "${reward_epochs:=1}" "${reward_lr:=1e-5}"
: "${iterations:=150}" "${rollout_size:=256}" "${minibatches:=4}" "${eval_every:=15}"
: "${ppo_lr:=1e-6}" "${critic_lr:=5e-6}" "${kl_coef:=0.05}"
: "${zero_values:=1}" # a reward model is trained at the end token; what it says before is no value
: "${gradient_checkpointing:=0}"
case $QUESTIONS in *mmlu_pro*) : "${lenient:=0}" ;; esac # a lone letter is too often the pronoun I
: "${lenient:=1}"
