"""Files that are whole or absent: written aside, flushed, then put in place."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import owner
from .digests import KEY, check_digests, make_digests
from .settled import read_settled

if TYPE_CHECKING:  # the exported session writes files without torch
    from torch import Tensor

LEFTOVER = ".partly-written-"
"""How the names of hidden folders start: `.partly-written-HOST-PID-MACHINE.rRANK.XXXX`."""
MAX_JSON = 100_000_000
"""Bytes of a JSON file that is read."""
OLD = 7 * 24 * 3600.0
"""Seconds without a change after which a leftover is nobody's, whoever wrote it."""
_NO_CROSSING = {errno.EXDEV, errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_POINTER = b"version https://git-lfs.github.com"
_PICKLE = re.compile(rb"PK\x03\x04.*data\.pkl|\x80\x02\x8a\nl\xfc\x9cF", re.DOTALL)
"""How files of `torch.save` start, today's and those of years ago."""
_NAME = re.compile(re.escape(LEFTOVER) + r"(?P<host>.+)-(?P<pid>\d+)-(?:(?P<space>\d*)\.)?(?:r\d+\.)?[^-.]+")


def write_atomic(path: str | PathLike[str], write: Callable[[Path], object]) -> Path:
    """Write a file through `write(temporary_path)` and put it in place in one step.

    Whatever goes wrong on the way (disk full, process killed), an earlier file at `path` stays whole. The temporary
    file has the same name, in a hidden folder beside: what the writing library puts next to it goes with it. Its rights
    are what the umask leaves. What processes that are gone left beside is removed.

    Raises:
        OSError: writing failed; the message names the file. Nothing is left then, folders made here included.
    """
    path = Path(path).expanduser()
    remove_leftovers(path.parent)
    changed = [path.parent, *holders_of_new(path.parent)]
    try:
        with hidden_folder(path.parent) as folder:
            temporary = folder / path.name
            write(temporary)
            flush(temporary)
            move(temporary, path)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {reason(error)}; an earlier file is unchanged") from error
    for folder in changed:
        flush_folder(folder)
    return path


def require_place(path: str | PathLike[str], name: str, *, folder: bool = False) -> None:
    """Make sure, before any work, that something can be written at a place: a hidden folder is made there and removed.

    Args:
        path: the file or folder to be written; nothing of it is made.
        name: what the caller's user calls it, such as "--output", for messages.
        folder: a folder is to be written, not a file.

    Raises:
        OSError: it cannot, or something else is there; the message names argument, path and reason.
    """
    real = Path(os.path.realpath(os.path.expanduser(path)))
    is_folder = os.path.isdir(real)
    if folder and os.path.exists(real) and not is_folder:
        raise NotADirectoryError(f"`{name}` must be a folder or new, got the file {path}; choose another.")
    if not folder and is_folder:
        raise IsADirectoryError(f"`{name}` must be a file, got the folder {path}; name a file in it.")
    above = (one for one in real.parents if os.path.exists(one))
    there = real if folder and is_folder else next(above, real.parent)  # none exists on a drive that is absent
    try:
        with suppress(FileNotFoundError, NotADirectoryError):
            os.stat(real)  # may be hidden from this user, or have a name that is too long
        with hidden_folder(there):
            pass
    except OSError as error:
        raise type(error)(
            f"`{name}` must be a place that can be written to, got {path}: {reason(error)}; choose another."
        ) from error


@contextmanager
def hidden_folder(parent: str | PathLike[str]) -> Iterator[Path]:
    """A new hidden folder in `parent`, which is made where it is absent.

    Its name says which process on which host writes there, so that nobody else takes it for a leftover. It is removed
    at the end with all that is in it; so are parents made here that are empty then.
    """
    parent = Path(parent)
    made = _absent(parent)
    folder = parent / _hidden_name()
    try:
        folder.mkdir(parents=True)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for empty in made:
            with suppress(OSError):  # holds something now, or could not be made
                empty.rmdir()


def holders_of_new(folder: Path) -> list[Path]:
    """The folders in which a name appears when a folder is made with its parents."""
    return [made.parent for made in _absent(folder)]


def _absent(folder: Path) -> list[Path]:
    """Of a folder and its parents, those that are not there yet."""
    return [path for path in (folder, *folder.parents) if not os.path.exists(path)]


def _hidden_name() -> str:
    """A new name that says whose it is."""
    return f"{LEFTOVER}{owner.host()}-{os.getpid()}-{owner.machine()}.r{owner.rank()}.{secrets.token_hex(4)}"


def remove_leftovers(folder: str | PathLike[str]) -> None:
    """Remove what writers left in a folder when they were killed: processes of this host that are gone.

    What living processes, other machines (of the same name too) or other containers may be writing stays, unless that
    is `OLD` and not of a living process of this host.
    """
    for path in Path(folder).glob(f"{LEFTOVER}*"):
        abandoned = _is_abandoned(path.name)
        if not (_age(path) > OLD if abandoned is None else abandoned):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


def flush(file: Path) -> None:
    """Bring a file in a hidden folder to the disk, with the rights that the umask left to the folder."""
    with open(file, "rb+") as opened:
        os.fsync(opened.fileno())
    file.chmod(file.parent.stat().st_mode & 0o666)  # some libraries write for the owner's eyes only


def flush_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the file system can."""
    with suppress(OSError):  # not all can
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def move(source: Path, target: Path) -> None:
    """Put a file in the place of another in one step, by way of a copy beside it where folders cannot be crossed."""
    try:
        os.replace(source, target)
        return
    except OSError as error:
        if error.errno not in _NO_CROSSING:
            raise
    beside = target.with_name(_hidden_name())
    try:
        shutil.copyfile(source, beside)
        shutil.copymode(source, beside)
        with open(beside, "rb+") as opened:
            os.fsync(opened.fileno())
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def reason(error: OSError) -> str:
    """What went wrong at first, in the system's words."""
    while isinstance(error.__cause__, OSError):
        error = error.__cause__
    return error.strerror or str(error)


def _age(path: Path) -> float:
    """Seconds since anything in a leftover changed, by the file system's own clock; 0 where that cannot be told."""
    try:
        with tempfile.TemporaryFile(dir=path.parent) as probe:
            now = os.fstat(probe.fileno()).st_mtime
        return now - max(found.lstat().st_mtime for found in (path, *path.rglob("*")))
    except OSError:
        return 0.0


def _is_abandoned(name: str) -> bool | None:
    """Whether the process that a leftover is of is gone; None where that cannot be told."""
    found = _NAME.fullmatch(name)
    if found is None or found["host"] != owner.host() or found["space"] != owner.machine():
        return None  # machines may share a name, and a disk
    return owner.is_gone(int(found["pid"]))


def write_text(path: str | PathLike[str], text: str) -> Path:
    """Write UTF-8 text atomically."""
    return write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: str | PathLike[str], content: object) -> Path:
    """Write JSON atomically, keys in the order given."""
    return write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: str | PathLike[str]) -> Any:
    """Read JSON.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, nested too deep or too large; the message names the file and the place.
    """
    path = Path(path).expanduser()
    if path.exists() and not path.is_file():  # a folder, a pipe, a device
        raise ValueError(f"{path} must be a JSON file, got something else of that name; choose the file.")
    try:
        size = path.stat().st_size
        if size > MAX_JSON:
            raise ValueError(f"{path} must be JSON of at most {MAX_JSON} bytes, got {size}; fetch the file again.")
        return json.loads(path.read_text(encoding="utf-8-sig"), parse_int=_integer)
    except RecursionError:
        raise ValueError(f"{path} must be JSON, got brackets nested too deep; fetch the file again.") from None
    except (json.JSONDecodeError, UnicodeDecodeError, OverflowError) as error:
        refuse_pointer(path)
        raise ValueError(
            f"{path} must be JSON, got text that does not parse ({str(error)[:200]}); fetch the file again."
        ) from error


def _integer(digits: str) -> int:
    if len(digits) > 1000:
        raise OverflowError(f"a number of {len(digits)} digits")
    return int(digits)


def read_object(path: str | PathLike[str]) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, or another value; the message names the file.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}; fetch the file again.")
    return content


@contextmanager
def naming(path: str | PathLike[str]) -> Iterator[None]:
    """Puts the file's name before a ValueError of the block that does not name it."""
    try:
        yield
    except ValueError as error:
        if type(error) is not ValueError or str(path) in str(error):
            raise
        raise ValueError(f"{path}: {error}") from error


def hash_file(path: Path) -> str:
    """SHA-256 of a file, hex."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def refuse_pointer(path: str | PathLike[str]) -> None:
    """Raises ValueError where a file is what a clone without Git LFS holds in the place of a large one."""
    with suppress(OSError), open(path, "rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise ValueError(f"{path} must be the file itself, got a Git LFS pointer; fetch it with `git lfs pull`.")


def refuse_pickles(folder: Path, pattern: str, loader: str) -> None:
    """Raise where a folder without safetensors holds pickle files.

    Args:
        folder: where the weights should be.
        pattern: glob of the pickle files' names.
        loader: what turns such a file into safetensors, and how.

    Raises:
        ValueError: a file matches; the message names it.
    """
    pickles = sorted(found.name for found in folder.glob(pattern))
    if pickles:
        raise ValueError(
            f"weights must be safetensors, got only the pickle file {pickles[0]} in {folder}, which can run code when "
            f"it is read; where you trust it, load it with {loader}."
        )


def save_tensors(
    path: str | PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, object] | None = None,
    *,
    digests: bool = True,
) -> Path:
    """Write a safetensors file atomically.

    Args:
        path: the file.
        tensors: on any device.
        metadata: values are stored as JSON.
        digests: store hashes of all that, which `load_tensors` checks.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    meta = {"format": "pt", **{key: json.dumps(value) for key, value in (metadata or {}).items()}}
    if digests:
        meta[KEY] = make_digests(plain, meta)

    def write(temporary: Path) -> None:
        try:
            save_file(plain, str(temporary), metadata=meta)
            _sort_header(temporary)
        except SafetensorError as error:  # disk full arrives as one of these
            raise OSError(None, str(error)) from error

    return write_atomic(path, write)


def _sort_header(path: Path) -> None:
    """Bring the metadata of a safetensors file into one order: the library's differs from call to call."""
    with open(path, "rb+") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))


def load_tensors(path: str | PathLike[str], *, skip: Collection[str] = ()) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file: tensors on the CPU, and the metadata as stored (strings), without digests.

    Args:
        path: the file.
        skip: names of tensors that are not read.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, corrupt or no safetensors file; not what its digests say; a Git LFS pointer.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}.")
    # safetensors opens a file twice: for its header, and for its numbers
    return read_settled(path.parent, (path.name,), lambda: _load_tensors(path, skip))


def _load_tensors(path: Path, skip: Collection[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            names = [name for name in file.keys() if name not in skip]  # noqa: SIM118
            tensors, strings = {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except (SafetensorError, OSError, RuntimeError) as error:  # the last is torch's
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}.") from None
        refuse_pointer(path)
        with suppress(OSError), open(path, "rb") as file:
            if _PICKLE.match(file.read(400)):
                raise ValueError(
                    f"{path} must be a safetensors file, got one of `torch.save`, which can run code when it is read; "
                    "load it with `torch.load(file, weights_only=True)` and write the tensors in it with "
                    "`safetensors.torch.save_file`."
                ) from None
        raise ValueError(
            f"{path} must be a whole safetensors file, got one that does not read ({str(error)[:200]}); fetch or make "
            "it again."
        ) from error
    return tensors, check_digests(path, tensors, strings, skip=skip)
