#!/usr/bin/env bash
# One host of a training under torchrun; the same command on each host.
#
#   NNODES=2 RANKS_PER_NODE=8 MEETING=node-1:29500 node.sh PROGRAM [ARGUMENTS]
#
# MEETING is the first host and a port of it; RUN_ID (the folder's name by default) tells runs that meet there apart.
# LOCAL_ADDR is this host's address, where its own name leads to 127.0.1.1.
set -eu
: "${NNODES:?} ${RANKS_PER_NODE:?} ${MEETING:?}"

# Without it, ranks that torchrun starts again find the addresses of their predecessors in the store that all tries share,
# and wait for them for ever (seen with torch 2.11: pytorch/pytorch issue 135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

exec "$(dirname "$0")/../restart.sh" torchrun --nnodes "$NNODES" --nproc_per_node "$RANKS_PER_NODE" \
  --rdzv_backend c10d --rdzv_endpoint "$MEETING" --rdzv_id "${RUN_ID:-$(basename "$PWD")}" \
  ${LOCAL_ADDR:+--local_addr "$LOCAL_ADDR"} --max_restarts "${MAX_RESTARTS:-3}" "$@"
