#!/usr/bin/env bash
# All that is measured of a sticker model, in one go: the exam, and the best of N on its kinds and on styles.
#
#   scripts/examine.sh MODEL PACK WORK [FEATURES ...]
#
# MODEL: a model's name or folder. PACK: from `sana data stickers`. WORK: a folder with the judges of scripts/judges.sh in WORK/judges
# (trained here where there are none, in JUDGES seconds, 215). FEATURES: from `sana data features`. What comes is
# WORK/exam, WORK/best and WORK/best-styles; WORK/records.tgz holds of them what is not a picture of the exam. CARDS: GPUs, as 0,1;
# none: one process on whatever there is. BEST: seconds for each best of N, 60. COUNT, SEEDS, TRAITS: 600, 4, 150.
set -Eeuo pipefail
model=$1 pack=$2 work=$3
features=("${@:4}")
here=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$work/log"
trap 'tail -n 2 "$work"/log/*.log >&2' ERR
[ -e "$work/judges/traits/model" ] || "$here/scripts/judges.sh" "$model" "$pack" "$work" "${JUDGES:-215}"
judge() { echo "$work/judges/$1/model/${2:-$1}.safetensors"; }

gpus=${CARDS:-}
gpus=${gpus//[^,]/}
run() { # arguments of python3, one process a GPU
    if [ -z "${CARDS:-}" ]; then python3 "$@"; else
        python3 -m torch.distributed.run --standalone --nproc-per-node $((${#gpus} + 1)) "$@"
    fi
}
best() { # folder, grader, key=value judges ...
    run "$here/benchmarks/best_of.py" --model "$model" --pack "$pack" --cache "$work/cache" --prompts 240 --seconds "${BEST:-60}" \
        --output "$work/$1" --grader "$2" "${@:3}" > "$work/log/$1.log" 2>&1
    tail -n 12 "$work/log/$1.log"
}

export CUDA_VISIBLE_DEVICES=${CARDS:-${CUDA_VISIBLE_DEVICES-0}}
run -m sana.cli.main evaluate stickers "$model" --pack "$pack" --cache "$work/cache" --output "$work/exam" \
    --detector "$(judge A detector)" --traits "$(judge traits)" --alignment "$(judge alignment)" ${features[@]/#/--features } \
    --count "${COUNT:-600}" --seeds "${SEEDS:-4}" --trait-count "${TRAITS:-150}" --steps 20 --batch 100 > "$work/log/exam.log" 2>&1
cat "$work/exam/scores.md"
best best-styles "$(judge traits)" --judge alignment="$(judge alignment)"
best best "$(judge A detector)" --judge sticker="$(judge B detector)" --judge alignment="$(judge alignment)"
tar czf "$work/records.tgz" -C "$work" log best/best-of.json best/best-of.png best-styles/best-of.json best-styles/best-of.png \
    exam/scores.json exam/scores.md exam/verdicts.json exam/six.png exam/sheet.png
