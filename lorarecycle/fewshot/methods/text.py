"""CLIP zero-shot: classes told apart by their names alone."""

from __future__ import annotations

import hashlib
import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...vit.backbone import Backbone
from .base import Given, Method, Needs, Task, TextEncoder

TOGETHER = 64
"""Texts in a forward pass."""


def words(name: str) -> str:
    """A class's name as people write it: "001.Black_footed_Albatross" is "Black footed Albatross"."""
    number, dot, rest = name.partition(".")
    return " ".join((rest if dot and number.isdecimal() and rest else name).replace("_", " ").split())


class ClipText:
    """The text half of a CLIP model of transformers, and its projection of image features.

    Args:
        model: a `CLIPModel`.
        tokenizer: of the model.
        template: a sentence with `{}` in the place of a class's name.
    """

    def __init__(self, model: Any, tokenizer: Any, template: str = "a photo of a {}.") -> None:
        self.text = model.text_model
        self.text_projection = model.text_projection
        self.visual_projection = model.visual_projection
        self.tokenizer = tokenizer
        self.template = template
        self.scale: Any = model.logit_scale.detach().exp().item()

    @classmethod
    def load(
        cls,
        source: str | PathLike[str],
        *,
        template: str = "a photo of a {}.",
        device: str | torch.device | None = None,
    ) -> ClipText:
        """Load a folder or Hub id with transformers, which is an extra.

        Raises:
            ImportError: transformers is missing.
            OSError, ValueError: no CLIP model there.
        """
        try:
            from transformers import AutoTokenizer, CLIPModel
        except ImportError as error:
            raise ImportError(
                f"a text encoder needs transformers ({error}); install `lorarecycle[transformers]`."
            ) from None
        model = CLIPModel.from_pretrained(str(source)).eval().requires_grad_(False)
        return cls(model.to(device), AutoTokenizer.from_pretrained(str(source)), template)

    def digest(self) -> str:
        """SHA-256 (hex) over weights, temperature, template and how the tokenizer writes the alphabet."""
        letters = self.tokenizer([string.printable], padding=True, return_tensors="pt")["input_ids"].tolist()
        sha = hashlib.sha256(f"{self.scale} {self.template} {letters}".encode())
        for part in (self.text, self.text_projection, self.visual_projection):
            for name, tensor in sorted(part.state_dict().items()):
                sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
                sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()

    @torch.no_grad()
    def encode(self, class_names: Sequence[str]) -> Tensor:
        """Unit vectors, float32 [C, E]; names as people write them, see `words`."""
        found = []
        for start in range(0, len(class_names), TOGETHER):
            texts = [self.template.format(words(name)) for name in class_names[start : start + TOGETHER]]
            tokens = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.text_projection.weight.device)
            pooled = self.text(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output
            found.append(F.normalize(self.text_projection(pooled).float(), dim=-1))
        return torch.cat(found)

    def project(self, features: Tensor) -> Tensor:
        """Image features [n, D] in the same space, float32 [n, E]; gradients to them run through."""
        weight = self.visual_projection.weight
        return self.visual_projection(features.to(weight)).float()


class Names:
    """Classes by their names: each name is encoded once, when it is first met.

    Args:
        text_encoder: of the model that image features are of.
    """

    def __init__(self, text_encoder: TextEncoder) -> None:
        self.text_encoder = text_encoder
        self._known: dict[str, Tensor] = {}

    def encode(self, class_names: Sequence[str]) -> Tensor:
        """Unit vectors, float32 [C, E]."""
        new = [name for name in dict.fromkeys(class_names) if name not in self._known]
        if new:
            self._known |= dict(zip(new, self.text_encoder.encode(new), strict=True))
        return torch.stack([self._known[name] for name in class_names])

    def logits(self, features: Tensor, class_names: Sequence[str]) -> Tensor:
        """CLIP's logits: cosines of image and text features, times the model's temperature.

        Args:
            features: [B, D], of images; gradients run through.
            class_names: C names.

        Returns:
            float32 [B, C].
        """
        images = F.normalize(self.text_encoder.project(features), dim=-1)
        return self.text_encoder.scale * images @ self.encode(class_names).to(images).T


@dataclass
class ZeroShot(Method):
    """Cosines of image and text features, times the model's temperature (Radford et al., ICML 2021). It does not look
    at the support images."""

    needs: ClassVar[Needs] = Needs(text_encoder=True)
    encoder: Backbone = field(init=False, repr=False)
    names: Names = field(init=False, repr=False)

    def _prepare(self, given: Given) -> None:
        assert given.text_encoder is not None  # checked
        self.encoder, self.names = given.backbone, Names(given.text_encoder)

    def solve(self, task: Task) -> Tensor:
        _, query = task.features(self.encoder)
        return self.names.logits(query, task.class_names).detach()
