"""The networks that metrics look through: found, hashed, loaded strictly, told from others.

A network is a local folder or file, or the name of a repository on the Hugging Face hub. A score
carries its metric's published name only if the weights are the published ones, which their SHA-256
says; where no hash is known, if they came from the published repository by its name. Start reading
at `find_network`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sana.errors import CheckpointError, RequestError
from sana.pipelines.reading import digest_of as digest_of_file

WEIGHTS = (".safetensors", ".pth", ".pt")
READ = ("*.json", "*.txt", "*.safetensors", "*.pt", "*.pth")
"""What is fetched of a repository, if `Published.files` names nothing closer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """The network that a metric was published with; `sha256` is empty where it is not known."""

    name: str
    repository: str = ""
    sha256: str = ""
    files: tuple[str, ...] = READ


PUBLISHED: MappingProxyType[str, Published] = MappingProxyType(
    {
        "features": Published(
            name="Inception-v3 of 2015-12-05",
            sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        ),
        "clip": Published(
            name="CLIP ViT-L/14",
            repository="openai/clip-vit-large-patch14",
            sha256="a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb",
            files=("*.json", "*.txt", "model.safetensors"),
        ),
        "detector": Published(name="Mask2Former Swin-S of MMDetection 2"),
        "vqa": Published(name="mPLUG-large, fine-tuned on VQA"),
        "image-reward": Published(
            name="ImageReward-v1.0",
            repository="THUDM/ImageReward",
            files=("ImageReward.pt", "med_config.json", "*.txt", "tokenizer*.json"),
        ),
        "lpips": Published(
            name="VGG-16 of torchvision",
            sha256="397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
        ),
    }
)
"""By the flag that names the network. What transformers cannot run has no repository."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Where a network came from: the record of every score keeps this."""

    role: str
    source: str
    """As the user gave it: a path, or a repository's name."""
    path: Path
    sha256: str
    """Of the weight file, or over the hashes of several."""
    is_published: bool

    @property
    def label(self) -> str:
        """A short name for tables: the published one's, else the folder's or file's."""
        if self.is_published:
            return PUBLISHED[self.role].name
        return self.path.name if self.path == Path(self.source) else self.source

    def name(self, metric: str) -> str:
        """`metric`, or `metric (label)` where the network is another one than published."""
        return metric if self.is_published else f"{metric} ({self.label})"

    def to_json(self) -> dict[str, Any]:
        """For the record."""
        return {
            "role": self.role,
            "source": self.source,
            "label": self.label,
            "sha256": self.sha256,
            "is_published": self.is_published,
        }


def find_network(role: str, source: str, *, is_offline: bool = False) -> Network:
    """The network at a path or in a hub repository; raises `RequestError` if there is none."""
    published = PUBLISHED.get(role)
    path = Path(source)
    is_local = path.exists()
    if not is_local:
        files = published.files if published else READ
        path = fetch(role, source, files, is_offline=is_offline)
    digest = digest_of(weight_files(path))
    by_hash = published is not None and digest == published.sha256
    by_name = (
        published is not None
        and not published.sha256
        and not is_local
        and source == published.repository
    )
    return Network(
        role=role, source=source, path=path, sha256=digest, is_published=by_hash or by_name
    )


def weight_files(path: Path) -> list[Path]:
    """The file itself, or a folder's weights: safetensors if there are any, else torch's."""
    if path.is_file():
        return [path]
    for suffix in WEIGHTS:
        found = sorted(file for file in path.iterdir() if file.suffix == suffix)
        if found:
            return found
    raise RequestError(
        f"{path} holds no weights ({', '.join(WEIGHTS)}); give the folder of a network as "
        "transformers saves it, or the file of its weights"
    )


def digest_of(files: list[Path]) -> str:
    """SHA-256 of one file, or of the hashes of several in order."""
    digests = [digest_of_file(file) for file in files]
    return (
        digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    )


def read_weights(path: Path) -> dict[str, Any]:
    """The tensors of one file, safetensors or torch's own, whose pickles make tensors alone."""
    from sana.weights.pickles import read_pickle
    from sana.weights.tensors import find_content, open_index, read

    [file] = weight_files(path)[:1]
    if find_content(file) == "safetensors":
        index, _ = open_index(file)
        return {name: read(stored) for name, stored in index.items()}
    return dict(read_pickle(file))


def load_transformers(kind: str, network: Network, device: str) -> Any:
    """The class `kind` of transformers with the folder's weights, in fp32, every one of them there.

    Raises `CheckpointError` where the folder is of another architecture or lacks weights.
    """
    import transformers

    if not (network.path / "config.json").is_file():
        raise CheckpointError(
            f"{network.source} has no config.json; --{network.role} takes a folder as transformers "
            "saves it, or a repository's name on the hub"
        )
    try:
        with _quiet(transformers):
            model, loading = getattr(transformers, kind).from_pretrained(
                str(network.path),
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                dtype="float32",
            )
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise CheckpointError(
            f"{network.source} is no {kind} that transformers {transformers.__version__} can read "
            f"({reason}); give another with --{network.role}"
        ) from None
    # Buffers that a file may leave out (numbers of positions) have the values of the config.
    parameters = {name for name, _ in model.named_parameters()}
    missing = [name for name in loading["missing_keys"] if name in parameters]
    lacking = sorted(map(str, [*missing, *loading["mismatched_keys"]]))
    if lacking:
        raise CheckpointError(
            f"{network.source} lacks {len(lacking)} weights of {kind}, {lacking[0]} among "
            f"them; it is another network, so give another with --{network.role}"
        )
    return model.to(device).eval().requires_grad_(False)


def load_tokenizer(network: Network) -> Any:
    """The tokenizer that lies in the folder."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer
    try:
        return tokenizer.from_pretrained(str(network.path), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise CheckpointError(
            f"{network.source} holds no tokenizer that can be read ({reason}); put tokenizer.json "
            "beside the weights"
        ) from None


class _quiet:  # noqa: N801
    """transformers reports missing weights itself, on stderr and at length; we do so in a line."""

    def __init__(self, transformers: Any) -> None:
        self.logging = transformers.utils.logging

    def __enter__(self) -> None:
        self.level = self.logging.get_verbosity()
        self.logging.set_verbosity_error()
        self.had_bar = self.logging.is_progress_bar_enabled()
        self.logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        self.logging.set_verbosity(self.level)
        if self.had_bar:
            self.logging.enable_progress_bar()


def fetch(role: str, source: str, files: tuple[str, ...], *, is_offline: bool) -> Path:
    """The cached folder of a repository on the hub, with these files; raises `RequestError`."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    download: Any = snapshot_download
    failures: tuple[Any, ...] = (*HfHubHTTPError.__bases__, HFValidationError, OSError)
    failures = (*failures, LocalEntryNotFoundError)
    try:
        return Path(download(source, allow_patterns=list(files), local_files_only=is_offline))
    except failures as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RequestError(
            f"{role} is {source}, which is neither a path here nor can be had from the hub "
            f"({reason[:160]}); give a local folder or file, or check the name and the network"
        ) from None
