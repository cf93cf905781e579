# QUICK=1: read before the preset, so that these numbers stand.
: "${held_out:=0.3}" "${best_of:=2}" "${student_samples:=2}"
if [ "$PRESET" = tiny ]; then
  : "${needs:=about a minute}" "${train:=60}" "${valid:=10}" "${test:=50}"
  : "${iterations:=2}" "${rollout_size:=32}" "${eval_every:=20}"
else
  : "${train:=16}" "${valid:=2}" "${test:=4}" "${teacher_samples:=2}" "${max_new_tokens:=256}"
  : "${iterations:=1}" "${rollout_size:=8}" "${minibatches:=2}" "${eval_every:=20}" "${ppo_lr:=1e-6}"
fi
