#!/usr/bin/env bash
# TPU slices on GKE through xpk, which starts the line on every host of every slice.
#
#   bash launch/templates/xpk.sh
#
# IMAGE holds the repository and its environment, with the repository as its working directory. --max-restarts
# starts the line again after a slice was taken away; it goes on from its bundle.
set -euo pipefail

xpk workload create \
  --cluster=CLUSTER \
  --workload=fundus \
  --tpu-type=v5litepod-16 \
  --num-slices=1 \
  --docker-image=IMAGE \
  --max-restarts=50 \
  --command="exec python launch/run.py --config=CONFIG --mesh=MESH --workdir=WORKDIR"
