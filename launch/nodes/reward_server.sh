#!/usr/bin/env bash
# A reward server on a host of its own, for a run on others. From the repository's root, with the environment active, by
# hand or by sbatch (--gpus-per-node=1 --time=24:00:00 launch/nodes/reward_server.sh ...):
#
#     export REWARD_SERVER_TOKEN=$(openssl rand -hex 32)      # the same here and where the run is started
#     launch/nodes/reward_server.sh --config configs/wan/serve.yaml rewards.descore.checkpoint=/shared/descore
#
# and, on the nodes of the run, with the address that it says:
#
#     rewards.descore.url=http://HOST:8900
#
# Environment:
#   REWARD_SERVER_TOKEN   needed: any host but loopback is reached by others. It travels unencrypted
#   REWARD_SERVER_HOST    the address to listen on (0.0.0.0: every interface of this host)
#   REWARD_SERVER_PORT    (8900)
#
#SBATCH --job-name=reward-server
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --output=slurm-%j.out
set -euo pipefail

: "${REWARD_SERVER_TOKEN:?is not set: any secret of at least 16 characters, the same here and on the nodes of the run}"
((${#REWARD_SERVER_TOKEN} >= 16)) || { echo "REWARD_SERVER_TOKEN has fewer than 16 characters" >&2; exit 2; }
cd "${SLURM_SUBMIT_DIR:-$PWD}"
[[ -f launch/serve.py ]] || { echo "start it from the repository's root, not from $PWD" >&2; exit 2; }

host=${REWARD_SERVER_HOST:-0.0.0.0} port=${REWARD_SERVER_PORT:-8900}
shown=$host
[[ $host != 0.0.0.0 ]] || shown=$(hostname -f 2>/dev/null || hostname)
echo "rewards.remote.url=http://$shown:$port"
exec python launch/serve.py "$@" "host=$host" "port=$port"
