#!/usr/bin/env bash
# TPU slices on GKE through xpk, which starts the line on every host of every slice.
#
#   bash launch/templates/xpk.sh
#
# IMAGE holds the repository and its environment, with the repository as its working directory. xpk starts the line
# again at exit codes from 127, so also at 143, where it was asked to stop; here at 1 too, with which a host leaves
# that has lost the others or a model server. It goes on from its bundle. At 78 something has to be changed first.
set -euo pipefail

xpk workload create \
  --cluster=CLUSTER \
  --workload=fundus \
  --tpu-type=v5litepod-16 \
  --num-slices=1 \
  --docker-image=IMAGE \
  --max-restarts=50 \
  --restart-on-exit-codes=1 \
  --command="exec python launch/run.py --config=CONFIG --mesh=MESH --workdir=WORKDIR"
