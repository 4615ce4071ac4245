#!/usr/bin/env bash
# Runs srlm on this machine, in an environment that launch/setup.sh makes; by default the whole loop on the tiny world.
#
#   launch/local.sh
#   launch/local.sh all --config=configs/tiny.py --workdir=runs/other --config.seed=1
set -euo pipefail
cd "$(dirname "$0")/.."
launch/setup.sh
if (($# == 0)); then
  set -- all --config=configs/tiny.py --workdir=runs/tiny
fi
exec "${VENV:-.venv}/bin/srlm" "$@"
