#!/usr/bin/env bash
# A Ray head on this machine with dashboard and job server, in the foreground; Ctrl-C stops it.
#
#   cluster/local/head.sh              then, in another shell:
#   eval "$(cluster/local/head.sh --env)"
#   ray job submit --working-dir . -- python pipelines/unlearn.py pipelines/recipes/demo.yaml
#
# Token authentication is on: whoever may run jobs here needs the token file that --env points to.
set -euo pipefail
project="$(cd "$(dirname "$0")/../.." && pwd)"
dashboard_port="${DASHBOARD_PORT:-8265}"
port="${PORT:-6379}"
agent_port="${AGENT_PORT:-52365}" # must be free: the job server starts jobs through it
# The python on the PATH of this shell is the one that runs the jobs.
[ -x "$project/.venv/bin/ray" ] && export PATH="$project/.venv/bin:$PATH"
export RAY_AUTH_MODE=token
# `ray job stop` sends SIGTERM and this many seconds later kills: time to write a checkpoint. Ray's own default is 3.
export RAY_JOB_STOP_WAIT_TIME_S="${RAY_JOB_STOP_WAIT_TIME_S:-120}"
export RAY_AUTH_TOKEN_PATH="${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}"

if [ "${1:-}" = --env ]; then
    echo "export PATH='$PATH' RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH='$RAY_AUTH_TOKEN_PATH'"
    echo "export RAY_API_SERVER_ADDRESS=http://127.0.0.1:$dashboard_port"
    exit
fi
if [ ! -s "$RAY_AUTH_TOKEN_PATH" ]; then
    mkdir -p "$(dirname "$RAY_AUTH_TOKEN_PATH")"
    (umask 077 && python -c "import secrets; print(secrets.token_hex(32), end='')" >"$RAY_AUTH_TOKEN_PATH")
fi
umask 077 # logs of jobs and what Ray spills to disk hold texts, too
exec ray start --head --block --port="$port" --dashboard-host=127.0.0.1 --dashboard-port="$dashboard_port" \
    --dashboard-agent-listen-port="$agent_port" --min-worker-port=22000 --max-worker-port=22999 \
    --disable-usage-stats "$@"
