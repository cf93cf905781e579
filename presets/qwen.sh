# A 0.5B student and a 7B teacher.
: "${TEACHER:=$models/Qwen2.5-7B-Instruct}" "${STUDENT:=$models/Qwen2.5-0.5B-Instruct}" "${hub:=Qwen}"
: "${needs:=a GPU of 24 GB, 52 GB disk with the weights, 7 h (computed, not measured)}"
: "${batch_size:=128}" "${micro_tokens:=1024}"
source "$here/presets/_real.sh"
