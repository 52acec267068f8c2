#!/bin/sh
# Set up .venv from requirements-core.txt; does nothing while it, Python and this folder are unchanged.
# Arguments name further requirements files. A file that cannot be installed is reported and skipped.
set -eu
cd "$(dirname "$0")/.."

contents() {  # of a requirements file and of those it includes by "-r FILE"
    cat "$1"
    for included in $(sed -n 's/^-r *//p' "$1"); do contents "$included"; done
}

for python in "${PYTHON:-python3}" python3.14 python3.13 python3.12 python3.11; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$python; break; fi
done
if [ -z "${found:-}" ]; then
    echo "error: Python 3.11 or newer is needed; install it, or name one with PYTHON=/path/to/python make ..." >&2
    exit 2
fi

want=$({ "$found" -c 'import sys; print(sys.version, sys.prefix)'; pwd; contents requirements-core.txt; cat pyproject.toml; } | sha256sum)
if [ ! -x .venv/bin/python ] || [ "$(cat .venv/ready 2>/dev/null)" != "$want" ]; then
    echo "Setting up .venv with $("$found" --version): about a minute where packages come fast."
    rm -rf .venv
    # Debian's python3 may lack ensurepip: then pip, which can work on another environment, installs itself there.
    "$found" -m venv .venv >/dev/null 2>&1 || {
        rm -rf .venv
        "$found" -m venv --without-pip .venv
        "$found" -m pip --python .venv/bin/python install -qq pip
    }
    .venv/bin/python -m pip install -qq --disable-pip-version-check -r requirements-core.txt || {
        echo "error: pip could not install requirements-core.txt (its message is above); check the network and free disk, then run this again" >&2
        exit 2
    }
    printf '%s\n' "$want" >.venv/ready
    echo "Set up."
fi

for extra in "$@"; do
    if [ "$(contents "$extra")" != "$(cat ".venv/$extra" 2>/dev/null)" ]; then
        if .venv/bin/python -m pip install -qq --disable-pip-version-check -r "$extra"; then
            contents "$extra" >".venv/$extra"
        else
            echo "$extra could not be installed (pip's message is above); what needs it is skipped" >&2
        fi
    fi
done
