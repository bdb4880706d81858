"""What every adapter generator is: adapters and task vectors in, adapters for a task vector out, one file."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from numbers import Integral
from os import PathLike
from pathlib import Path
from textwrap import shorten
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..adapters.adapter import Adapter
from ..config import as_config, as_plain
from ..runtime.device import resolve
from ..runtime.files import load_tensors, save_tensors
from ..runtime.seeds import stream
from ..runtime.version import __version__
from .parameters import AnyAdapter, load_adapter
from .task_vectors import check_vector
from .vectors import Layout

FORMAT = "lorarecycle adapter generator"
FORMAT_VERSION = 1

G = TypeVar("G", bound="Generator")


class Examples(NamedTuple):
    """What a generator learns from."""

    vectors: Tensor
    """float32 [n, size]: the flat adapters"""
    tasks: Tensor
    """int64 [n]: row of `conditions`"""
    names: tuple[str, ...]
    """n names of the adapters"""


class Machine(NamedTuple):
    """Where and how a fit runs."""

    device: torch.device
    dtype: torch.dtype
    checkpoint: Path | None
    quiet: bool


class Generator(ABC):
    """Makes adapters for task vectors; `fit` or `load` gives one.

    Attributes:
        layout: how adapters lie in vectors.
        config: settings.
        conditions: float32 [T, W], the different task vectors learnt from.
        class_names: of the heads learnt from, one tuple for each condition; empty tuples without heads.
    """

    method: ClassVar[str]
    config_class: ClassVar[type[Any]]

    def __init__(self, layout: Layout, config: Any, conditions: Tensor, class_names: Sequence[tuple[str, ...]]) -> None:
        self.layout = layout
        self.config = config
        self.conditions = conditions
        self.class_names: tuple[tuple[str, ...], ...] = tuple(map(tuple, class_names))

    @classmethod
    def fit(
        cls: type[G],
        adapters: Iterable[AnyAdapter | str | PathLike[str]],
        task_vectors: Iterable[Any],
        *,
        config: Any = None,
        seed: int | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        checkpoint: str | PathLike[str] | None = None,
        quiet: bool = False,
    ) -> G:
        """Learn from adapters, each with the vector of its task.

        Args:
            adapters: at least two `Adapter` or `PeftAdapter` objects or PEFT folders, of one architecture and the
                same sites; ranks may differ. Those of one task are best checkpoints of one run, and all runs best start
                from the same factors (one `seed` of tuning), as factors are only determined up to a change of basis.
            task_vectors: one array [W] for each adapter; checkpoints of one task have equal ones.
            config: settings, or a mapping of those that differ from the defaults.
            seed: of everything random, in place of the settings'; without effect where nothing is random.
            device, dtype: where and in which precision; the GPU and bfloat16 where there is one, else float32.
            checkpoint: safetensors file written on the way; a fit that was stopped goes on from it, to the same
                bits.
            quiet: no progress bar.

        Returns:
            the generator, on the CPU.

        Raises:
            ValueError, TypeError: fewer than two adapters; adapters of different architectures, sites or kinds;
                parameters or task vectors that are NaN or infinite; another number of task vectors, or widths that
                differ; a checkpoint of another fit.
            OSError: a `checkpoint` that cannot be written there.
        """
        generator, examples = cls._prepare(adapters, task_vectors, config, seed)
        generator._fit(examples, _machine(device, dtype, checkpoint, quiet))
        return generator

    def sample(self, task_vector: Any, n: int = 1, *, seed: int = 0) -> list[AnyAdapter]:
        """Generate adapters for a task.

        A head's class names are those of the training task with this very vector, else numbers.

        Args:
            task_vector: array [W], of a task learnt from or of a new one.
            n: how many.
            seed: of the draws; the same seed gives the same bits, and the first of many are those of fewer.

        Returns:
            n adapters (`PeftAdapter` where those learnt from are).

        Raises:
            ValueError: a task vector of another width, not finite; `n` below 1 or no whole number.
        """
        condition = check_vector(task_vector, self.conditions.shape[1])
        if not isinstance(n, Integral) or n < 1:
            raise ValueError(f"`n` must be a whole number of at least 1, got {n!r}.")
        nearest = self.nearest(condition)
        with torch.no_grad():
            vectors = self._sample(condition, nearest, n, seed)
        return [self._adapter(v, condition, nearest, f"{self.method}-{seed}-{i}") for i, v in enumerate(vectors)]

    def reconstruct(self, adapter: AnyAdapter | str | PathLike[str], task_vector: Any) -> AnyAdapter:
        """What the generator makes of an adapter that it is shown; the error tells how well it can hold it.

        Raises:
            ValueError: an adapter that does not fit, or a task vector of another width.
        """
        condition = check_vector(task_vector, self.conditions.shape[1])
        shown = load_adapter(adapter)
        nearest = self.nearest(condition)
        with torch.no_grad():
            vector = self._reconstruct(self.layout.flatten(shown), condition, nearest)
        return self._adapter(vector, condition, nearest, f"{shown.name}-reconstructed")

    def nearest(self, condition: Tensor) -> int:
        """Row of the training condition with the smallest Euclidean distance."""
        return int((self.conditions - condition).norm(dim=1).argmin())

    def save(self, path: str | PathLike[str]) -> Path:
        """Write one safetensors file: weights, statistics and conditions, with layout and settings as JSON."""
        metadata = {
            "kind": FORMAT,
            "format_version": FORMAT_VERSION,
            "lorarecycle_version": __version__,
            "method": self.method,
            "layout": self.layout.to_json(),
            "config": as_plain(self.config),
            "class_names": [list(names) for names in self.class_names],
        }
        return save_tensors(path, {"conditions": self.conditions, **self._state()}, metadata)

    @classmethod
    def load(cls: type[G], path: str | PathLike[str]) -> G:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: another kind of file, another version, a damaged one, or a generator of another method.
        """
        tensors, metadata = read_file(path)
        if metadata.get("method") != cls.method:
            raise ValueError(
                f"{path} must hold a generator of method {cls.method!r}, got {metadata.get('method')!r}; use "
                "`lorarecycle.generate.load_generator`."
            )
        with _reading(path):
            fields = {k: tuple(v) if isinstance(v, list) else v for k, v in metadata["config"].items()}
            generator = cls(
                Layout.from_json(metadata["layout"]),
                cls.config_class(**fields),
                tensors.pop("conditions"),
                metadata["class_names"],
            )
            if len(generator.class_names) != len(generator.conditions):
                raise ValueError(f"{len(generator.class_names)} class lists for {len(generator.conditions)} conditions")
            generator._set_state(tensors)
            _check_state({"conditions": generator.conditions, **generator._state()}, generator._shapes())
        return generator

    # --- what a method fills in -------------------------------------------------------------------------------

    @abstractmethod
    def _fit(self, examples: Examples, machine: Machine) -> None: ...

    @abstractmethod
    def _sample(self, condition: Tensor, nearest: int, n: int, seed: int) -> Tensor:
        """Flat adapters [n, size]."""

    @abstractmethod
    def _reconstruct(self, vector: Tensor, condition: Tensor, nearest: int) -> Tensor:
        """A flat adapter [size]."""

    @abstractmethod
    def _state(self) -> dict[str, Tensor]: ...

    @abstractmethod
    def _set_state(self, tensors: dict[str, Tensor]) -> None: ...

    @abstractmethod
    def _shapes(self) -> dict[str, tuple[int | None, ...]]:
        """Shapes of the tensors of `_state` that no network checks; None is any size."""

    # --- shared -----------------------------------------------------------------------------------------------

    @classmethod
    def _prepare(
        cls, adapters: Iterable[Any], task_vectors: Iterable[Any], config: Any, seed: int | None
    ) -> tuple[Any, Examples]:
        config = as_config(cls.config_class, config)
        if type(config) is not cls.config_class:  # that of a method with more settings
            raise TypeError(
                f"`config` must be a {cls.config_class.__name__} or a mapping, got {type(config).__name__}."
            )
        if seed is not None and hasattr(config, "seed"):
            config = replace(config, seed=seed)
        if isinstance(adapters, (str, PathLike, Adapter)):
            raise TypeError("`adapters` must be a list of adapters, each with its task vector, got a single one.")
        given = [load_adapter(adapter) for adapter in adapters]
        if len(given) < 2:
            raise ValueError(
                f"`adapters` must hold at least two adapters or checkpoints, got {len(given)}; keep those of the last "
                "epochs with `lorarecycle tune --save-last 50`."
            )
        vectors = [check_vector(v, what=f"`task_vectors[{i}]`") for i, v in enumerate(task_vectors)]
        if len(vectors) != len(given):
            raise ValueError(f"`task_vectors` must be one for each of the {len(given)} adapters, got {len(vectors)}.")
        widths = sorted({len(vector) for vector in vectors})
        if len(widths) > 1:
            raise ValueError(f"`task_vectors` must have one width, got {widths}; make them with one encoder.")
        conditions, tasks = torch.stack(vectors).unique(dim=0, return_inverse=True)
        layout = Layout.of(given, heads=config.heads)
        flat = torch.stack([layout.flatten(adapter) for adapter in given])
        class_names: list[tuple[str, ...]] = [()] * len(conditions)
        for adapter, task in zip(given, tasks.tolist(), strict=True):
            if layout.has_heads and isinstance(adapter, Adapter) and adapter.head is not None:
                known, own = class_names[task], adapter.head.class_names
                if known and own != known:
                    raise ValueError(
                        f"`task_vectors` must differ between tasks, got one for adapter {adapter.name!r} of classes "
                        f"{', '.join(own)} and one of {', '.join(known)}; give each task its own, or leave heads out "
                        "(heads=False)."
                    )
                class_names[task] = own
        return cls(layout, config, conditions, class_names), Examples(flat, tasks, tuple(a.name for a in given))

    def _adapter(self, vector: Tensor, condition: Tensor, nearest: int, name: str) -> AnyAdapter:
        known = torch.allclose(self.conditions[nearest], condition)
        return self.layout.unflatten(vector, name=name, class_names=self.class_names[nearest] if known else ())


def read_file(path: str | PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a generator's file; see `Generator.load`."""
    tensors, strings = load_tensors(path)
    if strings.get("kind") != json.dumps(FORMAT):
        raise ValueError(f"{path} must be a generator's file, got another; make one with `lorarecycle generate fit`.")
    with _reading(path):
        metadata = {key: json.loads(value) for key, value in strings.items() if key != "format"}
    if metadata.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"`format_version` of {path} must be {FORMAT_VERSION}, got {metadata.get('format_version')} (written by "
            f"lorarecycle {metadata.get('lorarecycle_version')}); fit it again, or use that version of lorarecycle."
        )
    return tensors, metadata


@contextmanager
def _reading(path: str | PathLike[str]) -> Iterator[None]:
    """Says which file is at fault, whatever its content breaks."""
    try:
        yield
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = shorten(f"{type(error).__name__}: {error}", 200)
        raise ValueError(
            f"{path} must hold all that a generator's `save` wrote, got a file that does not load ({reason}); fit it "
            "again, or use the version of lorarecycle that wrote it."
        ) from error


def _check_state(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int | None, ...]]) -> None:
    for name, tensor in tensors.items():
        if not name.startswith("losses.") and not torch.isfinite(tensor).all():
            raise ValueError(f"{name} is NaN or infinite")
    for name, shape in shapes.items():
        found = tuple(tensors[name].shape)
        if len(found) != len(shape) or any(size not in (None, own) for size, own in zip(shape, found, strict=True)):
            raise ValueError(f"{name} is {list(found)}, not {list(shape)}")


def draws(shape: Sequence[int], n: int, seed: int, *names: object) -> Tensor:
    """n standard normal draws [n, *shape], the i-th the same for every n."""
    return torch.stack([torch.randn(*shape, generator=stream(seed, *names, i)) for i in range(n)])


def _machine(device: Any, dtype: Any, checkpoint: str | PathLike[str] | None, quiet: bool) -> Machine:
    where, precision = resolve(device, dtype)
    if where.type == "cpu" and dtype in (None, "auto"):
        precision = torch.float32
    if precision is torch.float16:  # gradients underflow without a scaler of the loss
        raise ValueError("`dtype` must be float32 or bfloat16 for a fit, got float16.")
    return Machine(where, precision, None if checkpoint is None else Path(checkpoint).expanduser(), quiet)
