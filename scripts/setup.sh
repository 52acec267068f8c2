#!/bin/sh
# Set up .venv from requirements-core.txt; does nothing if that file, pyproject.toml, Python, the
# build of torch and the folder are unchanged. Arguments: more requirements files; those that fail
# to install are skipped. On Linux x86-64, TORCH_BUILD=cpu or cuda chooses torch's build (default:
# cuda if there is an NVIDIA driver, else cpu), also for later calls.
set -eu
cd "$(dirname "$0")/.."
cpu_index=https://download.pytorch.org/whl/cpu
system="$(uname -s) $(uname -m)"

fail() {
    echo "error: $*" >&2
    exit 2
}

contents() {  # prints a requirements file and those it includes with "-r FILE"
    cat "$1"
    for included in $(sed -n 's/^-r *//p' "$1"); do contents "$included"; done
}

size_of() {  # prints the "# size" line of a requirements file; $2: for which build of torch
    sed -n "s/^# size${2:+ with $2}: *//p" "$1"
}

count_of() {  # prints the number of packages that a requirements file pins
    grep -c '^[A-Za-z][^#]*==' "$1"
}

install() {  # Python compiles a module when it is first imported; pip would compile all of them
    .venv/bin/python -m pip install -qq --no-compile --disable-pip-version-check "$@"
}

has_nvidia_driver() {
    command -v nvidia-smi >/dev/null 2>&1 || [ -e /proc/driver/nvidia ] ||
        [ -e /usr/lib/wsl/lib/nvidia-smi ]
}

choose_build() {  # sets build, reason, and kept: "chosen" if the user has chosen it
    read -r recorded kept 2>/dev/null <.venv/torch_build || { recorded= kept=; }
    if [ -n "${TORCH_BUILD:-}" ]; then
        build=$TORCH_BUILD reason="TORCH_BUILD" kept=chosen
    elif [ "$kept" = chosen ]; then
        build=$recorded reason="the last TORCH_BUILD"
    elif [ "$system" != "Linux x86_64" ]; then
        build=default reason="the only one"
    elif has_nvidia_driver; then
        build=cuda reason="this machine has an NVIDIA driver"
    elif [ "$recorded" = cuda ]; then
        build=cuda reason="as installed before"
    else
        build=cpu reason="no NVIDIA driver found; TORCH_BUILD=cuda chooses the other"
    fi
    case $build in
        cpu | cuda | default) ;;
        *) fail "TORCH_BUILD=$build is unknown; use cpu or cuda, or unset it" ;;
    esac
    if [ "$system" != "Linux x86_64" ]; then build=default; fi  # PyPI has one build for others
}

check_disk() {  # $1: text with "N GB on disk"
    needed=$(printf '%s\n' "$1" | sed -n 's/.* \([0-9]*\)[.0-9]* GB on disk.*/\1/p')
    free=$(df -Pk . 2>/dev/null | awk 'NR == 2 { print int($4 * 1024 / 1e9) }')
    if [ -n "$needed" ] && [ -n "$free" ] && [ "$free" -le "$needed" ]; then
        fail "the packages need $1, but this disk has $free GB free; free some space"
    fi
}

for python in "${PYTHON:-python3}" python3.14 python3.13 python3.12 python3.11; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        base=$python
        break
    fi
done
if [ -z "${base:-}" ]; then
    fail "Python 3.11 or newer not found; install it or set PYTHON=/path/to/python"
fi
if [ "$("$base" -c 'import platform; print(platform.system(), platform.machine())')" = \
    "Darwin x86_64" ]; then
    fail "torch has no packages for a Python for Intel Macs; on Apple silicon install an arm64" \
        "Python (python.org or Homebrew) and set PYTHON=/path/to/python3"
fi

choose_build
hash=$({
    "$base" -c 'import sys; print(sys.version, sys.prefix)'
    pwd
    echo "$build"
    contents requirements-core.txt
    cat pyproject.toml
} | cksum)
if [ ! -x .venv/bin/python ] || [ "$(cat .venv/ready 2>/dev/null)" != "$hash" ]; then
    size=$(size_of requirements-core.txt "$build")
    size=${size:-"size not measured on $system"}
    echo "Setting up .venv with $("$base" --version): $(count_of requirements-core.txt) packages," \
        "$size; about a minute with a fast network."
    if [ "$build" != default ]; then echo "torch: $build build ($reason)."; fi
    if grep -qi microsoft /proc/version 2>/dev/null; then
        case $(pwd) in
            /mnt/?/*) echo "note: folders of Windows are slow in WSL; a clone in ~ is faster" ;;
        esac
    fi
    check_disk "$size"
    rm -rf .venv
    # Debian's python3 may lack ensurepip: use the system's pip to install pip into .venv.
    "$base" -m venv .venv >/dev/null 2>&1 || {
        rm -rf .venv
        "$base" -m venv --without-pip .venv
        "$base" -m pip --python .venv/bin/python install -qq pip
    }
    echo "$build $kept" >.venv/torch_build
    torch=$(sed -n 's/^\(torch==[^ ;]*\).*/\1/p' requirements-core.txt)
    # A local version (2.13.0+cpu) satisfies the pin. Only torch is looked up in its index.
    if [ "$build" = cpu ] && ! install --no-deps --retries 1 --timeout 10 \
        --index-url "$cpu_index" "$torch" 2>/dev/null; then
        echo "torch: no CPU build from $cpu_index; installing the build of the package index." >&2
    fi
    install -r requirements-core.txt || {
        fail "pip could not install requirements-core.txt (see its message above); check the" \
            "network and free disk, then run this again"
    }
    printf '%s\n' "$hash" >.venv/ready
    echo "Set up: .venv has $(du -sk .venv | awk '{ printf "%.1f", $1 * 1024 / 1e9 }') GB."
fi

for extra in "$@"; do
    if [ "$(contents "$extra")" != "$(cat ".venv/$extra" 2>/dev/null)" ]; then
        size=$(size_of "$extra")
        echo "Installing $extra: $(count_of "$extra") packages${size:+, $size}."
        if install -r "$extra"; then
            contents "$extra" >".venv/$extra"
        else
            echo "$extra was not installed (see pip's message above); continuing without it" >&2
        fi
    fi
done

for triton in .venv/lib/python3*/site-packages/triton; do  # xgrammar asks for it: 1 GB, for CUDA
    if [ "$build" != cuda ] && [ -d "$triton" ]; then
        .venv/bin/python -m pip uninstall -qq -y triton
    fi
done
