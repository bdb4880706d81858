"""`lorarecycle convert`: files of LoRA-ViT, LoRA Recycle and CLIP-LoRA as PEFT folders."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from .common import Care, Flat, Machine, Manners


@dataclass(frozen=True)
class Convert:
    """Turn files of other code into PEFT folders: LoRA-ViT's and LoRA Recycle's .safetensors (w_a_000, w_b_000, ...),
    CLIP-LoRA's .pt; a PEFT folder is written anew, for another class maybe."""

    sources: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Files, or PEFT folders."""
    output: Path
    """Folder to write to; a folder in it for each source where there are several."""
    layout: str = "timm"
    """Class whose names are written: timm, vit, vit-classifier, clip and so on, see `Adapter.save`."""
    sites: tuple[str, ...] = ()
    """What the pairs of a LoRA-ViT file adapt in each block, of q, k, v, proj, fc1, fc2, qkv; found when left out."""
    scaling: float = 1.0
    """Of a LoRA-ViT file's updates, which does not name it."""
    machine: Annotated[Machine, Flat] = field(default_factory=Machine)
    care: Annotated[Care, Flat] = field(default_factory=Care)
    manners: Annotated[Manners, Flat] = field(default_factory=Manners)

    def run(self) -> None:
        import logging

        from ..adapters.adapter import Adapter
        from ..adapters.peft.names import check_layout
        from ..runtime.files import require_place
        from ..runtime.strict import left_out_error

        check_layout(self.layout)
        require_place(self.output, "--output", folder=True)
        paths = [source.expanduser().absolute() for source in self.sources]
        names = [path.name if path.is_dir() else path.stem for path in paths]
        same = sorted({name for name in names if names.count(name) > 1})
        if same:
            raise ValueError(
                "`sources` must have different names, which the folders in --output get, got several of "
                f"{', '.join(same)}; convert those one by one."
            )
        strict, done = self.care.level, 0
        for path, name in zip(paths, names, strict=True):
            try:
                if path.is_dir():
                    adapter = Adapter.load(path)
                elif path.suffix in (".pt", ".pth"):
                    adapter = Adapter.from_clip_lora(path, self.machine.backbone())
                else:
                    base = self.machine.backbone()
                    adapter = Adapter.from_lora_vit(path, base, sites=self.sites or None, scaling=self.scaling)
                if strict and adapter.notes:
                    raise left_out_error(f"{path}: {'; '.join(adapter.notes)}", argument="--strict")
            except (ValueError, OSError) as error:
                if strict is not False:
                    raise
                logging.getLogger(__name__).warning("left out: %s", error)
                continue
            for note in () if path.is_dir() else adapter.notes:
                logging.getLogger(__name__).warning("%s: %s", path, note)
            print(adapter.save(self.output / name if len(paths) > 1 else self.output, layout=self.layout))
            done += 1
        if not done:
            raise ValueError("`sources` must hold one that can be read, got none.")
