#!/bin/bash
# Trains a run on the GPUs of this machine.
#
#   launch/local.sh my.toml [section.key=value ...]
#
# After the first Ctrl-C the run finishes its step and saves. Start it again to resume.
set -euo pipefail
if [ $# = 0 ]; then echo "usage: launch/local.sh RUN.toml [section.key=value ...]" >&2; exit 2; fi
exec sorted-ds train "$@"
