#!/usr/bin/env bash
# Starts the graph editor: 1键启动.sh [--num_gpus N] [--no-browser] [--port P] …. Works from any folder and as a link.
set -euo pipefail

script="${BASH_SOURCE[0]}"
while [[ -L "$script" ]]; do
    folder="$(cd -P "$(dirname "$script")" && pwd)"
    script="$(readlink "$script")"
    [[ "$script" == /* ]] || script="$folder/$script"
done
pack="$(cd -P "$(dirname "$script")" && pwd)"

for python in python3 python3.13 python3.12 python3.11 python3.10 python; do
    if command -v "$python" >/dev/null && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        exec "$python" "$pack/install.py" start "$@"
    fi
done
echo "Python 3.10 or newer was not found. Install it, then run this script again." >&2
exit 1
