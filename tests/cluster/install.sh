#!/bin/bash
# Installs what the tests of real launchers need, on Debian or Ubuntu, as root. Starts no service.
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive
if [ ! -e /usr/sbin/policy-rc.d ]; then
  printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d
  chmod +x /usr/sbin/policy-rc.d
  trap 'rm -f /usr/sbin/policy-rc.d' EXIT
fi
apt-get -o DPkg::Lock::Timeout=300 update -qq
apt-get -o DPkg::Lock::Timeout=300 install -y -qq --no-install-recommends \
  slurmctld slurmd slurm-client munge openssh-server openssh-client pdsh openmpi-bin mpich iproute2 util-linux procps
