#!/usr/bin/env bash
# One measurement round on a machine with a GPU and without Rust; see docs/benchmarks.md.
#
#   benches/gpu_round.sh pack         where cargo is: packs everything for a round into target/gpu_round, below 64 MiB
#   benches/gpu_round.sh check        where cargo is: checks that the small cases that it names exist
#   benches/gpu_round.sh [stage ...]  where the GPU is, in a copy of that folder: runs all stages, or these
#
# stages  doctor    dllm doctor: the machine, and every op compared with its reference
#         tests     every test of the kernels, on the device
#         sanitize  small cases of these tests under compute-sanitizer: memcheck, racecheck, initcheck, synccheck
#         kernels   the benches of the ops
#         e2e       dllm bench: whole decodes on the shapes of LLaDA-8B and Dream-7B
#         rivals    PyTorch next to the benches; Fast-dLLM next to dllm bench, if DLLM_ORIGINALS is its folder
# A stage is a function stage_<name>, and a name in `stages` below.
#
# OUT                 folder of the record: record.md, record.csv, and the output of the programs [target/gpu_round/out]
# PYTHON              an interpreter with torch, for the rivals [python3]
# DLLM_ROUND_DEVICE   gpu, or soft: tests this script on the CUDA emulator, without recording numbers [gpu]
# exit status         0: all ran and passed. 1: a stage failed. 2: nothing to run. 3: none failed, but something did not run
set -uo pipefail

stages=(doctor tests sanitize kernels e2e rivals)
stage_seconds=600
max_bytes=$((64 << 20))

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# pack copies this script into the folder, which is then complete.
if [[ -e $here/commit ]]; then folder=$here; else folder=$(dirname "$here")/target/gpu_round; fi
device=${DLLM_ROUND_DEVICE:-gpu}
python=${PYTHON:-python3}

# Small cases of the tests by module; a name that does not exist fails the stage, and 'check'. Long cases and those that provoke driver errors are left out.
declare -A small=(
  [advance]="graph::on_device::unmasks_without_the_host invalid_device_data::on_device::counters_wrap
    invalid_device_data::on_device::failures invalid_device_data::on_device::invalid_carry_over_schedules
    invalid_device_data::on_device::invalid_dream_schedules invalid_device_data::on_device::invalid_llada_schedules
    invalid_device_data::on_device::ranges_outside_the_tokens states::on_device::masks_and_ends_at_every_position
    states::on_device::replays"
  [attention]="invalid_device_data::on_device::a_graph_follows_the_device invalid_device_data::on_device::absent_segments
    invalid_device_data::on_device::in_place_from_a_projection invalid_device_data::on_device::without_lse reference::on_device::equals_pytorch
    the_same_bits_in_every_order"
  [driver]="each_thread_has_its_own_stream every_module_has_its_kernels"
  [blas]="blas_multiplies pinned_memory_goes_to_the_device"
  [cuda]="element_types feature_cache_masks_in_the_prompt logits_are_within_the_margin tied_head"
  [embed]="counts_on_the_device embeds_every_token_of_every_type embeds_rows leaves_out_rows_out_of_range replays"
  [merge_state]="counts_on_the_device equals_the_reference overwrites_either_side replays sides_without_keys"
  [norm]="adds_rows_by_a_map counts_on_the_device equals_the_reference passes_on_what_is_not_finite replays same_bits_whatever_else_runs"
  [read_bandwidth]="reads_to_the_last_byte_and_no_further"
  [rope]="caches_keys_alone counts_on_the_device equals_the_reference leaves_out_rows_out_of_range replays rotates_without_caches"
  [gather_scatter]="copies_elements_of_every_type copies_rows counts_on_the_device leaves_them_out_without_a_failure_word leaves_out_rows_out_of_range replays"
  [tiles]="lists_change_under_a_graph lists_of_the_caller"
  [swiglu]="counts_on_the_device equals_the_reference passes_on_what_is_not_finite replays same_bits_whatever_else_runs"
  [unmask]="commits::once_on_device::positions_past_the_window_are_scored_and_left commits::once_on_device::rows_drawn_by_alg_temp
    commits::once_on_device::sequences_without_rows_or_masks confidences::once_on_device::dreams_shift_is_a_row_map
    confidences::once_on_device::guidance filters::once_on_device::min_logits golden::once_on_device::llada
    launches::once_on_device::a_graph_unmasks_everything launches::once_on_device::indices_out_of_range
    launches::once_on_device::the_same_bits_in_every_order logits::once_on_device::nan_and_infinities
    logits::once_on_device::rows_without_a_finite_logit logits::once_on_device::the_mask_token_is_never_chosen"
  [vverify]="launches::on_device::a_captured_launch_follows_its_maps launches::on_device::a_captured_launch_follows_the_device
    launches::on_device::gather_takes_the_selected_rows launches::on_device::invalid_cu_rows
    maps::on_device::cached_rows_by_a_map maps::on_device::fresh_rows_by_a_map
    selection::on_device::fewer_rows_than_the_maximum selection::on_device::golden_cases
    selection::on_device::nan_counts_as_the_lowest"
)

die() {
  echo "gpu_round: $1" >&2
  exit 2
}

# ---- where cargo is

# Builds the programs of one kind (bin, test or bench) and prints lines "name path".
programs() {
  local kind=$1
  shift
  cargo "$@" --message-format=json |
    sed -n "s/.*\"kind\":\[\"$kind\"\].*\"name\":\"\([^\"]*\)\",\"src_path\".*\"executable\":\"\([^\"]*\)\".*/\1 \2/p"
}

# The test programs whose tests use a device.
test_programs=(ops engine device)

# Prints the modules of a test program whose tests use a device. Each runs in a process of its own, because after a failed kernel a
# CUDA context refuses everything else.
modules() {
  "$1" --list --format terse 2>/dev/null | sed -n 's/^\([a-z_]*\)::.*: test$/\1/p' | sort -u |
    if [[ $(basename "$1") == engine* ]]; then grep -x cuda; else cat; fi
}

# Prints the full names of the small cases of a module of a test program; fails if one does not exist.
small_cases() {
  local test wanted
  # Tests that run on a device are in a module of their own: ops::norm::on_device::replays.
  wanted=$("$1" --list --format terse 2>/dev/null | sed 's/: test$//' | grep -xF "$(
    for test in ${small[$2]}; do
      printf "$2::%s\n" "$test" "on_device::$test" "once_on_device::$test"
    done
  )")
  echo "$wanted"
  (($(wc -w <<<"$wanted") == $(wc -w <<<"${small[$2]}")))
}

check() {
  cd "$(dirname "$here")" || return 1
  local name path module known=" "
  while read -r name path; do
    for module in $(modules "$path"); do
      known+="$module "
      [[ -z ${small[$module]-} ]] || small_cases "$path" "$module" >/dev/null ||
        { echo "$name: not all small cases of $module exist" >&2; return 1; }
    done
  done < <(programs test test --release --no-run "${test_programs[@]/#/--test=}")
  for module in "${!small[@]}"; do
    [[ $known == *" $module "* ]] || { echo "no test program has a module $module" >&2; return 1; }
  done
}

pack() {
  cd "$(dirname "$here")" || return 1
  local benches=() file name path stem bytes
  check || return 1
  for file in $(grep -l '^mod gpu;' benches/*.rs); do benches+=(--bench "$(basename "$file" .rs)"); done
  rm -rf "$folder"
  local content
  content=$(mktemp -d) || return 1
  mkdir -p "$folder" "$content"/{bin,tests,benches} || return 1
  programs bin build --release --bin dllm >"$folder/built.bin" || return 1
  programs test test --release --no-run "${test_programs[@]/#/--test=}" >"$folder/built.tests" || return 1
  programs bench bench --no-run "${benches[@]}" >"$folder/built.benches" || return 1
  local kind glibc=()
  for kind in bin tests benches; do
    [[ -s $folder/built.$kind ]] || { echo "cargo told of no $kind" >&2; return 1; }
    while read -r name path; do
      glibc+=("$(objdump -T "$path" | grep -o 'GLIBC_[0-9.]*' | sort -V | tail -1)")
      strip -o "$content/$kind/$name" "$path" || return 1
    done <"$folder/built.$kind"
    rm "$folder/built.$kind"
  done

  # Without paths of this machine.
  if grep -rn CARGO_MANIFEST_DIR "${test_programs[@]/#/tests/}"; then
    echo "these tests find files by a path of this machine: use common::golden_dir or common::models_dir" >&2
    return 1
  fi
  cp -r tests/golden models "$content" || return 1
  # The programs share most of their code, at distances beyond xz's default dictionary.
  tar -c -C "$content" . | xz -T0 -6 --lzma2=dict=192MiB >"$folder/round.tar.xz" || return 1
  cp benches/rivals.py benches/gpu_round.sh "$folder/" || return 1
  git describe --always --dirty >"$folder/commit" || return 1

  bytes=$(du -sb "$folder" | cut -f1)
  echo "$folder: $((bytes >> 20)) MiB, $(find "$content"/{bin,tests,benches} -type f | wc -l) programs, $(cat "$folder/commit")," \
    "runs where glibc has $(printf '%s\n' "${glibc[@]}" | sort -V | tail -1)"
  rm -rf "$content"
  if ((bytes > max_bytes)); then
    echo "that is more than $((max_bytes >> 20)) MiB" >&2
    return 1
  fi
}

# ---- where the GPU is

did_not_run=()
deadline=0

# Prints a line and appends it to the record.
report() {
  echo "$1: $2"
  echo "| ${1/: / | } | $2 |" >>"$OUT/record.md"
}

not_run() {
  did_not_run+=("$1")
  report "$1" "not run: $2"
}

# Runs a command for at most $1 seconds, and not beyond the end of its stage.
bounded() {
  local limit=$1 left=$((deadline - SECONDS))
  shift
  ((left < limit)) && limit=$left
  ((limit > 0)) || return 124
  timeout -k 5 "$limit" "$@"
}

# Path of an unpacked program.
program() {
  echo "$unpacked/$1"
}

names() {
  find "$unpacked/$1" -type f -exec basename {} \; | sort
}

why() {
  case $1 in
    124 | 137) echo "out of time" ;;
    *) echo "exit status $1" ;;
  esac
}

stage_doctor() {
  local log=$OUT/doctor.txt status
  dllm 300 doctor >"$log" 2>&1
  status=$?
  # A round on a GPU accepts no other device; the doctor prints which one it used.
  if [[ $device == gpu ]] && grep -qE 'device in software|CUDA emulator' "$log"; then
    report "doctor: dllm" "FAILED: it ran on the CUDA emulator; see $log"
    return 1
  elif ((status != 0)) || ! grep -q '^all ok: ' "$log"; then
    report "doctor: dllm" "FAILED: $(why $status); $(tail -1 "$log"); see $log"
    return 1
  fi
  report "doctor: dllm" "$(sed -n 's/^all //p' "$log"); $(sed -n 's/^roofs  *//p' "$log")"
}

stage_tests() {
  local failed=0 program name log result status
  mkdir -p "$OUT/tests"
  for program in $(names tests); do
    for name in $(modules "$(program "tests/$program")"); do
      log=$OUT/tests/$name.txt
      bounded 300 "$(program "tests/$program")" "$name::" --include-ignored >"$log" 2>&1
      status=$?
      result=$(sed -n 's/^test result: [a-zA-Z]*\. \(.*\); [0-9]* measured.*/\1/p' "$log")
      if ((status == 0)) && [[ $result =~ ^[1-9][0-9]*\ passed\;\ 0\ failed\;\ ([0-9]+)\ ignored ]]; then
        [[ ${BASH_REMATCH[1]} == 0 ]] || did_not_run+=("tests: $name: ${BASH_REMATCH[1]} ignored")
        report "tests: $name" "$result"
      else
        failed=1
        report "tests: $name" "FAILED: $(why $status); ${result:-no result}; see $log"
      fi
    done
  done
  return $failed
}

stage_sanitize() {
  local sanitizer tool program name log status failed=0 wanted ran passed errors
  sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
  mkdir -p "$OUT/sanitize"
  for tool in memcheck racecheck initcheck synccheck; do
    if [[ -z $sanitizer ]]; then
      not_run "sanitize: $tool" "compute-sanitizer is not installed"
      continue
    fi
    passed=0 errors=()
    # Each tool gets a quarter of the stage's time.
    local tool_deadline=$((SECONDS + stage_seconds / 4))
    for program in $(names tests); do
      for name in $(modules "$(program "tests/$program")"); do
        log=$OUT/sanitize/$tool-$name.txt
        if [[ -z ${small[$name]-} ]]; then
          not_run "sanitize: $tool $name" "no small cases are named in this script"
          continue
        fi
        if ! wanted=$(small_cases "$(program "tests/$program")" "$name"); then
          errors+=("$name: not all of its small cases exist")
          continue
        fi
        # shellcheck disable=SC2086
        bounded $((tool_deadline - SECONDS)) "$sanitizer" --tool "$tool" --error-exitcode 99 \
          "$(program "tests/$program")" --exact --test-threads=1 $wanted >"$log" 2>&1
        status=$?
        ran=$(sed -n 's/^test result: ok\. \([0-9]*\) passed.*/\1/p' "$log")
        # A pass needs the tool's own summary.
        if ((status == 0)) && [[ $ran == "$(wc -w <<<"$wanted")" ]] &&
          grep -qE '(ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards displayed \(0 errors, 0 warnings\))' "$log"; then
          passed=$((passed + ran))
        else
          errors+=("$name: $(why $status), $(grep -hoE '[A-Z]+ SUMMARY: .*' "$log" | head -1 | grep . || echo 'no summary')")
        fi
      done
    done
    if ((${#errors[@]})); then
      failed=1
      report "sanitize: $tool" "FAILED in ${#errors[@]} modules: $(printf '%s; ' "${errors[@]:0:2}")see $OUT/sanitize"
    else
      report "sanitize: $tool" "0 errors in $passed tests"
    fi
  done
  return $failed
}

stage_kernels() {
  local name log status cases failed=0
  mkdir -p "$OUT/kernels"
  rm -f "$OUT/kernels/ours.csv"
  for name in $(names benches); do
    log=$OUT/kernels/$name.txt
    # criterion writes files too; they are not part of the record.
    DLLM_BENCH_CSV=$OUT/kernels/ours.csv CRITERION_HOME=$unpacked/criterion \
      bounded 180 "$(program "benches/$name")" --bench >"$log" 2>&1
    status=$?
    cases=$(grep -c "^$name .* of the roof" "$log")
    if ((status != 0)); then
      failed=1
      report "kernels: $name" "FAILED: $(why $status) after $cases cases; see $log"
    elif grep -q 'not measured' "$log"; then
      not_run "kernels: $name" "$(grep -m1 'not measured' "$log")"
    elif ((cases == 0)); then
      failed=1
      report "kernels: $name" "FAILED: no case; see $log"
    else
      report "kernels: $name" "$cases cases"
    fi
  done
  record_csv
  return $failed
}

# Writes the machine in comment lines, the numbers of the benches and those of the rivals.
record_csv() {
  {
    sed 's/^/# /' "$OUT/machine.txt"
    cat "$OUT/kernels/ours.csv" 2>/dev/null
    tail -n +2 "$OUT/kernels/rivals.csv" 2>/dev/null
  } >"$OUT/record.csv"
}

# Runs `dllm` on the device of the round.
dllm() {
  local path=${LD_LIBRARY_PATH-} library
  if [[ $device == soft ]]; then
    library=$(ls -t "$folder"/../release/build/softgpu-*/out/libcuda.so 2>/dev/null | head -1)
    path=$(dirname "${library:-none}")${path:+:$path}
  fi
  LD_LIBRARY_PATH=$path bounded "$1" "$(program bin/dllm)" "${@:2}"
}

# Runs `dllm bench` and adds its tables to the record.
bench() {
  local what=$1 log=$OUT/e2e/${1/: /-}.txt status
  shift
  dllm 280 bench --device cuda "$@" >"$log" 2>"$log.err"
  status=$?
  if ((status != 0)) || ! grep -q '^Every forward reads' "$log"; then
    report "$what" "FAILED: $(why $status); $(tail -1 "$log.err"); see $log.err"
    return 1
  fi
  report "$what" "$(sed -n 's/  */ /g; s/^\(full\|suffix\|block\) \([0-9]*\) \([0-9.]*\) .*/\1: \3 ms of \2 rows/p' "$log" | paste -sd, )"
}

stage_e2e() {
  local failed=0 shape
  mkdir -p "$OUT/e2e"
  rm -f "$OUT"/e2e/e2e-*
  if [[ $device == soft ]]; then # tests the script; shapes of 8 billion parameters are too slow here
    bench "e2e: tiny" --model "$unpacked/golden/tiny-llada" --prompt-length 8 --gen-length 16 --block-length 8
    return
  fi
  # Each call generates its weights and decodes three times per mode, so a stage has time for about this many calls.
  local modes
  for shape in llada-8b dream-7b; do
    modes=prefix-fixed,dual-fixed,dual-threshold
    [[ $shape == llada-8b ]] && modes=vanilla,$modes
    bench "e2e: $shape" --shape $shape --random-weights --prompt-length 1024 --gen-length 256 --repeat 1 --modes $modes || failed=1
  done
  # Goals: a verify forward is three times as fast as a full one, and a refresh of the hybrid cache twice as fast.
  bench "e2e: llada-8b, feature cache" --shape llada-8b --random-weights --prompt-length 2048 --gen-length 256 --repeat 1 \
    --modes dual-threshold,dual-joined,adaptive --prompt-interval 100 || failed=1
  bench "e2e: llada-8b, 8 sequences" --shape llada-8b --random-weights --prompt-length 1024 --gen-length 256 --repeat 1 \
    --batch 8 --modes dual-fixed,dual-threshold || failed=1
  local length
  for length in 64 1024; do
    bench "e2e: llada-8b, $length new tokens" --shape llada-8b --random-weights --prompt-length 1024 \
      --gen-length $length --repeat 1 --modes prefix-fixed,dual-fixed || failed=1
  done
  return $failed
}

# Runs the rivals on the same machine: PyTorch's kernels next to the benches, and Fast-dLLM's code next to `dllm bench`.
stage_rivals() {
  local log status cases failed=0
  mkdir -p "$OUT/kernels" "$OUT/e2e"
  local arguments=()
  [[ -e $OUT/kernels/ours.csv ]] && arguments+=(--ours "$OUT/kernels/ours.csv")
  [[ $device == soft ]] && arguments+=(--smoke)
  if ! command -v "$python" >/dev/null; then
    not_run "rivals: torch" "there is no $python"
  else
    bounded 300 "$python" "$folder/rivals.py" "${arguments[@]}" >"$OUT/kernels/rivals.csv" 2>"$OUT/kernels/rivals.txt"
    status=$?
    cases=$(tail -n +2 "$OUT/kernels/rivals.csv" | wc -l)
    if ((status != 0)); then
      failed=1
      report "rivals: torch" "FAILED: $(why $status) after $cases rows; see $OUT/kernels/rivals.txt"
    elif ((cases == 0)); then
      not_run "rivals: torch" "$(tail -1 "$OUT/kernels/rivals.txt")"
    else
      report "rivals: torch" "$cases rows"
      # Some rivals failed, for example torch.compile without a compiler.
      while IFS= read -r line; do not_run "rivals: torch" "$line"; done < <(grep 'not measured' "$OUT/kernels/rivals.txt")
    fi
  fi
  record_csv
  if [[ -z ${DLLM_ORIGINALS-} ]]; then
    not_run "rivals: originals" "DLLM_ORIGINALS is not set"
  elif [[ $device == soft ]]; then
    not_run "rivals: originals" "Fast-dLLM does not run on the CUDA emulator"
  else
    export DLLM_PYTHON=$python
    bench "rivals: originals" --shape llada-8b --random-weights --prompt-length 1024 --gen-length 256 --repeat 1 \
      --modes prefix-fixed,dual-fixed || failed=1
    log="$OUT/e2e/rivals-originals.txt"
    ((failed)) || ! grep -q '^originals: not measured' "$log" || not_run "rivals: originals" "$(grep '^originals:' "$log")"
  fi
  return $failed
}

machine() {
  local compiler
  compiler=$(command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null)
  echo "date: $(date -u +%Y-%m-%dT%H:%MZ)"
  echo "commit: $(cat "$folder/commit")"
  [[ $device == soft ]] && echo "device: the software device: no number here, and nothing about a GPU"
  if command -v nvidia-smi >/dev/null; then
    nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.mem \
      --format=csv | sed 's/^/GPU: /'
    nvidia-smi -q -d CLOCK | grep -A4 -E '^ +(Clocks|Applications Clocks)$' | sed 's/  */ /g; s/^ *//; s/^/clocks: /'
  else
    echo "GPU: not known, there is no nvidia-smi"
  fi
  echo "nvcc here: $([[ -n $compiler ]] && "$compiler" --version | grep -o 'release.*' || echo none)"
  echo "python: $("$python" -c 'import sys, torch; print(sys.version.split()[0], "torch", torch.__version__)' 2>&1 | tail -1)"
}

round() {
  local stage before log failed=() passed=() incomplete=()
  [[ -e $folder/commit ]] || die "there is no $folder/commit: run 'gpu_round.sh pack' where cargo is, and carry $folder here"
  case $device in gpu | soft) ;; *) die "DLLM_ROUND_DEVICE=$device: gpu or soft" ;; esac
  for stage in "$@"; do
    [[ $(type -t "stage_$stage") == function ]] || die "no stage $stage: there are pack ${stages[*]}"
  done
  OUT=${OUT:-$folder/out}
  mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 1
  unpacked=$(mktemp -d) || exit 1
  trap 'rm -rf "$unpacked"' EXIT
  # Without xz, Python unpacks.
  tar -xJf "$folder/round.tar.xz" -C "$unpacked" 2>/dev/null ||
    "$python" -m tarfile -e "$folder/round.tar.xz" "$unpacked" || die "neither tar nor $python can unpack $folder/round.tar.xz"
  export DLLM_TEST_DEVICE=$device DLLM_GOLDEN_DIR=$unpacked/golden DLLM_MODELS_DIR=$unpacked/models
  rm -f "$OUT/record.csv" # from an earlier round
  machine >"$OUT/machine.txt" 2>&1
  { echo "# GPU round"; echo; sed 's/^/    /' "$OUT/machine.txt"; echo; echo "| stage | what | result |"; echo "|---|---|---|"; } \
    >"$OUT/record.md"

  for stage in "$@"; do
    deadline=$((SECONDS + stage_seconds))
    before=${#did_not_run[@]}
    if ! "stage_$stage"; then
      failed+=("$stage")
    elif ((${#did_not_run[@]} > before)); then
      incomplete+=("$stage")
    else
      passed+=("$stage")
    fi
  done
  {
    echo
    echo "Stages passed: ${passed[*]:-none}. Failed: ${failed[*]:-none}. No failure, but not all ran: ${incomplete[*]:-none}."
    echo
    ((${#did_not_run[@]} == 0)) || printf -- '- did not run: %s\n' "${did_not_run[@]}"
    for log in "$OUT"/e2e/*.txt; do
      [[ ! -e $log ]] || { echo; sed 's/^/    /' "$log"; }
    done
  } >>"$OUT/record.md"
  echo "record: $OUT/record.md$([[ -e $OUT/record.csv ]] && echo ", $OUT/record.csv")"
  ((${#failed[@]} == 0)) || { echo "failed: ${failed[*]}"; exit 1; }
  ((${#did_not_run[@]} == 0)) || { echo "nothing failed, but not all ran: ${incomplete[*]}"; exit 3; }
}

case ${1-} in
  check) check || { echo "failed: check"; exit 1; } ;;
  pack) pack || { echo "failed: pack"; exit 1; } ;;
  -h | --help) sed -n '2,/^set /p' "${BASH_SOURCE[0]}" | sed '$d; s/^# \{0,1\}//' ;;
  "") round "${stages[@]}" ;;
  *) round "$@" ;;
esac
