# How train_all.sh runs its stages: the preset's numbers, one run folder, ranks, signals. Sourced by train_all.sh and
# bench/ablate.sh; `here` is the project's folder. Works from bash 3.2 on, whose empty arrays count as unset.

refuse() { echo "error: $1" >&2; exit 2; }
must() { [[ ${!1} =~ $2 ]] || refuse "$1=${!1}: $3"; } # must NAME PATTERN WHAT-IT-SHOULD-BE
switch() { if [ "${!1}" = 1 ]; then echo "--$1"; else echo "--no-$1"; fi; } # switch NAME: the flag of a 1 or 0

# ---- settings: the environment before QUICK before the preset -------------------------------------------------------
hub="" needs="" # where the preset's models are published, and what it takes: not for the environment to say
set_ones() { # set_ones NAME...: those that the caller has set, as NAME=VALUE words of a shell
  local name
  for name in "$@"; do [ -z "${!name:-}" ] || printf '%s=%q ' "$name" "${!name}"; done
}
changed=$(set_ones $(grep -oh '"\${[a-z_]*:=' "$here"/presets/*.sh | tr -d '"${:=' | sort -u))
asked=$(set_ones PRESET SEED QUICK NPROC PRECISION ROUNDS TEACHER TEACHER_TEST STUDENT QUESTIONS MODELS_DIR DATA_DIR)
: "${PRESET:=tiny}" "${SEED:=0}" "${QUICK:=0}" "${NPROC:=1}" "${ROUNDS:=1}" "${FROM:=}"
PYTHON=${PYTHON:-$(command -v python || echo python3)} models=${MODELS_DIR:-$here/models}

if ! [[ $PRESET =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ && -f $here/presets/$PRESET.sh ]]; then
  presets=$(cd -- "$here/presets" && printf ' %s' [!_]*.sh)
  refuse "PRESET=$PRESET: there is no such file in presets/, which has${presets//.sh/}"
fi
if [ "$QUICK" = 1 ]; then source "$here/presets/_quick.sh"; fi
source "$here/presets/$PRESET.sh"

must SEED '^[0-9]{1,9}$' "a number of up to nine digits"
must NPROC '^[1-9][0-9]*$' "how many ranks, 1 or more"
must ROUNDS '^[1-9]$' "a number from 1 to 9"
for name in train valid test teacher_samples student_samples best_of max_new_tokens sft_per_question sft_epochs \
  reward_epochs iterations rollout_size minibatches eval_every pairs_per_question train_batch batch_size micro_tokens; do
  must "$name" '^[1-9][0-9]*$' "a whole number, 1 or greater"
done
must lora '^[0-9]+$' "a rank, a whole number; 0: all weights learn"
for name in temperature sft_lr reward_lr ppo_lr critic_lr kl_coef min_share held_out; do
  must "$name" '^[0-9]*\.?[0-9]+(e-?[0-9]+)?$' "a number, 0 or greater"
done
for name in lenient keep_duplicates zero_values gradient_checkpointing; do must "$name" '^[01]$' "1 or 0"; done

# ---- signals: a stage hears of one once, from here, and saves its state before this ends ----------------------------
export CONTINUE="${CONTINUE:-$asked$changed${OUT:+OUT=$(printf %q "$OUT") }bash $(printf %q "$0")}" # what goes on after that
child=""
work() { # work COMMAND...: in a process group of its own, which a terminal's Ctrl-C does not reach
  set -m; "$@" & child=$!; set +m
  wait "$child"
  child=""
}
stopped() { # stopped CODE
  if [ -n "$child" ]; then
    trap 'kill -s TERM -- "-$child"' INT TERM HUP # again: it stops at once
    kill -s TERM -- "-$child" 2>/dev/null || true # INT would show where in its imports a stage has been
    while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done
  fi
  echo "stopped; what is finished or saved is kept, and this goes on from there: $CONTINUE" >&2
  exit "$1"
}
trap 'stopped 130' INT; trap 'stopped 143' TERM; trap 'stopped 129' HUP

# ---- a run and its stages -------------------------------------------------------------------------------------------
run_folder() { # run_folder DEFAULT: sets RUN, checked, and locked until this script and its stages have ended
  RUN=${OUT:-$here/$1$([ "$QUICK" != 1 ] || echo -quick)}
  PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH} "$PYTHON" -m runtime.preflight --run "$RUN" --preset "$PRESET" \
    --seed "$SEED" --changed "$changed" --needs "$needs" --hub "$hub" --nproc "$NPROC" --questions "$QUESTIONS" \
    --rounds "$ROUNDS" --teacher "$TEACHER" --teacher_test "${TEACHER_TEST:-}" --student "$STUDENT" \
    --max_new_tokens "$max_new_tokens" --batch_size "$batch_size" --micro_tokens "$micro_tokens" --lora "$lora" \
    "$(switch gradient_checkpointing)"
  [ -z "$FROM" ] || [ -e "$RUN/$FROM" ] || refuse "FROM=$FROM: $RUN has no such stage"
  mkdir -p "$RUN" && exec 9<"$RUN"
  if command -v flock >/dev/null && ! flock -n 9; then
    refuse "OUT=$RUN: another train_all.sh is at work there; wait for it, or choose another OUT"
  fi
  { # for the report
    echo "$asked${changed}bash train_all.sh"
    git -C "$here" describe --always --dirty --exclude '*' 2>/dev/null | sed 's/^/git commit /' || true
  } >"$RUN/command.txt"
}
stages=$((6 + 4 * ROUNDS)) place=0 # of train_all.sh; an experiment has more
if [ -d "$TEACHER" ]; then stages=$((stages + 1)); fi
case $QUESTIONS in arith | mawps) stages=$((stages + 1)) ;; esac # they have harder ones
heading() { # heading STAGE: which of how many, what it does, and the time since the start
  local what number=$((place += 1))
  case $1 in
    0_questions) what="to learn from, to watch, to test" ;;
    1_teacher*) what="the teacher answers, several times each" ;;
    1_vote*) what="its answers vote; the winners will teach" ;;
    2_sft*) what="the student learns the winning answers" ;;
    3_student*) what="the student answers, several times each" ;;
    4_pseudo_reward*) what="the vote rewards the student's answers" ;;
    5_reward*) what="learns from pairs which answer is better" ;;
    6_ppo*raw*) what="PPO again, rewarded by the vote itself" ;;
    6_ppo*) what="PPO makes answers of a high score likelier" ;;
    7_eval/test) what="all answer questions that none has seen" ;;
    7_eval/best_of_n) what="the reward model picks one of several answers" ;;
    7_eval/hard) what="harder questions than those to learn from" ;;
    *) what="" ;;
  esac
  if [ "$place" -le "$stages" ]; then number+=/$stages; fi
  printf '[%s] %s%s (%d:%02d)\n' "$number" "$1" "${what:+: $what}" $((SECONDS / 60)) $((SECONDS % 60))
}

launch=("$PYTHON") redo=0 seed=$SEED
if [ "$NPROC" != 1 ]; then launch+=("$here/runtime/ranks.py" "$NPROC"); fi # torchrun
run() { # run STAGE SCRIPT FLAGS...: one stage, into its folder of the run, with the flags that its script always gets
  local stage=$1 script=$2 old=1 flags
  flags=(--out "$RUN/$stage")
  case $script in data.py | generate.py | pseudo_reward.py | sft.py | reward.py | ppo.py | eval.py) ;;
    *) refuse "$script: say in runtime/stages.sh which flags it always gets" ;;
  esac
  case $script in generate.py | pseudo_reward.py | sft.py | reward.py | ppo.py) flags+=(--seed "$seed") ;; esac
  case $script in generate.py | ppo.py | eval.py) flags+=(--batch_size "$batch_size") ;; esac # answers sampled at once
  case $script in sft.py | reward.py | ppo.py)
    flags+=(--lora "$lora" --micro_tokens "$micro_tokens" "$(switch gradient_checkpointing)") ;;
  esac
  case $script in
    sft.py | reward.py) flags+=(--batch_size "$train_batch") ;; # of an optimiser step
    pseudo_reward.py) flags+=(--pairs_per_question "$pairs_per_question") ;;
  esac
  if [ "$FROM" = "$stage" ]; then redo=1; fi
  if [ "$redo" = 1 ] && [ -e "$RUN/$stage" ]; then
    while [ -e "$RUN/$stage.old$old" ]; do old=$((old + 1)); done
    mv "$RUN/$stage" "$RUN/$stage.old$old"
  fi
  heading "$stage"
  work "${launch[@]}" "$here/$script" "${flags[@]}" "${@:3}"
}
report() { # report [FLAGS]: its page, or what a flag asks for
  if [ "$QUICK" = 1 ]; then set -- --quick "$@"; fi
  work "$PYTHON" "$here/report.py" "$RUN" --preset "$PRESET" --seed "$SEED" "$@"
}
