#!/usr/bin/env bash
# The compiled kernels' tests with the C++ core under sanitizers: run_sanitized.sh [PYTHON [address|native|thread]...]
#
# address: AddressSanitizer and UndefinedBehaviorSanitizer, and all tests but Triton's. native: those sanitizers, and the
# tests of what runs a whole model, in a minute. thread: ThreadSanitizer, and the tests of several threads. The core is
# built into a copy of the packages the tests import, so the normal build is not touched.
set -euo pipefail
cd "$(dirname "$0")/.."
repository=$PWD
python=${1:-python3}

runtime() { "${CXX:-c++}" -print-file-name="$1"; }

# copy_with SANITIZER: prints the folder of the copy.
copy_with() {
    local copy=$repository/build/sanitize/$1
    rm -rf "$copy"
    mkdir -p "$copy"
    cp -r kernels models engine tests pyproject.toml "$copy"
    rm -f "$copy"/kernels/_C.*.so
    TANDEM_SANITIZE=$1 "$python" setup.py -q build_ext --build-temp build/sanitize/temp --build-lib "$copy" >&2
    echo "$copy"
}

# run_in FOLDER PRELOADED TEST...: the interpreter is not sanitized, so the runtimes go in ahead of it.
run_in() {
    cd "$1"
    LD_PRELOAD=$2 PYTHONPATH=$1 "$python" -m pytest -p no:cacheprovider "${@:3}"
}

# Python's own leaks are not ours to report.
watch_memory() {
    local copy
    copy=$(copy_with address)
    export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
    run_in "$copy" "$(runtime libasan.so) $(runtime libubsan.so) $(runtime libstdc++.so)" "$@"
}

# Not those that are Triton's interpreter from end to end.
check_address() {
    watch_memory tests/kernels --ignore-glob 'tests/kernels/test_gpu_*' \
        --ignore-glob 'tests/kernels/test_weight_only_*' --ignore tests/kernels/test_triton_attention.py \
        --ignore tests/kernels/test_paged_attention.py
}

check_native() {
    watch_memory tests/kernels/test_{cached_attention,native_fuzz,packed_linear,program,threads}.py -k "not cpu_path"
}

# Races are told at the end, by the exit code. To it the threads of torch's own loops would look like some.
check_thread() {
    local copy
    copy=$(copy_with thread)
    export OMP_NUM_THREADS=1 TSAN_OPTIONS="suppressions=$copy/tests/thread_sanitizer.supp log_path=$copy/races"
    run_in "$copy" "$(runtime libtsan.so) $(runtime libstdc++.so)" \
        tests/kernels/test_{cached_attention,log_softmax,logit_edits,program,sampling,threads}.py -k "thread and not cpu_path" ||
        { cat "$copy"/races.*; return 1; }
}

sanitizers=("${@:2}")
for sanitizer in "${sanitizers[@]:-address}"; do ("check_$sanitizer"); done
