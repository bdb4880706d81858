"""The server: the page at `/`, `POST /predict` and `GET /health` beside it."""

from __future__ import annotations

import logging
import threading
from typing import Any

from .answers import Model, answer
from .page import build_page, import_gradio
from .request import Limits, TooLarge, as_json, read_request

logger: logging.Logger = logging.getLogger(__name__)


def build_app(model: Model, limits: Limits | None = None) -> Any:
    """The application, for any ASGI server.

    Args:
        model: see `open_model`.
        limits: of a request.

    Raises:
        ImportError: Gradio is missing; the message names the extra.
    """
    gradio = import_gradio()
    from fastapi import FastAPI
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import JSONResponse

    limits = limits or Limits()
    app, busy = FastAPI(title="lorarecycle", docs_url=None, redoc_url=None), threading.Lock()

    def ask(body: bytes) -> dict[str, Any]:
        support, queries = read_request(body, limits)
        owners = [name for name, images in support.items() for _ in images]
        with busy:  # one at a time: the cores are the model's
            found, milliseconds = answer(model, support, queries)
        return as_json(found, owners, milliseconds)

    async def predict(request: Request) -> JSONResponse:
        body = bytearray()
        try:
            async for part in request.stream():
                body += part
                if len(body) > limits.bytes:
                    raise TooLarge(f"a request must be at most {limits.bytes} bytes, got more.")
            return JSONResponse(await run_in_threadpool(ask, bytes(body)))
        except TooLarge as error:
            return JSONResponse({"error": str(error)}, status_code=413)
        except ValueError as error:
            return JSONResponse({"error": str(error)}, status_code=400)

    async def health(request: Request) -> JSONResponse:
        return JSONResponse({"model": model.name, "limits": vars(limits)})

    app.add_route("/predict", predict, methods=["POST"])
    app.add_route("/health", health, methods=["GET"])
    theme = gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    page = build_page(model, limits)
    return gradio.mount_gradio_app(app, page, path="/", theme=theme, max_file_size=limits.bytes, footer_links=[])


def serve(model: Model, *, host: str = "127.0.0.1", port: int = 7860, limits: Limits | None = None) -> None:
    """Serve until interrupted; only to this machine unless `host` says otherwise.

    Raises:
        ImportError: Gradio is missing.
        OSError: the port is taken.
    """
    import socket

    app = build_app(model, limits)
    import uvicorn

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
    uvicorn.run(app, host=host, port=port, log_level="warning")
