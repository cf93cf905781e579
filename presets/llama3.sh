# The paper's sizes on one GPU of 24 GB: an 8B teacher, and a 3B student of which adapters alone learn (lora.py).
: "${TEACHER:=$models/Llama-3.1-8B-Instruct}" "${STUDENT:=$models/Llama-3.2-3B-Instruct}" "${hub:=meta-llama}"
: "${needs:=a GPU of 24 GB, 65 GB disk with the weights, a day or two (computed, not measured); all weights of the 1B \
student, in 80 GB: docs/running.md}"
: "${lora:=16}" "${batch_size:=48}" "${micro_tokens:=1024}"
source "$here/presets/_real.sh"
