#!/usr/bin/env bash
# Runs once, when Gradescope builds the autograder's image; the zip's contents are in /autograder/source.
set -euo pipefail
apt-get update
apt-get install -y python3.11-venv || apt-get install -y python3-venv # older images have a Python that is too old
"$(command -v python3.11 || command -v python3)" -m venv /opt/venv
/opt/venv/bin/pip install -r /autograder/source/requirements.txt
