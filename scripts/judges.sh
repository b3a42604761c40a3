#!/usr/bin/env bash
# Train the four judges of docs/evaluation.md at once on one GPU, then ask both detectors about fresh renders.
#
#   scripts/judges.sh MODEL PACK WORK [SECONDS]
#
# MODEL: a model folder, for its text encoder. PACK: from `sana data stickers`. WORK: a folder; what comes is
# WORK/judges/{A,B,alignment,traits}/model and WORK/log. CARDS=1,2,3 spreads them: both detectors on the first
# card, the traits, for the whole time, on the last, the alignment on the second of three, or with the detectors. A card
# of its own counts: in 150 s on a shared H200 styles came to 0.96 of renders, in 215 s on one alone to 1.00.
set -euo pipefail
model=$1 pack=$2 work=$3 seconds=${4:-170}
mkdir -p "$work/log"
export OMP_NUM_THREADS=2 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True

IFS=, read -ra cards <<< "${CARDS:-}"
card() { # place of a card; the last one where there are fewer
    local last=$((${#cards[@]} - 1))
    if ((last >= 0)); then echo "${cards[$(($1 < last ? $1 : last))]}"; fi
}
on() { # place of a card, command ...
    if [ -n "${CARDS:-}" ]; then CUDA_VISIBLE_DEVICES=$(card "$1") "${@:2}"; else "${@:2}"; fi
}
traits_seconds=$((seconds * 6 / 10))
((${#cards[@]} > 1)) && traits_seconds=$seconds
second=$((${#cards[@]} > 2 ? 1 : 0))

train() { # name, seconds, recipe, key=value ...
    python3 -m sana.training.run "$3" folder="$work/judges/$1" steps=1000000 save_every=1000000 \
        log_every=25 time_limit="$2" data.pack="$pack" data.cache="$work/cache" data.workers=5 \
        "${@:4}" > "$work/log/$1.log" 2>&1
    date "+%T $1"
}
ask() { # name of a detector
    python3 -m sana.evaluation --detector "$work/judges/$1/model/detector.safetensors" --pack "$pack" \
        --cache "$work/cache" --avatars 8 --count 1200 --case-seed 21 --output "$work/judges/$1-renders"
}

python3 -c "
from pathlib import Path
from sana.data.stickers.sprites import load_world
if __name__ == '__main__':
    load_world('$pack', avatars=3000, cache=Path('$work/cache'))"
on 2 train traits "$traits_seconds" sticker-traits data.avatars=3000 &
on 0 train A "$seconds" sticker-detector seed=0 data.avatars=8 &
on 0 train B "$seconds" sticker-detector seed=1 data.avatars=8 &
on "$second" train alignment "$seconds" sticker-alignment data.avatars=1000 flow.autoencoder="$model" &
for _ in 1 2 3 4; do wait -n; done
on 0 ask A
on 0 ask B
grep -h "held-out" "$work/log/alignment.log"
