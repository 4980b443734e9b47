#!/bin/sh
# Check and time the kernels and the layer on a CUDA device, in under four minutes; figures go to $OUT.
export PYTHONPATH="$PWD/src:$PWD"
export OUT="${OUT:-.}"
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
exec timeout 280 python3 -m benchmarks --device cuda --seconds 2 --budget 240 --output "$OUT" "$@" 2>&1
