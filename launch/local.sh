#!/bin/bash
# A run on the GPUs of this machine: launch/local.sh my.toml [section.key=value ...]
# The first Ctrl-C ends the step and saves; start it again to go on.
set -euo pipefail
exec sorted-ds train "$@"
