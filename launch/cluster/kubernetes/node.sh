#!/usr/bin/env bash
# One node of a training on Kubernetes: the deepspeed launcher without ssh, for this node's ranks.
#
#   node.sh PROGRAM [ARGUMENTS]        e.g. node.sh launch/train.py --config configs/tpavi_ms3.yaml
#
# Reads what Kubeflow Trainer sets (PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR, PET_MASTER_PORT) and GPUS_PER_NODE.
# The exit code is that of the training: 75 when it was preempted and has saved. (torchrun would make it 1.)
set -eu
: "${PET_NNODES:?} ${PET_NODE_RANK:?} ${PET_MASTER_ADDR:?} ${PET_MASTER_PORT:?} ${GPUS_PER_NODE:?}"

# the names are not looked up with --no_ssh; the launcher only counts them
hosts=$(mktemp)
for ((node = 0; node < PET_NNODES; node++)); do
  echo "node-$node slots=$GPUS_PER_NODE"
done >"$hosts"

# restart.sh with one try: as the first process of a container it hands SIGTERM on to all ranks and waits for them
exec "$(dirname "$0")/../restart.sh" -n 1 -p deepspeed --hostfile "$hosts" --no_ssh --node_rank "$PET_NODE_RANK" \
  --master_addr "$PET_MASTER_ADDR" --master_port "$PET_MASTER_PORT" "$@"
