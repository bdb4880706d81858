"""CLIP zero-shot: classes told apart by their names alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...adapters.adapter import Adapter
from ...vit.backbone import Backbone
from .base import Method, Needs, Task, TextEncoder


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

    @torch.no_grad()
    def encode(self, class_names: Sequence[str]) -> Tensor:
        """Unit vectors, float32 [C, E]."""
        texts = [self.template.format(name.replace("_", " ")) for name in class_names]
        tokens = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.text_projection.weight.device)
        pooled = self.text(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output
        return F.normalize(self.text_projection(pooled).float(), dim=-1)

    def project(self, features: Tensor) -> Tensor:
        """Image features [n, D] in the same space, float32 [n, E]; gradients to them run through."""
        weight = self.visual_projection.weight
        return self.visual_projection(features.to(weight)).float()


@dataclass
class ZeroShot(Method):
    """Cosines of image and text features, times the model's temperature (Radford et al., ICML 2021). It does not look
    at the support images."""

    needs: ClassVar[Needs] = Needs(text_encoder=True)
    encoder: Backbone = field(init=False, repr=False)
    text_encoder: TextEncoder = field(init=False, repr=False)

    def _prepare(
        self,
        backbone: Backbone,
        adapters: list[Adapter],
        surrogates: object,
        validation_tasks: object,
        text_encoder: TextEncoder | None,
    ) -> None:
        assert text_encoder is not None  # checked
        self.encoder, self.text_encoder = backbone, text_encoder

    def solve(self, task: Task) -> Tensor:
        _, query = task.features(self.encoder)
        images = F.normalize(self.text_encoder.project(query), dim=-1)
        return (self.text_encoder.scale * images @ self.text_encoder.encode(task.class_names).to(images).T).detach()
