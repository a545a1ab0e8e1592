#!/usr/bin/env bash
# Measure the layers on one NVIDIA GPU within some minutes; nothing needs to be installed but torch.
#     benchmarks/gpu.sh --out DIR [--seconds 400] [--phases environment,ceilings,…] [--dry]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$root:$root/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"
