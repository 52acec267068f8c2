#!/bin/sh
# Set up .venv from requirements-core.txt; does nothing if that file, pyproject.toml, Python and the
# folder are unchanged. Arguments: more requirements files; those that fail to install are skipped.
set -eu
cd "$(dirname "$0")/.."

contents() {  # prints a requirements file and those it includes with "-r FILE"
    cat "$1"
    for included in $(sed -n 's/^-r *//p' "$1"); do contents "$included"; done
}

for python in "${PYTHON:-python3}" python3.14 python3.13 python3.12 python3.11; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        base=$python
        break
    fi
done
if [ -z "${base:-}" ]; then
    echo "error: Python 3.11 or newer not found; install it or set PYTHON=/path/to/python" >&2
    exit 2
fi

hash=$({
    "$base" -c 'import sys; print(sys.version, sys.prefix)'
    pwd
    contents requirements-core.txt
    cat pyproject.toml
} | sha256sum)
if [ ! -x .venv/bin/python ] || [ "$(cat .venv/ready 2>/dev/null)" != "$hash" ]; then
    echo "Setting up .venv with $("$base" --version): about a minute with a fast network."
    rm -rf .venv
    # Debian's python3 may lack ensurepip: use the system's pip to install pip into .venv.
    "$base" -m venv .venv >/dev/null 2>&1 || {
        rm -rf .venv
        "$base" -m venv --without-pip .venv
        "$base" -m pip --python .venv/bin/python install -qq pip
    }
    .venv/bin/python -m pip install -qq --disable-pip-version-check -r requirements-core.txt || {
        echo "error: pip could not install requirements-core.txt (see its message above);" \
            "check the network and free disk, then run this again" >&2
        exit 2
    }
    printf '%s\n' "$hash" >.venv/ready
    echo "Set up."
fi

for extra in "$@"; do
    if [ "$(contents "$extra")" != "$(cat ".venv/$extra" 2>/dev/null)" ]; then
        if .venv/bin/python -m pip install -qq --disable-pip-version-check -r "$extra"; then
            contents "$extra" >".venv/$extra"
        else
            echo "$extra was not installed (see pip's message above); continuing without it" >&2
        fi
    fi
done
