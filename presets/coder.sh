# An hour on one large GPU: a 0.5B student and a 1.5B teacher, both small enough to be fast, and 2,000 questions.
: "${TEACHER:=$models/Qwen2.5-Coder-1.5B-Instruct}" "${STUDENT:=$models/Qwen2.5-Coder-0.5B-Instruct}" "${hub:=Qwen}"
: "${needs:=a GPU of 40 GB, 50 GB disk with the weights, 45 minutes on an H100 (computed, not measured)}"
: "${train:=2000}" "${valid:=100}" "${temperatures:=0.7}" "${iterations:=90}" "${eval_every:=10}"
: "${batch_size:=512}" "${micro_tokens:=8192}"
source "$here/presets/_real.sh"
