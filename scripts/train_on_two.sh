#!/usr/bin/env bash
# Train `sticker-512` further on two GPUs, each with its own network, as its third run did.
#
#   scripts/train_on_two.sh MODEL PACK PERCEPTUAL WORK [FIRST SECOND]
#
# MODEL: the model folder to start from. PACK, PERCEPTUAL: from `sana data stickers` and `sana data
# perceptual`. WORK: an empty folder for runs, logs and the result (WORK/model). FIRST, SECOND: seconds.
# First the whole autoencoder on GPU 0 beside the transformer on the old latents on GPU 1; then the
# decoder alone beside the transformer on the new latents; then the judge, and both evaluations.
set -euo pipefail
model=$1 pack=$2 perceptual=$3 work=$4 first=${5:-400} second=${6:-420}
mkdir -p "$work/log"
data="data.pack=$pack data.cache=$work/cache autoencoder.perceptual_file=$perceptual"

train() { # GPU, name, recipe, key=value ...
    CUDA_VISIBLE_DEVICES=$1 OMP_NUM_THREADS=4 python3 -m sana.training.run "$3" folder="$work/$2" \
        steps=1000000 save_every=1000000 $data "${@:4}" > "$work/log/$2.log" 2>&1
    date "+%T $2"
}
evaluate() { # GPU, name, arguments ...
    CUDA_VISIBLE_DEVICES=$1 python3 -m sana.evaluation --model "$work/model" --pack "$pack" \
        --detector "$work/judge/model/detector.safetensors" --cache "$work/cache" --avatars 5000 \
        --output "$work/$2" "${@:3}" > "$work/log/$2.log" 2>&1
}

# Draw the pack once, before several processes ask for it.
python3 -c "
from pathlib import Path
from sana.data.stickers.sprites import load_world
load_world('$pack', avatars=5000, cache=Path('$work/cache'))"
date "+%T pack drawn"

train 0 whole sticker-autoencoder seed=11 init="$model" time_limit="$first" optimizer.decay=0.5 \
    autoencoder.latent_noise=0.02 &
train 1 old-latents sticker-512 seed=13 init="$model" flow.autoencoder="$model" time_limit="$first" \
    optimizer.decay=0.0 optimizer.rate=1.2e-3 &
wait -n && wait -n
cp "$model"/text.safetensors "$work/whole/model/"

(train 0 decoder sticker-decoder seed=12 init="$work/whole/model" time_limit=$((second - 60)) &&
    train 0 judge sticker-detector data.avatars=5000 time_limit=42) &
train 1 new-latents sticker-512 seed=14 init="$work/old-latents/model" \
    flow.autoencoder="$work/whole/model" time_limit="$second" optimizer.decay=0.7 \
    optimizer.warmup=50 optimizer.rate=1.2e-3 &
wait -n && wait -n

mkdir -p "$work/model"
cp "$work/decoder/model/autoencoder.safetensors" "$work"/new-latents/model/transformer-* \
    "$model/text.safetensors" "$work/model/"
evaluate 0 graded --count 200 --case-seed 1 --pictures 64 &
evaluate 1 selection --count 120 --case-seed 7 --guidance 2.2 3 4 --shift 2 3 --pictures 0 &
wait -n && wait -n
cat "$work/log/graded.log" "$work/log/selection.log"
