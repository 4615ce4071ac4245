#!/usr/bin/env bash
# Runs the tests in an environment that launch/setup.sh makes; arguments go to pytest (-m slow, -k judge, a file).
set -euo pipefail
cd "$(dirname "$0")/.."
launch/setup.sh test
exec "${VENV:-.venv}/bin/python" -m pytest "$@"
