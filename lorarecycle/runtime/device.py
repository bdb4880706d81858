"""What the machine can do: default device and precision."""

from __future__ import annotations

import torch

from .distributed import local_rank


def default_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu":
        checks = (getattr(torch.cpu, n, None) for n in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
        return torch.bfloat16 if any(check() for check in checks if check) else torch.float32
    return torch.float32


def resolve(device: str | torch.device | None, dtype: str | torch.dtype | None) -> tuple[torch.device, torch.dtype]:
    """Device and dtype with the defaults filled in.

    Args:
        device: None or "auto" for the default. Of several GPUs each of torchrun's processes gets its own.
        dtype: None or "auto" for the default; or a dtype, or one of "float32", "bfloat16", "float16".

    Raises:
        ValueError: no such device or dtype here.
    """
    try:
        chosen = default_device() if device in (None, "auto") else torch.device(device)  # type: ignore[arg-type]
    except RuntimeError as error:
        raise ValueError(
            f"`device` must be 'auto', 'cpu', 'cuda', 'cuda:1' or another of PyTorch's, got {device!r}."
        ) from error
    own = local_rank()
    if chosen == torch.device("cuda") and own is not None:  # torchrun: each process has a GPU of its own
        chosen = torch.device("cuda", own)
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"`device` must be one that this machine has, got {str(chosen)!r} without a GPU; use 'cpu'.")
    try:
        torch.empty(0, device=chosen)
    except (RuntimeError, NotImplementedError, AssertionError) as error:  # PyTorch was built without it, or so many
        reason = str(error).split("\n")[0]
        raise ValueError(f"`device` must be one that this machine has, got {str(chosen)!r}: {reason}") from error
    if dtype in (None, "auto"):
        return chosen, default_dtype(chosen)
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    found = names.get(dtype) if isinstance(dtype, str) else dtype
    if found not in names.values():
        raise ValueError(f"`dtype` must be one of {tuple(names)}, got {dtype!r}.")
    assert found is not None
    return chosen, found
