"""The performance-critical operations, imported as `lorarecycle.kernels`."""

if __name__ == "kernels":
    raise ImportError("import `lorarecycle.kernels`; the folder `kernels` is no package of its own")

from .reference import cls_topk_gather, lora_qkv

__all__ = ["cls_topk_gather", "lora_qkv"]
