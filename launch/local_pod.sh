#!/usr/bin/env bash
# Runs srlm as N processes of M CPU devices each on this machine: what a TPU pod does, without one. Where a process is
# lost, all are started again, and the run goes on where it was.
#
#   launch/local_pod.sh                       2 processes of 4 devices, the smoke variant of the tiny world in runs/pod
#   launch/local_pod.sh N M ARGUMENT…         arguments of srlm: all --config=configs/tiny.py --workdir=runs/tiny
#
# LOGS (default runs/logs/pod) gets each process's log, and pids, RETRIES (3) is how often all are started again at the
# most. Exit codes: 0 done, 75 given up after RETRIES or told to stop (SIGTERM), 130 interrupted, else the program's own.
set -euo pipefail
cd "$(dirname "$0")/.."

if (($# == 0)); then
  set -- 2 4 all --config=configs/tiny.py:smoke --workdir=runs/pod
fi
if [[ ! ${1:-} =~ ^[1-9][0-9]*$ || ! ${2:-} =~ ^[1-9][0-9]*$ ]]; then
  echo "launch/local_pod.sh: give the number of processes and of devices of each, then srlm's arguments." >&2
  exit 2
fi
processes=$1 devices=$2
shift 2
venv=${VENV:-.venv} logs=${LOGS:-runs/logs/pod}
[[ -x $venv/bin/srlm ]] || launch/setup.sh
mkdir -p "$logs"

export JAX_PLATFORMS=cpu JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo SRLM_PROCESSES=$processes
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices" # The last of two counts.
# A collective blocks a thread of XLA's until its peers are there: with as few threads as cores none would be left.
export NPROC=${NPROC:-$((4 * devices))}
export SRLM_SILENT_SECONDS=${SRLM_SILENT_SECONDS:-60}

pids=()
end() {
  local until=$((SECONDS + ${SRLM_GRACE_SECONDS:-20} + 5))
  kill -TERM "${pids[@]}" 2>/dev/null || true
  while ((SECONDS < until)) && kill -0 "${pids[@]}" 2>/dev/null; do
    sleep 0.2
  done
  kill -KILL "${pids[@]}" 2>/dev/null || true # A stopped one does not take the other.
}
trap 'end; exit 130' INT
trap 'end; exit 75' TERM

# Starts all processes and waits for them; `code` becomes the first that is not 0. The others, of no use then, have
# twenty seconds to say why they end.
run() {
  local port number pid alive left failed
  port=$("$venv/bin/python" -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')
  export SRLM_COORDINATOR=127.0.0.1:$port
  pids=() code=0
  for ((number = 0; number < processes; number++)); do
    if ((number == 0)); then # It speaks for all.
      SRLM_PROCESS=0 "$venv/bin/srlm" "$@" > >(tee -a "$logs/0.log") 2>&1 </dev/null &
    else
      SRLM_PROCESS=$number "$venv/bin/srlm" "$@" >>"$logs/$number.log" 2>&1 </dev/null &
    fi
    pids+=($!)
  done
  echo "${pids[@]}" >"$logs/pids"
  alive=("${pids[@]}")
  while ((${#alive[@]})); do
    sleep 0.5
    left=()
    for pid in "${alive[@]}"; do
      if kill -0 "$pid" 2>/dev/null; then
        left+=("$pid")
      elif ((code == 0)); then
        wait "$pid" || code=$?
        failed=$SECONDS
      fi
    done
    if ((code && SECONDS - failed > 20)); then
      kill -KILL ${left[@]+"${left[@]}"} 2>/dev/null || true
    fi
    alive=(${left[@]+"${left[@]}"})
  done
}

for ((try = 0; ; try++)); do
  run "$@"
  if ((code != 75 && code < 128)); then # Done, or an error that would come again.
    exit "$code"
  fi
  if ((try == ${RETRIES:-3})); then
    echo "launch/local_pod.sh: a process was lost again (exit code $code) after ${try} new starts; see $logs." >&2
    exit 75
  fi
  echo "launch/local_pod.sh: a process was lost (exit code $code): all are started again, ${try} of ${RETRIES:-3} before." >&2
done
