"""Links of the Markdown files: each relative one leads to a file and a heading. Nothing is fetched."""

from urllib.parse import unquote, urlsplit

import pytest

from tests.support.markdown import anchors, blocks, commands, links, markdown_files
from tests.support.paths import ROOT

FILES = markdown_files()


def broken(path):
    """The links of a file that lead nowhere, as PATH:LINE: TARGET."""
    found = []
    for line, target in links(path):
        where, url = f"{path.name}:{line}: {target}", urlsplit(target)
        if url.scheme:
            if url.scheme not in ("http", "https", "mailto") or not (url.netloc or url.path):
                found.append(f"{where}: not a web address")
            continue
        other = (path.parent / unquote(url.path)).resolve() if url.path else path
        if not other.is_relative_to(ROOT.resolve()) or not other.exists():
            found.append(f"{where}: there is no such file")
        elif url.fragment and unquote(url.fragment) not in anchors(other):
            found.append(f"{where}: no heading of that name")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    assert not broken(path)


def test_every_page_and_picture_of_docs_is_linked():
    linked = {
        (path.parent / urlsplit(target).path).resolve()
        for path in FILES
        for _, target in links(path)
        if not urlsplit(target).scheme
    }
    pages = [path for path in (ROOT / "docs").rglob("*") if path.suffix in (".md", ".png")]
    assert not [path for path in pages if path.resolve() not in linked]


def test_the_checker_finds_what_is_broken(tmp_path, monkeypatch):
    monkeypatch.setitem(broken.__globals__, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "# A heading: with `code`, and more\n\n## Twice\n\n## Twice\n\n"
        '[good](#a-heading-with-code-and-more) [good](#twice-1) ![good](page.md) <a href="page.md">x</a>\n'
        "`[code](nowhere.md)` [gone](nowhere.md) [no heading](page.md#three) [out](../out.md) [odd](ftp:)\n"
        "```bash\n# a comment\nsmollm --help && ls  # another\n\n[not a link](nowhere.md)\n```\n"
    )
    found = broken(page)
    assert [line.split(": ")[1] for line in found] == ["nowhere.md", "page.md#three", "../out.md", "ftp:"]
    (block,) = blocks(page)
    assert [command.text for command in commands(block)][:2] == ["smollm --help", "ls"]
    assert [command.line for command in commands(block)][:2] == [11, 11]
