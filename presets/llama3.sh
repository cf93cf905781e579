# The paper's sizes: an 8B teacher, a 1B or 3B student.
: "${TEACHER:=$models/Llama-3.1-8B-Instruct}" "${STUDENT:=$models/Llama-3.2-1B-Instruct}" "${hub:=meta-llama}"
: "${needs:=a GPU of 80 GB (24 GB: docs/running.md), 110 GB disk with the weights, 25 h for the 1B student \
(computed, not measured); a 3B student needs 130 GB of GPU memory}"
: "${batch_size:=256}" "${micro_tokens:=2048}"
source "$here/presets/_real.sh"
