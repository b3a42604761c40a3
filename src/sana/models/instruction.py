"""The complex human instruction (CHI): what Sana's prompts are prefixed with (Sana section 2.3).

Both public implementations read the same eight lines, but NVIDIA's, with which the weights were
trained, has double quotes around "Enhanced prompt" and diffusers' single ones. The tests hold the
checksums of both.
"""

from __future__ import annotations

from collections.abc import Mapping

from sana.config import Reference

_LINES = (
    "Given a user prompt, generate an {quote}Enhanced prompt{quote} that provides detailed visual "
    "descriptions suitable for image generation. Evaluate the level of detail in the user prompt:",
    "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, "
    "and spatial relationships to create vivid and concrete scenes.",
    "- If the prompt is already detailed, refine and enhance the existing details slightly without "
    "overcomplicating.",
    "Here are examples of how to transform or refine prompts:",
    "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round "
    "shape, sleeping peacefully on a warm sunny windowsill, surrounded by pots of blooming red "
    "flowers.",
    "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, "
    "featuring glowing street lamps, a diverse crowd of people in colorful clothing, and a "
    "double-decker bus passing by towering glass skyscrapers.",
    "Please generate only the enhanced description for the prompt below and avoid including any "
    "additional commentary or evaluations:",
    "User Prompt: ",
)
_TEXT = "\n".join(_LINES)

INSTRUCTIONS: Mapping[Reference, str] = {
    "nvidia": _TEXT.replace("{quote}", '"'),
    "diffusers": _TEXT.replace("{quote}", "'"),
}
