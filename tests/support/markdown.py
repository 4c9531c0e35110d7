"""The Markdown files of the checkout: their code blocks, commands, headings and links."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.support.paths import ROOT

CHAIN = r" && (?=(?:[^']*'[^']*')*[^']*$)"  # outside of quotes
PASSED_OVER = {"runs", "build", "dist", "node_modules"}


class Block(NamedTuple):
    """A fenced block: its language, its text, the line of its first line."""

    language: str
    text: str
    line: int


class Command(NamedTuple):
    """A command of a `bash` block, with the line it stands on."""

    text: str
    line: int


def markdown_files() -> list[Path]:
    """Return every Markdown file, without hidden folders and folders of results."""
    return sorted(
        path
        for path in ROOT.rglob("*.md")
        if not any(part in PASSED_OVER or part[0] == "." for part in path.relative_to(ROOT).parts)
    )


def blocks(path: Path) -> list[Block]:
    """Return the fenced blocks of a file."""
    found, start, language = [], None, ""
    lines = path.read_text("utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.startswith("```"):
            continue
        if start is None:
            start, language = number, line[3:].strip()
        else:
            found.append(Block(language, "\n".join(lines[start : number - 1]), start + 1))
            start = None
    assert start is None, f"{path}:{start}: the block has no end"
    return found


def commands(block: Block) -> list[Command]:
    """Return the commands of a block, one per line or per part of a chain, without comments.

    A block that begins with #! is one script.
    """
    if block.text.startswith("#!"):
        return [Command(block.text, block.line)]
    found = []
    for number, line in enumerate(block.text.splitlines(), start=block.line):
        text = re.sub(r"(^|\s+)# .*$", "", line).strip()
        found += [Command(part.strip(), number) for part in re.split(CHAIN, text) if part.strip()]
    return found


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines outside of fenced blocks, without inline code, with their numbers."""
    inside = False
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        if line.startswith("```"):
            inside = not inside
        elif not inside:
            yield number, re.sub(r"`[^`]*`", "``", line)


def links(path: Path) -> list[tuple[int, str]]:
    """Return the targets of links and images, with their lines."""
    pattern = r"\]\(\s*<?([^)\s>]+)>?[^)]*\)|^\[[^\]]+\]:\s+(\S+)|(?:src|href)=\"([^\"]+)\""
    return [
        (number, next(filter(None, match))) for number, line in prose(path) for match in re.findall(pattern, line)
    ]


def anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a file."""
    found: list[str] = []
    inside = False
    for line in path.read_text("utf-8").splitlines():
        inside ^= line.startswith("```")
        if not inside and (heading := re.match(r"#{1,6}\s+(.*?)\s*#*$", line)):
            words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1]).lower()
            slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
            found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return set(found)
