#!/usr/bin/env bash
# Runs once, when Gradescope builds the autograder's image; the zip's contents are in /autograder/source.
set -euo pipefail
apt-get update && apt-get install -y python3 python3-venv
python3 -m venv /opt/venv
/opt/venv/bin/pip install torch --index-url https://download.pytorch.org/whl/cpu
/opt/venv/bin/pip install -r /autograder/source/requirements.txt
