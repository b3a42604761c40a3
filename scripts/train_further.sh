#!/usr/bin/env bash
# Train `sticker-512` further, as its fourth run did: a better autoencoder, then the transformer on its
# new latents.
#
#   scripts/train_further.sh MODEL PACK PERCEPTUAL WORK [WHOLE DECODER FLOW]
#
# MODEL: the model folder to start from. PACK, PERCEPTUAL: from `sana data stickers` and `sana data
# perceptual`. WORK: a folder for runs, logs and the result (WORK/model). WHOLE, DECODER, FLOW: seconds
# of the whole autoencoder, of its decoder alone, and of the transformer. With WHOLE 0 the autoencoder stays
# as it is, as in the fifth run. CARDS and FLOW_CARDS: the GPUs of the autoencoder and of the transformer.
set -euo pipefail
model=$1 pack=$2 perceptual=$3 work=$4 whole=${5:-680} decoder=${6:-290} flow=${7:-392}
mkdir -p "$work/log"

train() { # GPUs, name, recipe, key=value ...
    local gpus=${1//[^,]/}
    CUDA_VISIBLE_DEVICES=$1 OMP_NUM_THREADS=4 python3 -m torch.distributed.run --standalone \
        --nproc-per-node $((${#gpus} + 1)) -m sana.training.run "$3" folder="$work/$2" \
        steps=1000000 save_every=1000000 data.pack="$pack" data.cache="$work/cache" \
        autoencoder.perceptual_file="$perceptual" "${@:4}" > "$work/log/$2.log" 2>&1
    date "+%T $2"
}

# Draw the pack once, before several processes ask for it.
python3 -c "
from pathlib import Path
from sana.data.stickers.sprites import load_world
if __name__ == '__main__':
    load_world('$pack', avatars=5000, cache=Path('$work/cache'))"
date "+%T pack drawn"

mkdir -p "$work/model"
if ((whole == 0)); then
    cp "$model/autoencoder.safetensors" "$model/text.safetensors" "$work/model/"
else
    # Whole pictures: at a crop's border, which no picture has, half a decibel is lost for nothing.
    train "${CARDS:-0}" whole sticker-autoencoder seed=21 init="$model" time_limit="$whole" \
        optimizer.decay=0.6 autoencoder.latent_noise=0.02 data.crop=0 data.batch=24
    cp "$model/text.safetensors" "$work/whole/model/"

    train "${CARDS:-0}" decoder sticker-decoder seed=22 init="$work/whole/model" data.crop=0 \
        data.batch=32 autoencoder.latent_noise=0.01 time_limit="$decoder"
    cp "$work/decoder/model/autoencoder.safetensors" "$model/text.safetensors" "$work/model/"
fi

train "${FLOW_CARDS:-0,1}" flow sticker-512 seed=24 init="$model" flow.autoencoder="$work/model" \
    time_limit="$flow" optimizer.decay=0.7 optimizer.warmup=50 optimizer.rate=1.4e-3 graph=true
cp "$work"/flow/model/transformer-* "$work/model/"
date "+%T done"
