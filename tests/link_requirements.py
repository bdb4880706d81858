"""Links what the wheel in an environment declares that it needs, and nothing else, from this environment into it.

    .venv/bin/python tests/link_requirements.py .wheel-venv

An import of what is not declared fails there as it would elsewhere, without two minutes and 5 GB for another torch.
"""

import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def declared(of: Distribution, extras: Iterable[str], found: dict[tuple[str, frozenset[str]], Distribution]) -> None:
    """Add to `found`, by name and extras, what `of` with its `extras` needs, and what those need."""
    for text in of.requires or ():
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            key = canonicalize_name(requirement.name), frozenset(requirement.extras)
            if key not in found:
                found[key] = distribution(requirement.name)
                declared(found[key], requirement.extras, found)


def main() -> None:
    python = Path(sys.argv[1], "bin", "python")
    command = "import sysconfig; print(sysconfig.get_path('purelib'))"
    there = Path(subprocess.check_output([python, "-c", command], text=True).strip())
    (wheel,) = Distribution.discover(name="lorarecycle", path=[str(there)])
    found: dict[tuple[str, frozenset[str]], Distribution] = {}
    declared(wheel, (), found)
    for needed in found.values():
        for top in {file.parts[0] for file in needed.files or ()} - {"..", "__pycache__"}:
            if not (there / top).exists():
                (there / top).symlink_to(Path(needed.locate_file(top)).resolve())


if __name__ == "__main__":
    main()
