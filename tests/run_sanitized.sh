#!/usr/bin/env bash
# The compiled kernels' tests with the C++ core under AddressSanitizer and UndefinedBehaviorSanitizer: run_sanitized.sh [PYTHON]
#
# The core is built into a copy of the packages the tests import, so the normal build is not touched.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
copy=$PWD/build/sanitize/root

rm -rf "$copy"
mkdir -p "$copy"
cp -r kernels models tests pyproject.toml "$copy"
rm -f "$copy"/kernels/_C.*.so
TANDEM_SANITIZE=1 "$python" setup.py -q build_ext --build-temp build/sanitize/temp --build-lib "$copy"

# The interpreter is not sanitized, so the runtimes go in ahead of it. Python's own leaks are not ours to report.
runtime() { "${CXX:-c++}" -print-file-name="$1"; }
cd "$copy"
LD_PRELOAD="$(runtime libasan.so) $(runtime libubsan.so) $(runtime libstdc++.so)" \
    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH="$copy" \
    "$python" -m pytest -p no:cacheprovider tests/kernels
