"""Settings that make any recipe small enough for a CPU: `tiny`, its world drawn by code, 64 px."""

SMALL = (
    "model=tiny",
    "data.pack=tiny",
    "data.cache=",
    "data.avatars=0",
    "data.workers=0",
    "data.tokens=32",
    "data.size=64",
    "data.crop=0",
    "data.batch=4",
    "data.chunk=1",
    "precision=fp32",
    "compile=false",
    "autoencoder.perceptual=0",
    "flow.autoencoder=tiny",
    "save_every=1000",
    "log_every=1",
)
