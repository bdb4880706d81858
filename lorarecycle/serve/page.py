"""The page: photos by class, photos to ask about, and answers with what explains them."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from ..report.images import data_of_picture
from .answers import Answer, Model, answer
from .request import Limits

CLASSES = 4
"""Classes that the page has fields for."""
STYLE = """
.answers{display:grid;gap:14px;grid-template-columns:repeat(auto-fill,minmax(260px,1fr))}
.answers article{border:1px solid #8885;border-radius:8px;padding:12px}
.answers h3{margin:0 0 8px;font-size:1.15rem} .answers .two{display:grid;grid-template-columns:1fr 1fr;gap:8px}
.answers figure{margin:0} .answers figcaption{font-size:.8rem;opacity:.75} .answers .pic{position:relative}
.answers img{width:100%;aspect-ratio:1;object-fit:cover;display:block;border-radius:4px}
.answers .pic svg{position:absolute;inset:0;width:100%;height:100%} .answers .row{margin-top:6px;font-size:.9rem}
.answers .bar{height:6px;border-radius:3px;background:#1f6feb;min-width:2px}
"""


def build_page(model: Model, limits: Limits) -> Any:
    """The page as Gradio's `Blocks`.

    Raises:
        ImportError: Gradio is missing; the message names the extra.
    """
    gradio = import_gradio()

    def respond(*given: Any) -> str:
        names = given[:CLASSES]
        *files, queries = [[file for file, _ in chosen or ()] for chosen in given[CLASSES:]]
        support: dict[str, list[Any]] = {}
        for i, (name, chosen) in enumerate(zip(names, files, strict=True)):
            if chosen:
                support.setdefault(name.strip() or f"class {i + 1}", []).extend(chosen)
        count = len(queries) + sum(map(len, support.values()))
        try:
            if len(support) < 2 or not queries:
                raise ValueError("Give photos of at least two classes, and one photo to ask about.")
            if count > limits.images:
                raise ValueError(f"At most {limits.images} photos at once, please; these are {count}.")
            opened = {name: [open_photo(file, limits) for file in chosen] for name, chosen in support.items()}
            asked = [open_photo(file, limits) for file in queries]
            answers, milliseconds = answer(model, opened, asked)
        except (ValueError, OSError) as error:
            return f'<p role="alert"><b>{escape(str(error))}</b></p>'
        return render(answers, milliseconds, opened, asked)

    with gradio.Blocks(title="lorarecycle: try a meta-LoRA", analytics_enabled=False) as page:
        gradio.Markdown(
            f"# Teach it new classes with a few photos\n**{escape(model.name)}**. Name two or more classes, drop one "
            "to five photos of each, then photos to ask about. Nothing is trained, and nothing leaves this machine."
        )
        names, files = [], []
        with gradio.Row():
            for i in range(CLASSES):
                with gradio.Column(min_width=180):
                    names.append(gradio.Textbox(label=f"Class {i + 1}", placeholder=f"class {i + 1}"))
                    files.append(_photos(gradio, f"Photos of class {i + 1}", 2))
        queries = _photos(gradio, "Photos to ask about", 8)
        button = gradio.Button("Answer", variant="primary")
        output = gradio.HTML(label="Answers")
        button.click(respond, [*names, *files, queries], output, api_name=False)
    return page


def render(
    answers: Sequence[Answer], milliseconds: dict[str, float], support: dict[str, list[Any]], queries: Sequence[Any]
) -> str:
    """Answers as HTML; names are escaped."""
    examples = [(name, image) for name, images in support.items() for image in images]
    cards = []
    for one, query in zip(answers, queries, strict=True):
        near_name, near = examples[one.nearest]
        bars = "".join(
            f'<div class="row">{escape(name)} {100 * share:.0f} %<div class="bar" style="width:{100 * share:.1f}%">'
            "</div></div>"
            for name, share in sorted(one.probabilities.items(), key=lambda pair: -pair[1])
        )
        where = "bright: where it looked" if one.attention else "the question"
        cards.append(
            f"<article><h3>{escape(one.label)}</h3>"
            f'<div class="two"><figure><div class="pic">{_picture(query)}{_overlay(one.attention)}</div>'
            f"<figcaption>{where}</figcaption></figure>"
            f'<figure><div class="pic">{_picture(near)}</div>'
            f"<figcaption>nearest example: {escape(near_name)}</figcaption></figure></div>{bars}</article>"
        )
    each = milliseconds["answer"] / len(queries)
    times = f"{milliseconds['learn']:.0f} ms to learn {len(examples)} photos, {each:.0f} ms for each answer"
    return f"<style>{STYLE}</style><p><b>{times}</b></p><div class='answers'>{''.join(cards)}</div>"


def open_photo(file: str, limits: Limits) -> Any:
    """A PIL image of a file.

    Raises:
        ValueError: no image, or more pixels than the limits allow.
    """
    from PIL import Image, ImageOps

    try:
        image = Image.open(file)
        if image.width * image.height > limits.pixels:
            raise ValueError(f"A photo may have {limits.pixels} pixels, this one has {image.width} x {image.height}.")
        image.load()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"A photo cannot be read: {error}") from None
    return ImageOps.exif_transpose(image)


def import_gradio() -> Any:
    """Gradio.

    Raises:
        ImportError: it is missing.
    """
    try:
        import gradio
    except ImportError as error:
        raise ImportError("the page needs Gradio; install `lorarecycle[serve]`.") from error
    return gradio


def _photos(gradio: Any, label: str, columns: int) -> Any:
    options = {"columns": columns, "height": 220, "object_fit": "cover", "allow_preview": False, "fit_columns": False}
    return gradio.Gallery(label=label, file_types=["image"], type="filepath", **options)


def _picture(image: Any) -> str:
    return f'<img src="{data_of_picture(image.convert("RGB"), 240, square=True)}" alt="">'


def _overlay(attention: list[list[float]] | None) -> str:
    """Darkens the patches that the class token does not attend to."""
    if attention is None:
        return ""
    cells = "".join(
        f'<rect x="{x}" y="{y}" width="1.02" height="1.02" opacity="{0.75 * (1 - value) ** 2:.2f}"/>'
        for y, row in enumerate(attention)
        for x, value in enumerate(row)
    )
    return f'<svg viewBox="0 0 {len(attention[0])} {len(attention)}" aria-hidden="true">{cells}</svg>'
