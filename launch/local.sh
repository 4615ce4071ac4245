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
# Large pages for what XLA allocates at each step: a training step of 110M parameters is a tenth shorter on two cores.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
exec "${VENV:-.venv}/bin/srlm" "$@"
