"""A hook of mkdocs: pages that show parts of files outside docs/, and links to files that the site does not carry."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
INCLUDE = re.compile(r"<!-- include (\S+): (.*?) -->")
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s]+)(#[^)]*)?\)")


def on_page_markdown(markdown, page, config, files):
    """Fill in what is included, then turn links that leave the site into the names of the files."""
    text = INCLUDE.sub(lambda found: included(found[1], found[2]), markdown)
    here = Path(page.file.src_path).parent

    def link(found):
        target = found[2]
        if "://" in target or files.get_file_from_path((here / target).as_posix()) or (here / target).is_absolute():
            return found[0]
        resolved = (ROOT / "docs" / here / target).resolve()
        if resolved.is_relative_to(ROOT / "docs") and resolved.exists():
            return found[0]
        name = target.removeprefix("../").removeprefix("docs/")
        if files.get_file_from_path(name):
            return f"[{found[1]}]({'../' * (len(here.parts))}{name}{found[3] or ''})"
        return f"{found[1]} (`{name}`)"

    return LINK.sub(link, text)


def included(name, sections):
    """Sections of a file by their titles; "" is what stands above the first, "*" is all but the title."""
    text = (ROOT / name).read_text(encoding="utf-8")
    head, *parts = re.split(r"(?m)^(?=## )", text)
    head = head.partition("\n")[2].strip()
    if sections.strip() == "*":
        return "\n\n".join([head, *parts])
    found = {part.partition("\n")[0][3:]: part for part in parts} | {"": head}
    return "\n\n".join(found[title.strip()] for title in sections.split(";"))
