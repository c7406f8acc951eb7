"""Reads a report as a test needs it: tags, text, what it would fetch, tables and sections."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path


class Page(HTMLParser):
    """Collects tags, text, and every attribute through which a page could fetch something."""

    void = {"meta", "link", "img", "br", "hr", "input"}

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.tags: list[str] = []
        self.open: list[str] = []
        self.fetches: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    @classmethod
    def read(cls, path: Path) -> Page:
        return cls(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.void:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
                if not (value or "").startswith(("#", "data:")):
                    self.fetches.append(f"{tag} {name}={value}")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.void:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def words(self) -> str:
        """The text with single blanks."""
        return " ".join(self.text.split())

    @property
    def without_script(self) -> str:
        """The HTML without the page's script, which its policy allows by its hash."""
        (script,) = re.findall(r"<script>(.*?)</script>", self.html[-20_000:], re.DOTALL)[-1:]
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"script-src 'sha256-{digest}';" in self.html[:600]
        before, _, after = self.html.rpartition(f"<script>{script}</script>")
        return before + after

    def table(self, title: str) -> list[list[str]]:
        """The cells of the table below a heading, row by row."""
        part = self.html.partition(title)[2].partition("<table")[2].partition("</table>")[0]
        rows = re.findall(r"<tr>(.*?)</tr>", part, re.DOTALL)
        return [[Page(cell).words for cell in re.findall(r"<t[hd].*?</t[hd]>", r)] for r in rows]

    def section(self, heading: str) -> str:
        """The HTML of the one section that has a heading."""
        (section,) = [each for each in self.html.split("<section>") if heading in each]
        return section.partition("</section>")[0]
