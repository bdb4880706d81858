"""The performance-critical operations, imported as `lorarecycle.kernels`."""

if __name__ == "kernels":
    raise ImportError("import `lorarecycle.kernels`; the folder `kernels` is no package of its own")

from .backend import use_backend
from .batch_norm_prior import batch_norm_prior, batch_norm_with_prior
from .cls_topk_gather import cls_topk_gather
from .lora_qkv import lora_qkv
from .select_tokens import select_tokens
from .split_heads import split_heads

__all__ = [
    "batch_norm_prior",
    "batch_norm_with_prior",
    "cls_topk_gather",
    "lora_qkv",
    "select_tokens",
    "split_heads",
    "use_backend",
]
