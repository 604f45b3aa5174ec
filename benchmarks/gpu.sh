#!/usr/bin/env bash
# gpu.sh OUTDIR [SECONDS]: builds for the GPU of this machine, then tests, verifies and measures, within SECONDS (540).
#
# Needs a Linux machine with an NVIDIA GPU, nvcc, and a python3 (or $PYTHON) that has torch >= 2.11 built for CUDA,
# setuptools >= 77, pybind11, ninja and pytest. No network, nothing installed: the extension is built in place, beside
# the sources. compute-sanitizer is used if it is there. From the root of the repository:
#
#     benchmarks/gpu.sh results          # or: make gpu OUT=results
#
# Every part has a limit of its own. One that fails, hangs or runs out of time is named at both ends of the summary and
# stops nothing else; what a part leaves unused the ones behind it may take. OUTDIR receives summary.txt (read this),
# environment.json, tests.json, verify.json, bench.json (the format of `fastlstm bench`), families.json, accuracy.json
# and log.txt, with all output. The JSON files are rewritten as results come in. Exit status 1 if any part failed.
#
# FASTLSTM_CUDA_DEBUG=1 builds kernels that check themselves, for hangs. Single parts: python3 benchmarks/gpu.py --help
set -u
if [ $# -lt 1 ]; then
  sed -n '2,16s/^# \{0,1\}//p' "$0"
  exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
total=${2:-540}
python=${PYTHON:-python3}
cd "$root" || exit 2
export PYTHONUNBUFFERED=1
PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin # where compute-sanitizer is, if not before
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
gpu=$root/benchmarks/gpu.py
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
SECONDS=0
failures=0
status_lines=""
details=""
: >"$out/log.txt"
rm -f "$out"/{environment,tests,verify,bench,families,accuracy}.json "$out/summary.txt"

report() { # report NAME LIMIT CODE SECONDS [BYTES]: what went wrong stands in the log behind so many bytes
  local line
  case $3 in
    0) line="$1: ok, $4 s" ;;
    124 | 137) line="$1: ENDED AT ITS LIMIT of $2 s" ;;
    *) line="$1: FAILED with status $3 after $4 s (see log.txt)" ;;
  esac
  if [ "$3" -ne 0 ]; then
    failures=$((failures + 1))
    [ $# -lt 5 ] || details+="--- the end of $1:"$'\n'$(tail -c "+$(($5 + 1))" "$out/log.txt" | tail -n 15 | cut -c 1-300)$'\n'
  fi
  status_lines+="$line"$'\n'
  echo "$line"
}

# left RESERVE: seconds until what is kept for the later parts begins.
left() { echo $((total - SECONDS - $1)); }

# part NAME LIMIT COMMAND...: runs one part under a hard limit, which is cut to the time left.
part() {
  local name=$1 limit=$2 begin=$SECONDS before
  shift 2
  [ "$limit" -le "$(left 10)" ] || limit=$(left 10)
  if [ "$limit" -lt 5 ]; then
    failures=$((failures + 1))
    status_lines+="$name: SKIPPED, no time left"$'\n'
    echo "$name: SKIPPED, no time left"
    return
  fi
  printf '\n##### %s (at most %s s)\n' "$name" "$limit" | tee -a "$out/log.txt"
  before=$(stat -c %s "$out/log.txt")
  timeout -k 5 "$limit" "$@" >>"$out/log.txt" 2>&1 </dev/null
  report "$name" "$limit" $? $((SECONDS - begin)) "$before"
}

build() {
  local targets
  targets=$("$python" -c '
import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}.{minor}" + ("a" if major >= 9 else ""))') || return 1
  echo "for compute capability $targets"
  FASTLSTM_CUDA=1 TORCH_CUDA_ARCH_LIST=$targets MAX_JOBS=$(nproc) "$python" setup.py -q build_ext --inplace
}

# All sanitizers at once: most of their time the GPU waits for them.
sanitize() {
  local limit=$1 tool
  if ! command -v compute-sanitizer >/dev/null; then
    echo "compute-sanitizer is not on PATH"
    return 1
  fi
  for tool in memcheck racecheck synccheck; do
    (
      # Blocks of their own, not pieces of larger ones: an access beyond the end is then seen.
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -k 5 "$limit" \
        compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 20 "$python" "$gpu" tiny >"$work/$tool.log" 2>&1
      echo $? >"$work/$tool.code"
    ) &
  done
  wait
}

# What the later parts are sure to have: verification, families, accuracy, sanitizers, summary.
after_tests=$((30 + 40 + 25 + 45 + 12))
after_bench=$((40 + 25 + 45 + 12))

export -f build
export python out
part "build" 150 bash -c build
part "environment" 25 "$python" "$gpu" environment --json "$out/environment.json"
limit=$(left $((after_tests + 110)))
[ "$limit" -le 170 ] || limit=170
part "tests" "$limit" "$python" "$gpu" tests --json "$out/tests.json" --seconds $((limit - 8))
part "verify" 30 "$python" "$gpu" verify --json "$out/verify.json"
limit=$(left $after_bench)
[ "$limit" -le 220 ] || limit=220
part "benchmark" "$limit" "$python" "$gpu" bench --json "$out/bench.json" --seconds $((limit - 8))
limit=$(left $((25 + 45 + 12)))
[ "$limit" -le 90 ] || limit=90
part "families" "$limit" "$python" "$gpu" families --json "$out/families.json" --seconds $((limit - 8))
limit=$(left $((45 + 12)))
[ "$limit" -le 60 ] || limit=60
part "accuracy" "$limit" "$python" "$root/benchmarks/accuracy.py" --device cuda --json "$out/accuracy.json"
limit=$(left 17)
[ "$limit" -le 60 ] || limit=60
if [ "$limit" -ge 15 ]; then
  begin=$SECONDS
  printf '\n##### sanitizers (at most %s s)\n' "$limit" | tee -a "$out/log.txt"
  if sanitize "$limit" >>"$out/log.txt" 2>&1; then
    for tool in memcheck racecheck synccheck; do
      { echo "--- $tool"; tail -n 400 "$work/$tool.log"; } >>"$out/log.txt"
      report "$tool" "$limit" "$(cat "$work/$tool.code" 2>/dev/null || echo 1)" $((SECONDS - begin))
      status_lines+="$(grep -E '^========= (ERROR|RACECHECK) SUMMARY' "$work/$tool.log" | tail -n 1 | sed 's/^=*/ /')"$'\n'
    done
  else
    report "sanitizers" "$limit" 1 $((SECONDS - begin))
  fi
else
  failures=$((failures + 1))
  status_lines+="sanitizers: SKIPPED, no time left"$'\n'
fi

{
  printf '%s\n' "$status_lines"
  timeout -k 5 30 "$python" "$gpu" summary "$out" 2>&1
  printf '\n%s\n%s' "$details" "$status_lines"
} >"$out/summary.txt"
cat "$out/summary.txt"
echo "total $SECONDS s, $failures parts failed; results in $out"
[ "$failures" -eq 0 ]
