"""Cells of ICM-LoRA's Table 2: adapters of a small causal language model, generated for kinds of text."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import as_plain
from ..generate import PeftAdapter
from ..runtime.files import load_tensors, save_tensors
from ..runtime.seeds import stream
from .facts import Facts
from .generation import GENERATORS, generator_config
from .settings import key_of
from .world import World

DEFAULTS: dict[str, Any] = {
    "model": {"width": 128, "blocks": 4, "heads": 4},
    "r": 2,
    "length": 128,
    "batch_size": 16,
    "model_steps": 2000,
    "steps": 300,
    "checkpoints": 10,
    "config": {},
}
"""What `language` leaves open."""
TOGETHER = 64
"""Pieces of text in a forward pass."""
HELD_OUT = 0.1
"""Share of each text, at its end, that is tested on."""


class CharacterModel(nn.Module):
    """A causal transformer over characters; `lora` adds low-rank updates to the queries, keys and values of each block.

    Args:
        characters: in its vocabulary.
        length: longest sequence.
        width, blocks, heads: of the transformer.
    """

    def __init__(self, characters: int, length: int, *, width: int, blocks: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.embed: nn.Embedding = nn.Embedding(characters, width)
        self.positions: nn.Embedding = nn.Embedding(length, width)
        self.blocks: nn.ModuleList = nn.ModuleList()
        for _ in range(blocks):
            layers = {"norm1": nn.LayerNorm(width), "qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)}
            layers |= {"norm2": nn.LayerNorm(width), "fc1": nn.Linear(width, 4 * width)}
            self.blocks.append(nn.ModuleDict({**layers, "fc2": nn.Linear(4 * width, width)}))
        self.norm: nn.LayerNorm = nn.LayerNorm(width)
        self.out: nn.Linear = nn.Linear(width, characters)

    def hidden(self, tokens: Tensor, lora: Mapping[str, Tensor] | None = None) -> Tensor:
        """Hidden states [B, T, D] after the final norm, of tokens int64 [B, T]."""
        x = self.embed(tokens) + self.positions.weight[: tokens.shape[1]]
        for i, block in enumerate(self.blocks):
            layer: Any = block
            h = layer["norm1"](x)
            qkv = layer["qkv"](h)
            if lora is not None:
                qkv = qkv + F.linear(F.linear(h, lora[factor(i, "A")]), lora[factor(i, "B")])
            q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + layer["proj"](heads.transpose(1, 2).flatten(2))
            x = x + layer["fc2"](F.gelu(layer["fc1"](layer["norm2"](x))))
        return self.norm(x)

    def loss(self, tokens: Tensor, lora: Mapping[str, Tensor] | None = None) -> Tensor:
        """Mean cross-entropy in nats of each next character, of tokens int64 [B, T]."""
        logits = self.out(self.hidden(tokens[:, :-1], lora))
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def factor(block: int, side: str) -> str:
    """PEFT's key of a factor."""
    return f"base_model.model.blocks.{block}.qkv.lora_{side}.weight"


def language(world: World, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of each text's held-out end: "<text> ppl", the perplexity of the next character, and "<text> bpc", its bits."""
    chosen, seed = settled(settings), settings["seed"]
    method = chosen["method"]
    assert world.read_text is not None
    texts = {name: world.read_text(name) for name in chosen["texts"]}
    known = {c: i for i, c in enumerate(sorted(set("".join(texts.values()))))}
    tokens = {name: torch.tensor([known[c] for c in text], device=world.device) for name, text in texts.items()}
    parts = {name: row.tensor_split([int(len(row) * (1 - HELD_OUT))]) for name, row in tokens.items()}
    folder = model_folder(world, settings)
    model = _model(folder / "model.safetensors", len(known), chosen, {n: p[0] for n, p in parts.items()}, seed).to(
        world.device
    )
    runs = {
        name: [] if method == "plain" else _adapters(folder / name, model, chosen, part[0], seed)
        for name, part in parts.items()
    }
    lora: dict[str, Mapping[str, Tensor] | None] = dict.fromkeys(texts)
    if method == "original":
        lora = {name: run[-1].tensors for name, run in runs.items()}
    elif method != "plain":
        vectors = {name: _vector(model, part[0], chosen["length"]) for name, part in parts.items()}
        made = _generator(world, settings, chosen, runs, vectors)
        lora = {name: made.sample(vectors[name], seed=seed)[0].tensors for name in texts}
    found: dict[str, Any] = {}
    for name, (_, held_out) in parts.items():
        worn = lora[name]
        on_device = None if worn is None else {k: v.to(world.device) for k, v in worn.items()}
        nats = _held_out_loss(model, held_out, chosen["length"], on_device)
        found |= {f"{name} ppl": math.exp(nats), f"{name} bpc": nats / math.log(2)}
    return found


def check(world: World, settings: Mapping[str, Any]) -> None:
    """Make sure that the texts are there and long enough.

    Raises:
        ValueError, FileNotFoundError: they are not.
    """
    chosen = settled(settings)
    generator_config(chosen.get("method", ""), chosen["config"], settings["seed"])
    if not chosen.get("texts") or chosen.get("method") not in (*GENERATORS, "original", "plain"):
        raise ValueError(f"`language` must name `texts` and a `method`, got {sorted(chosen)}.")
    if world.read_text is None:
        raise ValueError("`data` must hold a folder `texts`, got no data.")
    least = int((chosen["length"] + 1) / HELD_OUT) + 1
    for name in chosen["texts"]:
        n = len(world.read_text(name))
        if n < least:
            raise ValueError(f"text {name!r} must have at least {least} characters, got {n}.")


def facts(world: World, settings: Mapping[str, Any]) -> Facts:
    """What moves such a cell."""
    chosen = settled(settings)
    config = generator_config(chosen["method"], chosen["config"], settings["seed"])
    plain = None if config is None else as_plain(config)
    return {**_shared_facts(world, settings), "method": chosen["method"], "config": plain}


def _shared_facts(world: World, settings: Mapping[str, Any]) -> Facts:
    """What moves the model and the adapters of the texts, which all methods share; texts in the order in which they
    are drawn from."""
    assert world.read_text is not None  # checked
    chosen = settled(settings)
    texts = [[name, hashlib.sha256(world.read_text(name).encode()).hexdigest()] for name in chosen["texts"]]
    shared = {name: value for name, value in chosen.items() if name not in ("method", "config", "texts")}
    return {"texts": texts, "language": shared, "seed": settings["seed"]}


def model_folder(world: World, settings: Mapping[str, Any]) -> Path:
    """Where the model and the adapters of the texts are kept."""
    return world.folder("language", _shared_facts(world, settings))


def settled(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`language` with its defaults."""
    given = settings.get("language") or {}
    return {**DEFAULTS, **given, "model": {**DEFAULTS["model"], **(given.get("model") or {})}}


def _draw(row: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(row) - length, (count, 1), generator=generator)
    return row[(starts + torch.arange(length + 1)).to(row.device)]


def _model(path: Path, characters: int, chosen: Any, parts: Mapping[str, Tensor], seed: int) -> CharacterModel:
    """The model, trained on all texts together; from its file where it is there."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=stream(seed, "character model"))))
        model = CharacterModel(characters, chosen["length"], **chosen["model"])
    if path.exists():
        model.load_state_dict(load_tensors(path)[0])
        return model.requires_grad_(False)
    rows = list(parts.values())
    model.to(rows[0].device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(chosen["model_steps"]):
        generator = stream(seed, "text", step)
        row = rows[int(torch.randint(len(rows), (), generator=generator))]
        loss = model.loss(_draw(row, chosen["batch_size"], chosen["length"], generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, {k: v.cpu() for k, v in model.state_dict().items()}, {})
    return model.requires_grad_(False)


def _adapters(folder: Path, model: CharacterModel, chosen: Any, row: Tensor, seed: int) -> list[PeftAdapter]:
    """Checkpoints of a text's adapter, from the last steps of its tuning; all texts start from the same factors."""
    count = chosen["checkpoints"]
    paths = [folder / f"{i:03d}" for i in range(count)]
    if not all(path.exists() for path in paths):
        width, generator = model.norm.weight.shape[0], stream(seed, "factors")
        factors = {}
        for i in range(len(model.blocks)):
            factors[factor(i, "A")] = torch.randn(chosen["r"], width, generator=generator) / width**0.5
            factors[factor(i, "B")] = torch.zeros(3 * width, chosen["r"])
        lora = {key: value.to(row.device).requires_grad_() for key, value in factors.items()}
        optimizer = torch.optim.Adam(lora.values(), lr=1e-2)
        config = {"peft_type": "LORA", "r": chosen["r"], "lora_alpha": chosen["r"], "target_modules": ["qkv"]}
        for step in range(chosen["steps"]):
            loss = model.loss(_draw(row, chosen["batch_size"], chosen["length"], stream(seed, "tune", step)), lora)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            kept = step - (chosen["steps"] - count)
            if kept >= 0:
                tensors = {key: value.detach().cpu().clone() for key, value in lora.items()}
                PeftAdapter(tensors, {**config, "task_type": "CAUSAL_LM"}, folder.name).save(paths[kept])
    return [PeftAdapter.load(path) for path in paths]


@torch.no_grad()
def _vector(model: CharacterModel, row: Tensor, length: int) -> Tensor:
    """The mean hidden state of the last character of pieces of the text (ICM-LoRA, Eq. 1)."""
    pieces = row[: len(row) // length * length].view(-1, length)
    return torch.cat([model.hidden(part)[:, -1] for part in pieces.split(TOGETHER)]).mean(dim=0).cpu()


@torch.no_grad()
def _held_out_loss(model: CharacterModel, row: Tensor, length: int, lora: Mapping[str, Tensor] | None) -> float:
    pieces = row[: (len(row) - 1) // length * length + 1].unfold(0, length + 1, length)
    return sum(model.loss(part, lora).item() * len(part) for part in pieces.split(TOGETHER)) / len(pieces)


def _generator(world: World, settings: Mapping[str, Any], chosen: Any, runs: Any, vectors: Any) -> Any:
    kind = GENERATORS[chosen["method"]]
    path = world.work / "generators" / f"{key_of(facts(world, settings))}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        adapters = [(adapter, vectors[name]) for name, run in runs.items() for adapter in run]
        kind.fit(
            [a for a, _ in adapters],
            [v for _, v in adapters],
            config=generator_config(chosen["method"], chosen["config"], settings["seed"]),
            device=str(world.device),
            quiet=world.quiet,
        ).save(path)
    return kind.load(path)
