"""`lorarecycle serve`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from .common import Flat, Machine, Manners


@dataclass(frozen=True)
class Serve:
    """Open a local page to try a meta-LoRA: drop a few photos of each class and photos to ask about. The same as JSON:
    `POST /predict`. Needs the extra `serve`."""

    source: Annotated[Path, tyro.conf.Positional]
    """The work_dir of a run, an exported model, or a PEFT adapter."""
    host: str = "127.0.0.1"
    """Address to listen at; others on the network reach the page only if it is theirs to see, such as 0.0.0.0."""
    port: int = 7860
    """Port to listen at."""
    max_images: int = 100
    """Images of a request."""
    max_bytes: int = 20_000_000
    """Bytes of a request."""
    machine: Annotated[Machine, Flat] = field(default_factory=Machine)
    manners: Annotated[Manners, Flat] = field(default_factory=Manners)

    def run(self) -> None:
        from ..serve.answers import open_model
        from ..serve.app import serve
        from ..serve.page import import_gradio
        from ..serve.request import Limits

        import_gradio()
        model = open_model(self.source, **vars(self.machine))
        if not self.manners.quiet:
            print(f"http://{self.host}:{self.port}  (stop with Ctrl+C)", file=sys.stderr, flush=True)
        limits = Limits(images=self.max_images, bytes=self.max_bytes)
        serve(model, host=self.host, port=self.port, limits=limits)
