#!/bin/sh
# Set up .venv from requirements.txt; does nothing while they, Python and this folder are unchanged.
# Files named as arguments are optional extras: where they cannot be installed, that is said and all else goes on.
set -eu
cd "$(dirname "$0")/.."

for python in "${PYTHON:-python3}" python3.14 python3.13 python3.12 python3.11; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$python; break; fi
done
if [ -z "${found:-}" ]; then
    echo "error: Python 3.11 or newer is needed; install it, or name one with PYTHON=/path/to/python make ..." >&2
    exit 2
fi

want=$({ "$found" -c 'import sys; print(sys.version, sys.prefix)'; pwd; cat requirements.txt pyproject.toml; } | sha256sum)
if [ ! -x .venv/bin/python ] || [ "$(cat .venv/ready 2>/dev/null)" != "$want" ]; then
    echo "Setting up .venv with $("$found" --version): about a minute where packages come fast."
    rm -rf .venv
    # Debian's python3 may lack ensurepip: then pip, which can work on another environment, installs itself there.
    "$found" -m venv .venv >/dev/null 2>&1 || {
        rm -rf .venv
        "$found" -m venv --without-pip .venv
        "$found" -m pip --python .venv/bin/python install -qq pip
    }
    .venv/bin/python -m pip install -qq --disable-pip-version-check -r requirements.txt || {
        echo "error: pip could not install requirements.txt (its message is above); check the network and free disk, then run this again" >&2
        exit 2
    }
    printf '%s\n' "$want" >.venv/ready
    echo "Set up."
fi

for extra in "$@"; do
    if ! cmp -s "$extra" ".venv/$extra"; then
        if .venv/bin/python -m pip install -qq --disable-pip-version-check -r "$extra"; then
            cp "$extra" ".venv/$extra"
        else
            echo "$extra could not be installed (pip's message is above); what needs it is skipped" >&2
        fi
    fi
done
