# A 135M student and a 1.7B teacher.
: "${TEACHER:=$models/SmolLM2-1.7B-Instruct}" "${STUDENT:=$models/SmolLM2-135M-Instruct}" "${hub:=HuggingFaceTB}"
: "${needs:=a GPU of 8 GB, 14 GB disk with the weights, 4 h (computed, not measured)}"
: "${batch_size:=64}" "${micro_tokens:=1024}"
[ "${lora:=0}" != 0 ] || : "${ppo_lr:=2e-6}"
source "$here/presets/_real.sh"
