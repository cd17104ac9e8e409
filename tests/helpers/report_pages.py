"""Pages of tools.run_report, read and checked; reports of chance outcomes for them."""

import base64
import io
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image

from assembly.evaluation_report import write_report
from utils.classification.image_outcomes import ImageOutcomes
from utils.data.image_folder import ImageFolder

VOID = {"meta", "img", "line", "circle", "polyline"}
EVIL = '<script>alert("x")</script>'


class Page(HTMLParser):
    """Reads a page: that its tags are balanced, its text, its pictures, its links."""

    def __init__(self, source: str):
        super().__init__(convert_charrefs=True)
        self.open, self.texts, self.pictures, self.links = [], [], [], []
        self.names, self.tags, self.titles = set(), set(), []
        self.feed(source)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        for name, value in attrs:
            assert not name.startswith("on")
            if name == "src":
                head, _, code = value.partition(",")
                assert head == "data:image/png;base64"
                self.pictures.append(base64.b64decode(code, validate=True))
            if name == "href":
                assert value.startswith("#"), value
                self.links.append(value[1:])
            if name == "id":
                assert value not in self.names
                self.names.add(value)
            if name == "style":
                assert "url" not in value
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            assert "url(" not in data
            assert "@import" not in data
        elif data.strip():
            self.texts.append(data)
            if self.open[-1] == "h2":
                self.titles.append(data)


def read(path: Path) -> Page:
    """The page, with what holds for every page."""
    page = Page(path.read_text(encoding="utf-8"))
    assert not page.tags & {"script", "link", "iframe", "object", "form", "base"}
    assert page.links
    assert set(page.links) <= page.names
    for data in page.pictures:
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
    return page


def report_of(run: Path, names: list[str], data: Path, images: int = 60) -> Path:
    """A report on images of these classes, with chance outcomes."""
    chance = np.random.default_rng(0)
    n = len(names)
    true, found = np.arange(images) % n, chance.integers(0, n, images)
    sure = chance.random(images)
    outcomes = ImageOutcomes(true, found, true == found, sure, sure / 2, 1 - sure, n)
    paths = np.array([f"c/{i}.png".encode() for i in range(images)])
    folder = ImageFolder(str(data), tuple(names), paths, true)
    told = {"images": images, "top1": 50.0, "top5": 60.0, "loss": 1.5, "data": EVIL}
    return write_report(run, outcomes, folder, "eca_resnet18", {**told, "checkpoint": "best.pth"})
