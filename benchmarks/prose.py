"""Make a text corpus from Debian's documentation packages: `python -m benchmarks.prose --out texts`.

Needs apt and dpkg-deb, and Debian's package index, but no root. A document is a page. Its paragraphs are kept if
they read as prose, and only the first time. Every hundredth document, by a hash of its name, is held out. Two
Parquet files, compressed with zstd, travel to machines that reach nothing else.
"""

from __future__ import annotations

import gzip
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from benchmarks.harness.tables import as_command, finish
from smollm_jax.runtime.errors import UserError, require
from smollm_jax.runtime.files import written_aside

# English manuals, guides and references with much running text, the largest kinds first
PACKAGES = (
    "debian-handbook debian-reference-en debian-policy developers-reference debian-faq maint-guide linux-doc "
    "python3-doc postgresql-doc libreoffice-help-en-us gimp-help-en git-doc rust-doc octave-doc maxima-doc "
    "r-doc-html erlang-doc ghc-doc libboost-doc sqlite3-doc emacs-common-non-dfsg mesa-common-dev cmake-doc "
    "python-numpy-doc python-scipy-doc python-matplotlib-doc python-pandas-doc python-sklearn-doc "
    "python-django-doc python-sqlalchemy-doc sphinx-doc samba-doc apache2-doc nginx-doc bind9-doc ntp-doc "
    "postfix-doc exim4-doc-html gnuplot-doc gnucash-docs kicad-doc-en inkscape-tutorials lilypond-doc-html "
    "gnome-user-docs manpages manpages-dev bash-doc gawk-doc gdb-doc zsh-doc vim-doc libgtk-3-doc "
    "libglib2.0-doc openmpi-doc gsl-ref-html gap-core pari-doc sagemath-doc singular-doc gromacs-data "
    "qtbase5-doc-html qtdeclarative5-doc-html llvm-14-doc clang-14-doc hdf5-doc libvtk9-doc mysql-common "
    "fluidsynth-doc ardour-data audacity-data blender-data freecad-common openscad scribus-doc texlive-doc-en"
).split()
SUFFIXES = (".html", ".htm", ".xhtml", ".txt", ".rst", ".md", ".txt.gz", ".html.gz", ".xml")
SKIPPED = {"script", "style", "head", "nav", "pre", "code", "table", "footer"}
BLOCKS = {"p", "div", "li", "dd", "dt", "h1", "h2", "h3", "h4", "section", "br", "td"}
HELD_OUT = 100  # one document of so many
LONGEST = 8_000_000  # bytes of a page


class _Text(HTMLParser):
    """A reader of a page's text, a paragraph per block."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._skipping = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:  # noqa: ARG002 - theirs
        self._skipping += tag in SKIPPED
        if tag in BLOCKS:
            self.parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        self._skipping -= tag in SKIPPED and self._skipping > 0
        if tag in BLOCKS:
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self.parts.append(data)


def prose(*, out: Path = Path("texts"), megabytes: float = 60.0, packages: tuple[str, ...] = ()) -> int:
    """Download documentation packages until their prose fills `megabytes`, and write train and held-out files.

    Args:
        out: Folder for train.parquet and heldout.parquet.
        megabytes: Compressed size of the training text at which to stop.
        packages: Names of Debian packages; default: a list of manuals.
    """
    out.mkdir(parents=True, exist_ok=True)
    seen: set[int] = set()
    rows: dict[bool, list[tuple[str, str]]] = {False: [], True: []}
    counts, compressed = [], 0.0
    for name in packages or tuple(PACKAGES):
        texts = list(_documents(name, seen))
        if not texts:
            continue
        for page, text in texts:
            rows[xxhash.xxh3_64_intdigest(page.encode()) % HELD_OUT == 0].append((page, text))
        size = sum(len(text) for _, text in texts)
        compressed += len(pa.compress("\n".join(text for _, text in texts).encode(), "zstd", asbytes=True)) / 1e6
        counts.append({"package": name, "documents": len(texts), "characters": size, "so far, MB": compressed})
        print(
            f"{name}: {len(texts):,} documents, {size:,} characters, {compressed:.1f} MB so far", file=sys.stderr
        )
        if compressed >= megabytes:
            break
    require(bool(rows[False]), "no package gave a text; is Debian's package index at hand (apt-get update)?")
    for is_held, name in ((False, "train"), (True, "heldout")):
        pages, texts_of = zip(*sorted(rows[is_held]), strict=True) if rows[is_held] else ((), ())
        with written_aside(out / f"{name}.parquet") as part:
            table = pa.table({"source": pa.array(pages, pa.string()), "text": pa.array(texts_of, pa.string())})
            pq.write_table(table, part, compression="zstd", compression_level=19)
        written = (out / f"{name}.parquet").stat().st_size / 1e6
        counts.append({"package": f"{name}.parquet, {written:.1f} MB", "documents": len(pages)})
    finish("prose of Debian's documentation", counts)
    return 0


def _documents(package: str, seen: set[int]) -> Iterator[tuple[str, str]]:
    """Yield name and prose of the pages of a package that can be downloaded."""
    with tempfile.TemporaryDirectory(prefix="prose-") as scratch:
        got = subprocess.run(["apt-get", "download", package], cwd=scratch, capture_output=True, check=False)
        files = list(Path(scratch).glob("*.deb"))
        if got.returncode or not files:
            print(f"{package}: not to be had", file=sys.stderr)
            return
        unpack = ["dpkg-deb", "--extract", files[0].name, "files"]
        if subprocess.run(unpack, cwd=scratch, capture_output=True, check=False).returncode:
            raise UserError(f"{files[0].name} cannot be unpacked")
        root = Path(scratch) / "files"
        for path in sorted(root.rglob("*")):
            if path.is_file() and not path.is_symlink() and path.name.endswith(SUFFIXES):
                text = "\n\n".join(paragraphs(_read(path), seen))
                if len(text) > 200:
                    yield f"{package}/{path.relative_to(root)}", text


def _read(path: Path) -> Iterable[str]:
    """Return the blocks of a page's text."""
    raw = path.read_bytes() if path.stat().st_size <= LONGEST else b""
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw)[:LONGEST].decode("utf-8", "replace")
    if "htm" in path.name or path.suffix == ".xml":
        parser = _Text()
        parser.feed(text)
        text = "".join(parser.parts)
    return re.split(r"\n\s*\n", text)


def paragraphs(blocks: Iterable[str], seen: set[int]) -> Iterator[str]:
    """Yield the blocks that read as prose and were not `seen`: sentences of words, hardly any signs."""
    for block in blocks:
        text = " ".join(block.split())
        words = text.split(" ")
        letters = sum(c.isalpha() or c == " " for c in text)
        is_prose = len(words) >= 8 and letters >= 0.85 * len(text) and text.isascii() and text[0].isalnum()
        if not is_prose or not re.search(r"[.:!?]$", text):
            continue
        key = xxhash.xxh3_64_intdigest(text.encode())
        if key not in seen:
            seen.add(key)
            yield text


if __name__ == "__main__":
    as_command(prose, "prose")
