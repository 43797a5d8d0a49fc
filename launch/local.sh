#!/bin/bash
# A run on the GPUs of this machine.
#
#   launch/local.sh my.toml [section.key=value ...]
#
# The first Ctrl-C ends the step and saves; start it again to go on.
set -euo pipefail
if [ $# = 0 ]; then echo "usage: launch/local.sh RUN.toml [section.key=value ...]" >&2; exit 2; fi
exec sorted-ds train "$@"
