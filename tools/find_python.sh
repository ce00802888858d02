#!/bin/sh
# Prints the path of a Python >= 3.12 that can make virtual environments, or says how to get one.
# Every candidate is run, because a name on the PATH proves nothing: a version manager's shim may
# stand for no interpreter, and a distribution may leave out venv.
set -u

fits() {
    "$1" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

if [ -n "${PYTHON:-}" ]; then
    fits "$PYTHON" && echo "$PYTHON" && exit
    echo "PYTHON=$PYTHON is no Python >= 3.12 with venv" >&2
    exit 1
fi

for candidate in \
    python3.12 python3.13 python3.14 python3 python \
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/python3 \
    "${UV_PYTHON_INSTALL_DIR:-${XDG_DATA_HOME:-$HOME/.local/share}/uv/python}"/*/bin/python3
do
    fits "$candidate" && echo "$candidate" && exit
done
echo "attnjax needs Python >= 3.12 with venv: install one (apt install python3.12-venv," \
    "brew install python@3.12, uv python install 3.12) or name it: make PYTHON=/path/to/python" >&2
exit 1
