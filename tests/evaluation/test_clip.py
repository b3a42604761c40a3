"""CLIPScore and zero-shot classes against the formulas; networks told apart by their hash."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from evaluation.tinies import clip_folder, picture
from numerics import assert_detects, assert_matches
from sana.errors import CheckpointError, RequestError
from sana.evaluation import networks
from sana.evaluation.clip import Clip, classifier, clip_scores
from sana.evaluation.networks import PUBLISHED, digest_of, find_network, load_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_folder(tmp_path_factory.mktemp("networks") / "tiny-clip")


def test_scores_by_hand() -> None:
    images = torch.tensor([[3.0, 4.0], [1.0, 0.0], [-1.0, 0.0]])
    assert clip_scores(images, torch.tensor([[2.0, 0.0]])) == pytest.approx([60, 100, 0])


def test_scores_are_cosines_of_transformers_features(folder: Path) -> None:
    clip, network = Clip.load(str(folder))
    assert (network.is_published, network.name("CLIPScore")) == (False, "CLIPScore (tiny-clip)")
    pictures, prompt = [picture(0), picture(1, (50, 90))], "a photo of a red fox"
    encoded = clip.tokenizer([prompt], return_tensors="pt")
    text = clip.model.get_text_features(**encoded).pooler_output
    pixels = torch.stack([networks_pixels(p) for p in pictures])
    seen = clip.model.get_image_features(pixel_values=pixels).pooler_output
    expected = 100 * torch.nn.functional.cosine_similarity(seen, text).clamp_min(0)

    def check(sentence: str) -> None:
        # Floor 6e-8.
        assert_matches(expected, torch.tensor(clip.score(sentence, pictures)), 5e-7)

    check(prompt)
    assert_detects(check, "a photo of a blue fox")
    long = "a red fox and " * 40
    assert clip.score(long, pictures) == pytest.approx(clip.score(long + "more", pictures))


def networks_pixels(image: Any) -> Tensor:
    from sana.evaluation.sight import clip_pixels

    return clip_pixels(image, 32)


def test_classes_are_means_over_templates(folder: Path) -> None:
    clip, _ = Clip.load(str(folder))
    templates = ("a photo of a {c} fox", "a photo of a {c} object")
    found = classifier(clip, ("red", "blue"), templates)
    for row, color in zip(found, ("red", "blue"), strict=True):
        two = clip.texts([template.replace("{c}", color) for template in templates])
        assert_matches(torch.nn.functional.normalize(two.sum(0), dim=0), row, 1e-6)


def test_published_is_told_by_hash(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sha = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    known = {**PUBLISHED, "clip": replace(PUBLISHED["clip"], sha256=sha)}
    monkeypatch.setattr(networks, "PUBLISHED", known)
    found = find_network("clip", str(folder))
    assert found.is_published and found.name("CLIPScore") == "CLIPScore"
    assert found.to_json()["sha256"] == sha and found.to_json()["label"] == "CLIP ViT-L/14"


def test_published_without_a_hash_is_told_by_its_repository(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(folder))
    assert find_network("image-reward", "THUDM/ImageReward").is_published
    other = find_network("image-reward", "someone/else")
    assert other.name("ImageReward") == "ImageReward (someone/else)"
    # A repository's name is not enough where the hash is known.
    assert not find_network("clip", "openai/clip-vit-large-patch14").is_published


def test_hash_of_several_files(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a", "b")]
    for file in files:
        file.write_bytes(file.name.encode())
    assert digest_of(files) != digest_of(files[::-1]) != digest_of(files[:1])


def test_other_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    tensors = safetensors.torch.load_file(broken / "model.safetensors")
    del tensors["visual_projection.weight"]
    safetensors.torch.save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks 1 weights of CLIPModel, visual_projection"):
        Clip.load(str(broken))
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        load_tokenizer(find_network("clip", str(broken)))
    (broken / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="CLIPModel"):
        Clip.load(str(broken))
    (broken / "config.json").unlink()
    with pytest.raises(CheckpointError, match="has no config.json"):
        Clip.load(str(broken))
    with pytest.raises(RequestError, match="neither a path here"):
        Clip.load("none/such", is_offline=True)
