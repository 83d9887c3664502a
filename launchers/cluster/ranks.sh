#!/usr/bin/env bash
# Starts the ranks of one node without any other launcher: forwards signals to them, returns their exit code.
#
#   NODE_RANK=0 NUM_NODES=2 RANKS_PER_NODE=8 MASTER_ADDR=node-0 ranks.sh python launchers/pretrain.py ...
#
# For containers, where this is process 1. There, torchrun turns every exit code into 1, and `deepspeed` does not hear
# SIGTERM; a scheduler needs both. When one rank fails, the others get GRACE_SECONDS to follow before they are killed.
# Exit code: the first failing rank's, 0 where all are done. Needs bash 5.1.
set -uo pipefail

: "${NODE_RANK:=0}" "${NUM_NODES:=1}" "${RANKS_PER_NODE:?how many ranks this node runs, one per GPU}"
: "${GRACE_SECONDS:=60}"
export MASTER_ADDR=${MASTER_ADDR:-127.0.0.1} MASTER_PORT=${MASTER_PORT:-29500}
export WORLD_SIZE=$((NUM_NODES * RANKS_PER_NODE))

ranks=()
forward() { kill -s "$1" "${ranks[@]}" 2> /dev/null; }
trap 'forward TERM' TERM
trap 'forward USR1' USR1
trap 'forward INT' INT

for ((local_rank = 0; local_rank < RANKS_PER_NODE; local_rank++)); do
    RANK=$((NODE_RANK * RANKS_PER_NODE + local_rank)) LOCAL_RANK=$local_rank "$@" &
    ranks+=($!)
done

code=0 killer=
while [ ${#ranks[@]} -gt 0 ]; do
    ended=
    wait -n -p ended "${ranks[@]}"
    status=$?
    [ -n "${ended:-}" ] || continue # a signal ended the wait, not a rank
    left=()
    for rank in "${ranks[@]}"; do
        [ "$rank" = "$ended" ] || left+=("$rank")
    done
    ranks=("${left[@]}")
    if [ $status -ne 0 ] && [ $code -eq 0 ]; then
        code=$status
        if [ ${#ranks[@]} -gt 0 ]; then
            (trap - TERM USR1 INT; sleep "$GRACE_SECONDS"; kill -KILL "${ranks[@]}" 2> /dev/null) &
            killer=$!
        fi
    fi
done
[ -z "$killer" ] || kill "$killer" 2> /dev/null
exit $code
