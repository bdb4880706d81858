"""README.md of a saved adapter: base, configuration, versions, and what went in."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence

from ...runtime.hub import is_hub_id
from ..value import AdapterValue

OWN_TAG = "lorarecycle"
"""Among the Hub's metadata of every card that is written here."""


def write_card(
    adapter: AdapterValue,
    *,
    layout: str,
    model_class: str,
    versions: Mapping[str, str],
    config: Mapping[str, object] | None,
    sources: Sequence[AdapterValue],
) -> str:
    """The text of the model card, with the Hub's metadata in front.

    `base_model` is among the metadata where it is a Hub id: the Hub refuses cards with any other.

    Args:
        adapter: what is saved.
        layout, model_class: the names it is saved under, and the class they belong to.
        versions: library -> version.
        config: settings of the run that made it.
        sources: the adapters that went in.
    """
    from huggingface_hub import ModelCard, ModelCardData

    tags = ["lora", "peft", "vision-transformer", OWN_TAG, *(["few-shot"] if sources else [])]
    base_model = adapter.base_model if is_hub_id(adapter.base_model) else None
    data = ModelCardData(library_name="peft", base_model=base_model, tags=tags)
    lines = [f"# {adapter.name}", "", _summary(adapter, sources), "", *_usage(adapter, layout, model_class), ""]
    lines += ["## Contents", "", "| | |", "| --- | --- |"]
    lines += [f"| {key} | {_cell(value)} |" for key, value in _facts(adapter, layout, model_class).items()]
    if sources:
        lines += ["", "## Made from", "", "| adapter | base model | SHA-256 |", "| --- | --- | --- |"]
        lines += [f"| {_cell(one.name)} | {_cell(one.base_model or 'unknown')} | `{one.digest()}` |" for one in sources]
    if config:
        lines += [
            "",
            "## Configuration",
            "",
            "```json",
            json.dumps(dict(config), indent=2, default=str),
            "```",
        ]
    lines += ["", "## Versions", "", ", ".join(f"{name} {version}" for name, version in versions.items())]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n"))


def _summary(adapter: AdapterValue, sources: Sequence[AdapterValue]) -> str:
    origin = f", recycled from {len(sources)} adapters without their training data" if sources else ""
    head = f"with a linear head over {len(adapter.head.class_names)} classes" if adapter.head else "without a head"
    return f"LoRA factors for a Vision Transformer ({adapter.base_model or 'base unknown'}), {head}{origin}."


def _usage(adapter: AdapterValue, layout: str, model_class: str) -> list[str]:
    return [
        "```python",
        "import lorarecycle",
        'adapter = lorarecycle.Adapter.from_pretrained("path/to/this/folder")  # or this repository\'s id on the Hub',
        "```",
        "",
        f"or with PEFT, onto a `{model_class}` (the names inside the file are of that class; on any other PEFT applies "
        "nothing and only warns, so save again with the `layout` of the class that you load):",
        "",
        "```python",
        *_loading(adapter, layout, model_class),
        "```",
    ]


def _loading(adapter: AdapterValue, layout: str, model_class: str) -> list[str]:
    base = adapter.base_model or "the base model"
    classes = len(adapter.head.class_names) if adapter.head is not None else 0
    labels = f", num_labels={classes}" if classes and "Classification" in model_class else ""
    if layout == "timm":
        name = base if not is_hub_id(base) else f"hf_hub:{base}"
        load = ["import timm", f"base = timm.create_model({name!r}, pretrained=True, num_classes={classes})"]
    else:
        load = [
            f"from transformers import {model_class}",
            f"base = {model_class}.from_pretrained({base!r}{labels})",
        ]
    return ["from peft import PeftModel", *load, 'model = PeftModel.from_pretrained(base, "path/to/this/folder")']


def _facts(adapter: AdapterValue, layout: str, model_class: str) -> dict[str, str]:
    layers = Counter(site.split(".", 2)[2] for site in adapter.sites)
    facts = {
        "sites": ", ".join(f"{layer} x {count}" for layer, count in layers.items()),
        "ranks": ", ".join(map(str, sorted(set(adapter.ranks.values())))),
        "layout": f"{layout} ({model_class})",
    }
    if adapter.head is not None:
        facts["classes"] = ", ".join(adapter.head.class_names)
        facts["head reads"] = adapter.head.pool
    if adapter.mean is not None and adapter.std is not None:
        facts["input normalisation"] = f"mean {list(adapter.mean)}, std {list(adapter.std)}"
    facts["SHA-256 of the content"] = f"`{adapter.digest()}`"
    return facts


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
