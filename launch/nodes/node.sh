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
# At SIGTERM, SIGINT, SIGHUP or SIGUSR1 to this script, on any node, the run finishes its step, saves and ends on all
# nodes; a second SIGTERM or SIGINT ends this node immediately. Under nohup SIGHUP stays ignored. The exit code is 0 only
# when the run is done.
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

# The launchers die of these signals, or kill the ranks after 30 seconds. So the job is a process group of its own, in
# which all but the ranks ignore SIGUSR1. The traps come first: the job may be asked to stop before this line is passed.
signalled=0 asked=0 job=''
ask() {
    signalled=1
    if [[ $1 == again ]] && ((asked)) && [[ $job ]]; then
        kill -TERM -- "-$job" 2>/dev/null || true
        return
    fi
    asked=1
    [[ -z $job ]] || kill -USR1 -- "-$job" 2>/dev/null || true
}
trap 'ask once' USR1
trap 'ask again' TERM INT HUP

set -m
(
    trap '' USR1
    exec deepspeed --hostfile "$hostfile" --no_ssh --node_rank "$number" \
        --master_addr "$master" --master_port "$port" "$@"
) &
job=$!
# a signal that came before there was a job
((!asked)) || kill -USR1 -- "-$job" 2>/dev/null || true

while :; do
    signalled=0 code=0
    wait "$job" || code=$?
    ((signalled)) || break # else it was the signal that ended the wait
done
# killed itself, for want of memory, say, the launcher leaves ranks behind, which finish their step, and deepspeed ends
# with 0
if pgrep -g "$job" -f -- --local_rank= >/dev/null 2>&1; then
    echo "$0: the launcher is gone, its ranks are not: they are asked to stop" >&2
    kill -USR1 -- "-$job" 2>/dev/null || true
    while pgrep -g "$job" -f -- --local_rank= >/dev/null 2>&1; do sleep 1; done
    exit 1
fi
exit "$code"
