#!/usr/bin/env bash
# Where a learned reward pays: against the raw vote over iterations with teachers of different quality, and over the
# number of questions that have a vote.
#
#   TEACHERS="weak=models/weak good=models/good" bash bench/pays.sh   # each with its runs; pays.md draws them together
#   SEED=3 bash bench/pays.sh votes                                   # one run with the default teacher: fewer votes
#
# Environment: SEEDS ("0 1 2"), JOBS (2), TEACHERS (NAME=FOLDER ..., beside the preset's own), OUT (folder of the runs;
# that of bench/ablate.sh, whose runs count), RESULTS (folder of the page; OUT), VOTES ("20 50 100 400": how many
# questions), and what train_all.sh reads. What is finished is skipped.
[ -n "${BASH_VERSION:-}" ] || { echo "error: this is a script for bash: bash bench/pays.sh" >&2; exit 2; }
set -euo pipefail
