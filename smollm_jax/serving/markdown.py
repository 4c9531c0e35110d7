"""Render a model's Markdown as HTML that fetches nothing and links nowhere.

HTML, images and links that a model writes stay text.
"""

from functools import lru_cache
from html import escape

from markdown_it import MarkdownIt

LONGEST_RENDERED = 20_000  # characters. A longer answer is shown as its source
MARKDOWN = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable("table").disable(
    ["image", "link", "autolink", "reference", "html_block", "html_inline"]
)  # fmt: skip


@lru_cache(maxsize=256)  # each new chunk of the last answer shows the whole conversation again
def answer_html(text: str) -> str:
    """Return both forms of an answer, rendered and source. The style in page.css shows one form."""
    source = escape(text, quote=False)
    rendered = MARKDOWN.render(text) if len(text) <= LONGEST_RENDERED else f"<pre>{source}</pre>"
    return f'<div class="answer"><div class="rendered">{rendered}</div><div class="source">{source}</div></div>'
