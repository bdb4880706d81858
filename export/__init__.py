"""Deployment formats of a merged ViT, imported as `lorarecycle.export`.

Names load on first use: `FewShotSession` needs numpy and onnxruntime only, the exporters need torch and onnx.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if __name__ == "export":
    raise ImportError("import `lorarecycle.export`; the folder `export` is no package of its own")

if TYPE_CHECKING:
    from .config import ExportConfig
    from .folder import ExportReport, export_onnx
    from .onnx_files import export_encoder, export_episode, export_head
    from .package import export_aoti
    from .session import FewShotSession

_HOMES = {
    "ExportConfig": "config",
    "ExportReport": "folder",
    "FewShotSession": "session",
    "export_aoti": "package",
    "export_encoder": "onnx_files",
    "export_episode": "onnx_files",
    "export_head": "onnx_files",
    "export_onnx": "folder",
}

__all__ = [
    "ExportConfig",
    "ExportReport",
    "FewShotSession",
    "export_aoti",
    "export_encoder",
    "export_episode",
    "export_head",
    "export_onnx",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lorarecycle.export' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
