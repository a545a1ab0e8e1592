#!/usr/bin/env bash
# Measure the layers on one NVIDIA GPU within seven minutes, from a checkout that is not installed.
#     benchmarks/gpu.sh --out DIR [--seconds 400] [--phases environment,ceilings,…] [--dry]
# It takes the python3 of the PATH, or PYTHON=…, in which torch and safetensors must be installed.
# Records are written to DIR as they come, and a short table is printed last; --dry tries the script
# on a machine without a GPU. --help tells the rest.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$root:$root/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python="${PYTHON:-python3}"
"$python" - <<'EOF'
import importlib.util
import sys

missing = [name for name in ("torch", "safetensors") if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(
        f"{sys.executable} has no {' and no '.join(missing)}; "
        "name a Python that has: PYTHON=/path/to/python benchmarks/gpu.sh …"
    )
EOF
exec "$python" -m benchmarks.gpu "$@"
