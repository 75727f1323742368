#!/usr/bin/env bash
# Everything a GPU machine is good for, in one command of under ten minutes, downloading nothing:
#
#     bash bench/on_gpu.sh OUT [SECONDS]      # default 560 s
#
# Builds for this GPU, runs the tests marked gpu, then the benches. Leaves in OUT:
#   steps.tsv             step, exit status (124: out of time, -: no time was left), seconds
#   log.txt               what every step printed
#   <machine>/<op>.json   to be copied to bench/results/
# A step that fails is recorded, and the next one runs.
set -uo pipefail

if [ $# -lt 1 ]; then
  echo "usage: bash bench/on_gpu.sh OUT [SECONDS]" >&2
  exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
limit=${2:-560}
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export TORCHINDUCTOR_CACHE_DIR="$scratch/inductor" TRITON_CACHE_DIR="$scratch/triton"
: >"$out/log.txt"
: >"$out/steps.tsv"

# step NAME AT_MOST COMMAND...: runs it inside what is left of the limit
step() {
  local name=$1 at_most=$2 left status began=$SECONDS
  shift 2
  left=$((limit - SECONDS))
  [ "$left" -lt "$at_most" ] && at_most=$left
  if [ "$at_most" -lt 5 ]; then
    printf '%s\t-\t0\n' "$name" >>"$out/steps.tsv"
    return 1
  fi
  printf '\n==== %s\n' "$name" >>"$out/log.txt"
  timeout --kill-after=5 "$at_most" "$@" >>"$out/log.txt" 2>&1 </dev/null
  status=$?
  printf '%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - began))" | tee -a "$out/steps.tsv"
  return "$status"
}

arch=$("$python" -c 'import torch; a, b = torch.cuda.get_device_capability()
print(f"{a}{b}" + "a" * (a >= 9))' 2>>"$out/log.txt")
export RLKERN_CUDA_ARCHS=$arch

if ! "$python" -c 'import hypothesis' 2>>"$out/log.txt"; then
  # property tests are skipped, the others need not be
  mkdir -p "$scratch/stub/hypothesis"
  cat >"$scratch/stub/hypothesis/__init__.py" <<'STUB'
import pytest
from hypothesis import strategies

def given(*args, **kwargs):
    def replace(function):
        @pytest.mark.skip(reason="hypothesis is not installed")
        def skipped(): ...
        return skipped
    return replace

def settings(*args, **kwargs):
    return lambda function: function

def assume(condition): ...
STUB
  echo 'def __getattr__(name): return lambda *args, **kwargs: None' \
    >"$scratch/stub/hypothesis/strategies.py"
  export PYTHONPATH="$PYTHONPATH:$scratch/stub"
fi

step machine 30 "$python" -m torch.utils.collect_env
step build 180 "$python" setup.py build_ext --inplace --build-temp "$scratch/build"
step owners 30 "$python" -m rlkern
step self-test 90 "$python" -m rlkern --self-test

ops=$(cd bench/ops && ls bench_*.py | sed 's/^bench_//; s/\.py$//')
green=
for op in $ops; do
  if step "test $op" 120 "$python" -m pytest "tests/ops/test_$op.py" -m gpu -q; then
    green="$green${green:+,}$op"
  fi
done
# pytest's 5: none of these is marked gpu
step "other tests" 60 bash -c "\"$python\" -m pytest tests --ignore=tests/ops -m gpu -q || [ \$? = 5 ]"

# an op whose tests were red is left out: its bench would refuse
for op in ${green//,/ }; do
  step "bench $op" 150 "$python" -m pytest "bench/ops/bench_$op.py" --benchmark-enable \
    --bench-green "$green" --bench-seconds 2 --bench-results "$out"
done

cat "$out/steps.tsv"
# 0 when every step did what it should
! cut -f2 "$out/steps.tsv" | grep -qv '^0$'
