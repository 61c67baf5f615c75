#!/usr/bin/env bash
# One node's part of a run on several nodes, under the deepspeed launcher and without ssh. Start it on every node, from
# the repository's root, with the same words but for NUMBER; they wait for each other.
#
#     launch/nodes/node.sh HOSTFILE NUMBER launch/grpo.py --config configs/wan/grpo.yaml run_dir=/shared/run a.b=c ...
#
# HOSTFILE  as launch/nodes/hostfile, the same on every node
# NUMBER    this node's line in it, from 0
#
# Environment:
#   MASTER_PORT          a free port of node 0 (29500)
#   GLOO_SOCKET_IFNAME   the interface between the nodes; unset: the one that leads to node 0
#   NCCL_SOCKET_IFNAME   the same for NCCL, which chooses by itself
#
# Asked to stop (SIGTERM, SIGINT, SIGHUP or SIGUSR1 to this script, on any node), the run finishes its step, saves and
# ends on all nodes; asked again by anything but SIGUSR1, this node ends at once. The exit code is 0 only when the run is
# done.
set -euo pipefail

if (($# < 3)); then
    echo "usage: $0 HOSTFILE NUMBER SCRIPT [WORD ...]" >&2
    exit 2
fi
hostfile=$1 number=$2
shift 2
port=${MASTER_PORT:-29500}

# deepspeed itself trains on this machine alone when there is no such file
[[ -r $hostfile ]] || { echo "$0: $hostfile cannot be read" >&2; exit 2; }
[[ $number =~ ^[0-9]+$ ]] || { echo "$0: NUMBER must be 0, 1, ..., got '$number'" >&2; exit 2; }
[[ -f $1 ]] || { echo "$0: $1 is not there; start it from the repository's root" >&2; exit 2; }
command -v deepspeed >/dev/null || { echo "$0: deepspeed is not on the PATH; activate the environment" >&2; exit 2; }
lines=$(grep -cvE '^[[:space:]]*(#|$)' "$hostfile" || true)
((number < lines)) || { echo "$0: $hostfile has $lines lines with hosts, none of NUMBER $number" >&2; exit 2; }
# given here, because deepspeed would ask node 0 for it by ssh
master=$(awk '!/^[[:space:]]*(#|$)/ { print $1; exit }' "$hostfile")

# The launcher does not pass on SIGTERM well: its outer process dies of it, its inner one kills the ranks after 30
# seconds. So the job is a process group of its own, in which all but the ranks ignore SIGUSR1.
set -m
(
    trap '' USR1
    exec deepspeed --hostfile "$hostfile" --no_ssh --node_rank "$number" \
        --master_addr "$master" --master_port "$port" "$@"
) &
job=$!

signalled=0 asked=0
ask() {
    signalled=1
    if [[ $1 == again ]] && ((asked)); then
        kill -TERM -- "-$job" 2>/dev/null || true
    else
        asked=1
        kill -USR1 -- "-$job" 2>/dev/null || true
    fi
}
trap 'ask once' USR1
trap 'ask again' TERM INT HUP

while :; do
    signalled=0 code=0
    wait "$job" || code=$?
    ((signalled)) || break # else it was the signal that ended the wait
done
# killed itself, for want of memory, say, the launcher leaves ranks behind, and deepspeed ends with 0
if pgrep -g "$job" -f -- --local_rank= >/dev/null 2>&1; then
    echo "$0: the launcher is gone, its ranks are not: they are asked to stop" >&2
    kill -USR1 -- "-$job" 2>/dev/null || true
    exit 1
fi
exit "$code"
