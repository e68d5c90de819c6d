#!/usr/bin/env bash
# The native kernels under AddressSanitizer and UndefinedBehaviorSanitizer: built so into a directory of their own,
# and run through the tests of the kernels. Fails on the first finding. Linux with gcc.
set -euo pipefail
cd "$(dirname "$0")/.."
target=$(mktemp -d)
trap 'rm -rf "$target"' EXIT

RENORM_SANITIZE=address,undefined pip install --quiet --no-deps --no-build-isolation --target "$target" .

export PYTHONPATH="$target" PYTHONMALLOC=malloc OMP_NUM_THREADS=2
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
# Python itself is not built with the sanitizers: their runtime has to come first.
LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)"
export LD_PRELOAD

python -c "
import pathlib, renorm
from renorm.kernels import extension
assert extension.module() is not None, extension.status()
assert pathlib.Path(renorm.__file__).is_relative_to('$target'), renorm.__file__
"
# Every loop of the kernels, in every dtype and layout; the other tests go through the same loops.
python -m pytest -q -x -p no:cacheprovider tests/test_native.py tests/test_local.py tests/test_recurrent.py \
    -k "values_and_gradients_are_the_formulas or every_remainder or addition_and_an_activation or layouts \
        or float32_in or packed"
