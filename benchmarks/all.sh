#!/usr/bin/env bash
# Every benchmark in order of worth, with no human between. In the repository:
#
#   CUDA_VISIBLE_DEVICES=1 OUT_DIR=runs/bench benchmarks/all.sh [SECONDS, 670]
#
# Each step has its own timeout, log and folder under OUT_DIR; what was measured before a timeout is on
# disk. OUT_DIR/ways.txt: the ways of `kernels/proven.py` that were right and faster, tried from there on.
# TINY=--tiny runs all of it in miniature. MODELS: a folder, best one in memory, for 14 GB of random models.
set -u
: "${OUT_DIR:?}"
total=${1:-670}
export PYTHONPATH=$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
py=${PYTHON:-python3}
tiny=${TINY:-}
ways_file=$OUT_DIR/ways.txt
mkdir -p "$OUT_DIR"
began=$SECONDS
left() { echo $((total - (SECONDS - began))); }
# step NAME SECONDS COMMAND...: skipped when under 15 s are left; never longer than what is left.
step() {
    local name=$1 limit=$2 room
    shift 2
    room=$(left)
    if ((room < 15)); then
        echo "$name: no time left" | tee -a "$OUT_DIR/steps.txt"
        return 0
    fi
    ((limit > room)) && limit=$room
    echo "$(date +%T) $name begins, $limit s at most, $room s left" >> "$OUT_DIR/steps.txt"
    local at=$SECONDS
    timeout -k 5 "$limit" "$@" > "$OUT_DIR/$name.log" 2>&1
    local code=$?
    echo "$(date +%T) $name: exit $code after $((SECONDS - at)) s" >> "$OUT_DIR/steps.txt"
    return 0
}
ways() { cat "$ways_file" 2> /dev/null || true; }

store=${MODELS:-$OUT_DIR/models}
{ df -h .; nproc; nvidia-smi -L; } > "$OUT_DIR/machine.txt" 2>&1

# (a) Kernels: which ways are right and faster. A fault on the card ends the process: then once more
# without the way that was being tried.
kernels() {
    step kernels 150 $py benchmarks/kernels.py $tiny --only step,decode,text,kernels --seconds 125 \
        --write "$OUT_DIR/kernels.txt" --ways "$ways_file"
    if grep -qiE "illegal memory|device-side|misaligned|launch failure" "$OUT_DIR/kernels.log" 2> /dev/null &&
        [ -f "$ways_file.trying" ]; then
        cp "$OUT_DIR/kernels.txt" "$OUT_DIR/kernels-broken.txt" 2> /dev/null
        step kernels2 110 $py benchmarks/kernels.py $tiny --only step,decode,text --seconds 90 \
            --write "$OUT_DIR/kernels2.txt" --ways "$ways_file" --without "$(cat "$ways_file.trying")"
    fi
}
# generate NAME SECONDS ROWS PEER
generate() {
    step "generate-$1" "$2" $py benchmarks/generate.py $tiny --only "$3" --peer "$4" \
        --seconds $(($2 - 30)) --try "$(ways)" --models "$store" --write "$OUT_DIR/generate-$1"
    if grep -qiE "illegal memory|device-side|misaligned|launch failure" "$OUT_DIR/generate-$1.log" 2> /dev/null; then
        step "generate-$1-plain" "$2" $py benchmarks/generate.py $tiny --only "$3" --peer none \
            --seconds $(($2 - 30)) --models "$store" --write "$OUT_DIR/generate-$1-plain"
    fi
}
# The first of everything: what a driver without the rest of the time must have.
kernels
generate one 115 1.6B-b1,dc-ae-1024,1.6B-4096 eager
# (b) Memory and cold start; models are written first, cold start before the cases.
step memory 165 $py benchmarks/memory.py $tiny --models "$store" --only cold,4,0,3,1,2 \
    --seconds 155 --limit 80 --write "$OUT_DIR/memory"
# (c) The other rows, the peer where it is quick.
generate two 95 0.6B-b1,sprint,dc-ae-4096 eager
generate three 80 1.6B-b16,0.6B-b16 none
# (d) Experiments.
step fp8 60 $py benchmarks/fp8.py ${FP8_FLAGS:---step} --try "$(ways)"
step scaling 60 $py benchmarks/scaling.py $tiny --seconds 45 --write "$OUT_DIR/scaling"
step cold 45 $py benchmarks/cold.py $tiny --models "$store" --only probe
step sweep 60 $py benchmarks/kernels.py $tiny --only sweep --seconds 50 --write "$OUT_DIR/sweep.txt"
step flow 60 $py benchmarks/flow_step.py $tiny --seconds 50 --write "$OUT_DIR/flow.txt"
cat "$OUT_DIR/steps.txt"
tar czf "$OUT_DIR.tgz" --exclude=./models -C "$OUT_DIR" . || true
exit 0
