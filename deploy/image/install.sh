#!/bin/sh
# Installs this project and what it needs into a virtual environment:
#   install.sh DEST EXTRAS [PACKAGE...]
# EXTRAS as in pyproject.toml, with commas; "" for none. The Dockerfile runs it, and a test does.
# PYTHON chooses the interpreter; PIP_FLAGS are handed to pip.
set -eu

dest=$1
extras=$2
shift 2
project=$(cd "$(dirname "$0")/../.." && pwd)

python=${PYTHON:-python3}
# The installer stays outside.
"$python" -m venv --without-pip "$dest"
# shellcheck disable=SC2086  # flags are words
"$python" -m pip --python "$dest/bin/python" install --quiet --no-cache-dir \
    --disable-pip-version-check ${PIP_FLAGS:-} "$project${extras:+[$extras]}" "$@"

# What only their authors read.
find "$dest" -type d -name tests -path '*/site-packages/*' \
    ! -path '*/numpy/*' ! -path '*/sklearn/*' -prune -exec rm -rf {} +
rm -f "$dest"/bin/activate* "$dest"/bin/Activate.ps1
