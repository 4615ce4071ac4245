#!/usr/bin/env bash
# Makes the virtual environment that launch/local.sh and launch/test.sh use; where it is up to date, returns at once.
#
#   launch/setup.sh [--torch] [EXTRAS]      EXTRAS as in setup.py, separated by commas: test,notebook
#
# --torch also installs the torch that the parity tests compare with; where it cannot be had, they use golden files.
# VENV (default .venv) is the environment's folder, PYTHON (default python3) the interpreter that makes it.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${VENV:-.venv}
torch=no
if [[ ${1:-} == --torch ]]; then
  torch=yes
  shift
fi
extras=${1:-}

if [[ ! -x $venv/bin/python ]]; then
  "${PYTHON:-python3}" -m venv "$venv"
fi
version=$("$venv/bin/python" -c 'import sys; print("%d%d" % sys.version_info[:2])')
if ((version < 311)); then
  echo "$venv has Python ${version:0:1}.${version:1}; srlm_jax needs 3.11 or later: delete $venv and set PYTHON." >&2
  exit 1
fi
pins=constraints/py$version.txt
pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
if [[ -f $pins ]]; then
  pip+=(-c "$pins")
else
  echo "There is no $pins: installing the newest versions that setup.py allows, a set that was not tested." >&2
  pins=/dev/null
fi

if [[ $torch == yes ]] && ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
  # Before what else may need it. First the CPU's own build: the package index's can bring gigabytes for GPUs.
  version=$(sed -n 's/.*"torch==\([0-9.]*\)".*/\1/p' setup.py)
  "${pip[@]}" --retries 0 --timeout 15 --no-deps --index-url https://download.pytorch.org/whl/cpu "torch==$version" \
    2>/dev/null || true
  "${pip[@]}" -e '.[torch]' || echo "No torch here: the parity tests compare with golden files instead." >&2
fi

# The stamp holds what was installed from, so that a change of it installs again.
stamp=$venv/.installed-${extras//,/+}
made_from="$PWD $(cat setup.py "$pins" | cksum)"
if [[ ! -f $stamp || $(<"$stamp") != "$made_from" ]]; then
  echo "Installing srlm_jax${extras:+[$extras]} into $venv ..." >&2
  "${pip[@]}" -e ".${extras:+[$extras]}"
  echo "$made_from" >"$stamp"
fi
