"""The one way to stop and go on: a training loop's weights, optimiser and history in one file."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .files import load_tensors, remove_leftovers, require_place, save_tensors

logger: logging.Logger = logging.getLogger(__name__)

KIND = "lorarecycle training checkpoint"
FORMAT_VERSION = 1


class Checkpoint:
    """A safetensors file that a training loop writes on the way, and goes on from to the same bits.

    The loop draws what is random in a step from `seeds.stream(seed, ..., step)`, so that nothing random is stored.
    Settings of the optimiser, such as the learning rate, are not stored either: the loop sets them.

    Args:
        path: the file; None for no checkpoint, where `write` does nothing and `resume` starts at 0.
        run: JSON that says which training this is, part by part, such as settings, seed and digests of what is
            learnt from. A file of another one is refused by naming the parts.
        modules: what is trained, by name.
        optimizer: over parameters of `modules`.
        histories: name -> float32 [steps], one value a step. Those that a file has beyond them are added.
        steps: of the whole training.

    Raises:
        OSError: `path` is a folder, or lies where no file can be made.
    """

    def __init__(
        self,
        path: str | PathLike[str] | None,
        run: Mapping[str, Any],
        *,
        modules: Mapping[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        histories: dict[str, Tensor],
        steps: int,
    ) -> None:
        self.path: Path | None = None if path is None else Path(path).expanduser()
        if self.path is not None:
            require_place(self.path, "checkpoint")
        self._run: dict[str, Any] = json.loads(json.dumps(dict(run)))
        self._modules, self._optimizer, self._histories, self._steps = modules, optimizer, histories, steps

    def write(self, step: int) -> None:
        """Write what the first `step` steps have learnt; an earlier file stays whole until then.

        Raises:
            FloatingPointError: weights, optimiser or history are NaN or infinite: nothing could go on from them.
            OSError: writing failed.
        """
        if self.path is None:
            return
        tensors = self._weights()
        for name, parameter in self._parameters():
            state = self._optimizer.state.get(parameter, {})
            tensors |= {f"optimizer.{name}.{k}": value for k, value in state.items() if isinstance(value, Tensor)}
        tensors |= {f"history.{name}": values[:step] for name, values in self._histories.items()}
        for name, tensor in tensors.items():
            if not _is_finite(tensor):
                raise FloatingPointError(f"{name} became NaN or infinite by step {step}; lower `lr`.")
        facts = {"kind": KIND, "format_version": FORMAT_VERSION, "run": self._run, "step": step}
        save_tensors(self.path, tensors, {**facts, "names": sorted(tensors)})

    def resume(self) -> int:
        """Load the file where there is one; the number of steps done. Of a file that is refused nothing is loaded.

        Raises:
            ValueError: a file that is damaged, of another kind, or of another training.
        """
        if self.path is None:
            return 0
        remove_leftovers(self.path.parent)
        if not self.path.exists():
            return 0
        tensors, strings = load_tensors(self.path)
        step = self._check_facts(strings, tensors)
        for name, tensor in self._weights().items():
            self._require(tensors, name, tensor.shape, tensor.dtype)
        states = self._states(tensors)
        past = {name.removeprefix("history."): tensors[name] for name in tensors if name.startswith("history.")}
        for name in past:
            self._require(tensors, f"history.{name}", torch.Size([step]), torch.float32)

        for prefix, module in self._modules.items():
            module.load_state_dict({name: tensors[f"{prefix}.{name}"] for name in module.state_dict()})
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": states, "param_groups": groups})
        for name, values in past.items():
            if name not in self._histories:
                self._histories[name] = values.new_zeros(self._steps, device=next(self._parameters())[1].device)
            self._histories[name][:step] = values.to(self._histories[name].device)
        logger.info("going on from %s after %d of %d steps", self.path, step, self._steps)
        return step

    def remove(self) -> None:
        """Remove the file, once the training's result is safe elsewhere."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _weights(self) -> dict[str, Tensor]:
        return {
            f"{prefix}.{name}": tensor
            for prefix, module in self._modules.items()
            for name, tensor in module.state_dict().items()
        }

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for prefix, module in self._modules.items():
            for name, parameter in module.named_parameters():
                yield f"{prefix}.{name}", parameter

    def _check_facts(self, strings: Mapping[str, str], tensors: Mapping[str, Tensor]) -> int:
        """The step of a file that is whole and of this training."""
        try:
            facts = {key: json.loads(value) for key, value in strings.items() if key != "format"}
        except (ValueError, RecursionError):
            facts = {}
        if facts.get("kind") != KIND:
            raise self._refusal("a training's checkpoint", "another kind of file")
        if facts.get("format_version") != FORMAT_VERSION:
            raise self._refusal(f"of format {FORMAT_VERSION}", f"format {facts.get('format_version')!r:.40}")
        names = facts.get("names")
        missing = sorted(set(map(str, names if isinstance(names, list) else ())) ^ set(tensors))
        if missing:
            raise self._refusal("whole", f"one with {missing[0][:80]} missing or added")
        run = facts.get("run")
        if run != self._run:
            parts = ", ".join(differences(run if isinstance(run, dict) else {}, self._run))
            raise ValueError(
                f"`checkpoint` {self.path} must be of this training, got one that differs in {parts}; take the "
                "settings and data of that training, choose another file, or remove this one to start anew."
            )
        step = facts.get("step")
        if type(step) is not int or not 1 <= step <= self._steps:
            raise self._refusal(f"of step 1 to {self._steps}", f"step {step!r:.40}")
        return step

    def _states(self, tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
        """State of each parameter, by its place in the optimiser, as `Optimizer.load_state_dict` takes it."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                owner, _, key = name.removeprefix("optimizer.").rpartition(".")
                found.setdefault(owner, {})[key] = tensor
        parameters = dict(self._parameters())
        places = {id(p): i for i, p in enumerate(p for group in self._optimizer.param_groups for p in group["params"])}
        keys = next(iter(found.values()), {}).keys()
        for owner, state in found.items():
            if owner not in parameters or id(parameters[owner]) not in places or state.keys() != keys:
                raise self._refusal("of the same optimiser and weights", f"one with {sorted(state)} for {owner}")
            for key, tensor in state.items():
                like = parameters[owner]
                shape, dtype = ((), torch.float32) if tensor.ndim == 0 else (like.shape, like.dtype)
                self._require(tensors, f"optimizer.{owner}.{key}", torch.Size(shape), dtype)
        return {places[id(parameters[owner])]: state for owner, state in found.items()}

    def _require(self, tensors: Mapping[str, Tensor], name: str, shape: torch.Size, dtype: torch.dtype) -> None:
        if name not in tensors:
            raise self._refusal("whole", f"one without {name}")
        found = tensors[name]
        if found.shape != shape or found.dtype != dtype:
            raise self._refusal(f"{dtype} {list(shape)} in {name}", f"{found.dtype} {list(found.shape)}")
        if not _is_finite(found):
            raise self._refusal(f"finite in {name}", "NaN or infinite values")

    def _refusal(self, rule: str, found: str) -> ValueError:
        return ValueError(
            f"`checkpoint` {self.path} must be {rule}, got {found}; choose another file, or remove this one to start "
            "anew."
        )


def recorded_run(path: Path) -> Mapping[str, Any]:
    """The `run` of a checkpoint, unchecked; empty where no file can be read: `Checkpoint.resume` says why."""
    try:
        run = json.loads(load_tensors(path)[1]["run"]) if path.exists() else {}
    except (ValueError, KeyError, OSError, RecursionError):
        run = {}
    return run if isinstance(run, dict) else {}


def differences(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What two JSON objects differ in: "config.lr (0.1 there, 0.2 here)", or the bare name of what is long."""
    found: list[str] = []
    for key in dict.fromkeys([*here, *there]):
        old, new = there.get(key), here.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new or (key in there) != (key in here):
            values = [json.dumps(value) for value in (old, new)]
            short = all(len(value) <= 40 for value in values)
            found.append(f"{prefix}{key}" + (f" ({values[0]} there, {values[1]} here)" if short else ""))
    return found


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
