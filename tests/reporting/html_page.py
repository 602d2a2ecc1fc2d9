"""What the tests look at in a page of HTML, and what must hold of any page of ours."""

import re
from html.parser import HTMLParser

VOID = {"meta", "br", "img", "link", "hr", "input"}


class Page(HTMLParser):
    """Checks that tags nest, and collects elements by kind."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open, self.ids, self.references, self.svgs, self.texts, self.tags = [], [], [], [], [], set()
        self.headings, self.scopes, self.links = [], [], []
        self.by_id: dict[str, str] = {}
        self.feed(html)
        assert self.open == []

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def labels(self) -> list[str]:
        """Name and description of every figure, as a screen reader has them."""
        return [f"{self.by_id[svg['aria-labelledby']]}: {self.by_id[svg['aria-describedby']]}" for svg in self.svgs]

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append((tag, values.get("id")))
        if "id" in values:
            self.ids.append(values["id"])
            self.by_id[values["id"]] = ""
        if tag == "a":
            self.links.append(values["href"])
        else:
            self.references += [values[name] for name in ("href", "src", "xlink:href") if name in values]
        self.references += re.findall(r"url\(([^)]*)\)", " ".join(value or "" for value in values.values()))
        self.references += [f"#{values[name]}" for name in ("aria-labelledby", "aria-describedby") if name in values]
        if tag == "svg":
            assert values["role"] == "img"
            self.svgs.append(values)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag == "th":
            self.scopes.append(values.get("scope"))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][0] in ("script", "style"):
            return
        self.texts.append(data)
        if self.open and self.open[-1][1] is not None:
            self.by_id[self.open[-1][1]] += data


def check(html: str) -> Page:
    """Hold a page to what every page promises: self-contained, valid references, headings in order, all labelled."""
    page = Page(html)
    assert len(set(page.ids)) == len(page.ids)
    assert all(reference[0] == "#" and reference[1:] in page.ids for reference in page.references)
    assert all(link[1:] in page.ids for link in page.links if link[0] == "#")
    assert not re.search(r"https?:|@import|<img|<link|<iframe|\son\w+=|<script[^>]", html)
    assert html.count("<script>") == html.count("<style>") == 1
    assert page.headings[0] == 1
    assert page.headings.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(page.headings, page.headings[1:], strict=False))
    assert set(page.scopes) <= {"row", "col"}
    assert all(len(label) > 20 for label in page.labels)
    assert not re.search(r"#0101\d\d|#000000", html)
    return page
