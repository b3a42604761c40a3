"""`sana train`: a recipe's name and dotted overrides."""

from __future__ import annotations


def train(recipe: str, /, *overrides: str) -> None:
    """Train a model by a recipe, with settings changed as in `data.batch=64`."""
    from sana.training.run import run

    run(recipe, list(overrides))
