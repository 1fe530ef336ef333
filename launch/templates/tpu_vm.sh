#!/usr/bin/env bash
# A TPU VM slice without Kubernetes: the line on all of its hosts, over ssh.
#
#   bash launch/templates/tpu_vm.sh
#
# Every host has the repository at REPOSITORY, the environment in it, and WORKDIR from a shared file system. When
# Google takes the slice away, its system sends SIGTERM; the same command on the next slice goes on.
set -euo pipefail

gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all --command="
  cd REPOSITORY && source .venv-tpu/bin/activate &&
  exec python launch/run.py --config=CONFIG --mesh=MESH --workdir=WORKDIR --multihost=tpu
"
