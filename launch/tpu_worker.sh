# The worker's side of launch/tpu.py, which copies this file to each TPU VM and calls it there. All it keeps is below
# ~/srlm: code/ and venv/, and in run/ the program's id, main, pid, log and exit code, and in gone how many of the log's
# bytes take no room any more. gcloud gives a command again when its connection drops, so every command here may run
# twice.

mkdir -p ~/srlm
cd ~/srlm

alive() {
  grep -qs srlm/run/main "/proc/$(cat run/pid 2>/dev/null || echo 0)/cmdline"
}

# probe: what is installed, and which program there is: alive, gone (no exit code), seen (its end is known), or its exit
# code.
probe() {
  echo "installed $(cat installed 2>/dev/null)"
  [[ -f run/id ]] || return 0
  state=$(cat run/exit 2>/dev/null) || state=gone
  if [[ -f run/seen ]]; then state=seen; elif alive; then state=alive; fi
  echo "run $(cat run/id) $state"
}

# install COMMIT UV PYTHON: unpacks ~/srlm_code.tar.gz and installs it with pinned versions. Images whose python3 is too
# old, or has no pins, get PYTHON by the package UV.
install() {
  set -euo pipefail
  exec 9>install.lock
  flock 9
  [[ $(cat installed 2>/dev/null) != "$1" ]] || return 0
  rm -rf code.new installed
  mkdir code.new
  tar -xzf ~/srlm_code.tar.gz -C code.new
  rm -rf code
  mv code.new code
  export PYTHON=python3 VENV=$HOME/srlm/venv
  local pins
  pins=$(python3 -c 'import ensurepip, sys; print("py%d%d.txt" % sys.version_info[:2])' 2>/dev/null || true)
  if [[ -z $pins || ! -f code/constraints/$pins ]]; then
    [[ -x uv/bin/uv ]] || python3 -m pip install --quiet --target=uv "$2"
    uv/bin/uv python install --quiet "$3"
    PYTHON=$(uv/bin/uv python find "$3")
  fi
  bash code/launch/setup.sh tpu,gcs </dev/null 9>&-
  echo "$1" >installed
}

# start ID ARGUMENT…: runs srlm with these arguments, in a session of its own; ~/srlm_env, where there is one, is its
# environment.
start() {
  set -e
  [[ $(cat run/id 2>/dev/null) != "$1" ]] || return 0
  stop
  rm -rf run.old
  [[ ! -d run ]] || mv run run.old
  mkdir run
  local lock=${LIBTPU_LOCK:-/tmp/libtpu_lockfile}
  if [[ -e $lock ]] && ! sudo -n fuser -s "$lock"; then # Left behind by a process that was killed.
    sudo -n rm -f "$lock" || rm -f "$lock"
  fi
  cat >run/main <<'END'
trap : TERM # The program gets it, too; its exit code is still wanted.
echo $$ >~/srlm/run/pid
cd ~/srlm/code
code=0
export SRLM_PROCESSES=auto # One on each worker: JAX finds them.
( # Of the log the last 60 MB are kept: those before become a hole, so that all others stay where they are.
  cd ../run
  while sleep 10 && [[ ! -e exit ]]; do
    gone=$(($(stat -c %s log) - 60000000))
    if ((gone > 0)) && fallocate --punch-hole --length $gone log 2>/dev/null; then
      echo $gone >gone.new
      mv gone.new gone
    fi
  done
) &
(
  if [[ -f ~/srlm_env ]]; then
    . ~/srlm_env
    rm -f ~/srlm_env
  fi
  exec ../venv/bin/srlm "$@"
) || code=$?
echo $code >../run/exit.new
mv ../run/exit.new ../run/exit
END
  setsid nohup bash ~/srlm/run/main "${@:2}" >run/log 2>&1 </dev/null &
  for ((i = 0; i < 500; i++)); do
    [[ ! -s run/pid ]] || break
    sleep 0.02
  done
  echo "$1" >run/id
}

# follow ID AT SECONDS: prints the log from byte AT on, in lines "log PLACE BASE64", at last "exit CODE ."; "gone PLACE ."
# where what lies before this place is kept no more.
follow() {
  local at=$2 code size gone n
  echo # Ends a line that an earlier connection may have cut.
  if [[ $(cat run/id 2>/dev/null) != "$1" ]]; then
    echo "exit gone ."
    return
  fi
  while :; do
    code=$(cat run/exit 2>/dev/null) || alive || code=$(cat run/exit 2>/dev/null) || code=gone
    size=$(stat -c %s run/log)
    gone=$(cat run/gone 2>/dev/null || echo 0)
    if ((gone > at)); then
      echo "gone $gone ."
      at=$gone
    fi
    if ((size > at)); then
      n=$((size - at < 48000 ? size - at : 48000))
      echo "log $at $(tail -c +$((at + 1)) run/log | head -c $n | base64 -w 0)"
      at=$((at + n))
    elif [[ -n $code ]]; then
      echo "exit $code ."
      return
    else
      echo # A sign of life, and the end of this loop where nobody listens any more.
      sleep "$3"
    fi
  done
}

# stop: ends the program, and notes that its end is known. srlm itself takes at most 20 s (SRLM_GRACE_SECONDS).
stop() {
  if alive; then
    kill -TERM -- "-$(cat run/pid)"
    for ((i = 0; i < 150; i++)); do
      alive || break
      sleep 0.2
    done
    if alive; then kill -KILL -- "-$(cat run/pid)"; fi
  fi
  [[ ! -d run ]] || touch run/seen
}

"$@"; exit # On one line: this file may be replaced while a command runs.
