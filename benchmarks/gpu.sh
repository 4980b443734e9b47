#!/bin/sh
# Check and time the kernels on a CUDA device, in under four minutes; figures go to $OUT.
export PYTHONPATH="$PWD/src:$PWD"
export OUT="${OUT:-.}"
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
exec timeout 280 python3 -m benchmarks "$@" 2>&1
