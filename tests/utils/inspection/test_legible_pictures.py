"""Every diagram, with awkward inputs: no text lies outside the canvas or over another text."""

import io
from itertools import combinations

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from utils.data.image_folder import ImageFolder
from utils.inspection import channel_weights, pictures
from utils.inspection.channel_weights import LayerWeights
from utils.inspection.report import NONE, EvaluatedImages, Report
from utils.runs.writer import draw_curves
from utils.system.style import MEDIUM_CELL, drawable
from utils.training import classification

LONG = "a class with a name that is much longer than any label can be"
NAMES = ("cat", LONG, "_hidden", "$x$ \\frac{", "Größe", "кошка", "")
FOREIGN = (*NAMES, "猫", "كلب", "=1+1", "a\nb", "\x1b[31m")  # of class folders, in any script
PATHS = ("cat/1.png", "猫/猫.png", "a/long/way/ILSVRC2012_val_00012345.JPEG", "a\nb.png")


def texts(figure):
    """The texts that are seen, with what they cover in pixels: left, bottom, right, top."""
    figure.canvas.draw()
    unseen = set()
    for axis in figure.axes:
        if not axis.get_visible() or not axis.axison:
            unseen |= set(map(id, axis.findobj(Text)))
        for ticks, limits, at in (
            (axis.get_xticklabels(which="both"), axis.get_xlim(), 0),
            (axis.get_yticklabels(which="both"), axis.get_ylim(), 1),
        ):  # matplotlib keeps labels beyond the ends of an axis, and does not draw them
            beyond = [t for t in ticks if not min(limits) <= t.get_position()[at] <= max(limits)]
            unseen |= set(map(id, beyond))
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text().strip() and id(text) not in unseen:
            box = text.get_window_extent()
            yield text.get_text(), (box.x0, box.y0, box.x1, box.y1)


def assert_legible(figure):
    width, height = figure.canvas.get_width_height()
    found = list(texts(figure))
    assert found
    for text, (left, bottom, right, top) in found:
        assert left >= -1, text
        assert bottom >= -1, text
        assert right <= width + 1, text
        assert top <= height + 1, text
    for (one, a), (other, b) in combinations(found, 2):
        wide = min(a[2], b[2]) - max(a[0], b[0])
        tall = min(a[3], b[3]) - max(a[1], b[1])
        assert wide <= 2 or tall <= 3, (one, other)


def layers(channels, classes, blocks=((1, 2), (2, 2), (4, 2)), k=3):
    chance = np.random.default_rng(0)
    return [
        LayerWeights(
            f"layer{stage}.{block}",
            stage,
            block,
            chance.random((classes, channels)),
            chance.random((classes, channels)),
            np.full(classes, 4),
            chance.normal(size=k),
        )
        for stage, block in blocks
    ]


def test_a_text_over_another_is_noticed(figures):
    from matplotlib import pyplot as plt

    from utils.system.style import png

    figure = plt.figure()
    figure.text(0.5, 0.5, "one")
    figure.text(0.51, 0.5, "other")
    png(figure)
    with pytest.raises(AssertionError):
        assert_legible(figures[0])


@pytest.mark.parametrize(("channels", "shown"), [(1, 1), (8, 7), (2048, 10)])
def test_channel_weights(figures, channels, shown):
    names = [NAMES[i % len(NAMES)] for i in range(shown)]
    found = layers(channels, shown)
    channel_weights.draw_weights(found, names, list(range(shown)), "eca_resnet50 on DATA")
    assert_legible(figures[0])


@pytest.mark.parametrize("blocks", [1, 36])
def test_spread_and_kernels(figures, blocks):
    found = layers(16, 2, [(1 + i // 12, 1 + i % 12) for i in range(blocks)], k=9)
    channel_weights.draw_spread(found, "eca_resnet152")
    channel_weights.draw_kernels(found, "eca_resnet152, ECA kernels")
    for figure in figures:
        assert_legible(figure)


@pytest.mark.parametrize("losses", [[2.3], [16.0, 0.5, 0.2, 0.01], [np.nan, 1.0], [0.0, 0.0]])
def test_curves(figures, tmp_path, losses):
    others = ("train_top1", "train_top5", "val_top1", "val_top5")
    rows = [
        {"epoch": i, "lr": 0.1, "train_loss": loss, "val_loss": loss, **dict.fromkeys(others, 50.0)}
        for i, loss in enumerate(losses)
    ]
    title, panels = "eca_resnet18_a-name-1", classification.panels()
    draw_curves(rows, panels, tmp_path / "curves.png", title, best=0)
    assert_legible(figures[0])
    spans = np.nanmax(losses) > 20 * np.nanmin(losses) > 0
    assert figures[0].axes[0].get_yscale() == ("log" if spans else "linear")
    marks = [line for line in figures[0].axes[0].lines if line.get_linestyle() == ":"]
    assert [line.get_xdata()[0] for line in marks] == [1]


@pytest.mark.filterwarnings("error")  # matplotlib's on letters that its font lacks
@pytest.mark.parametrize(
    ("classes", "most"), [(1, 99_999), (len(FOREIGN), 1), (pictures.MATRIX, 99_999)]
)
def test_confusion_matrix(figures, classes, most):
    names = [FOREIGN[i % len(FOREIGN)] for i in range(classes)]
    matrix = np.random.default_rng(0).integers(0, most + 1, (classes, classes))
    matrix[-1] = 0  # a class without an image
    pictures.draw_matrix(matrix, names, "eca_resnet18 on demo:digits, 359 images")
    assert_legible(figures[0])
    numbers = [text.get_text() for text in figures[0].axes[0].texts]
    assert numbers == [str(n) for n in matrix.flatten() if n]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("pairs", [0, 12, 1000])
def test_most_confused_pairs(figures, pairs):
    names = [FOREIGN[i % len(FOREIGN)] for i in range(1000)]
    top = [(i, (i + 3) % 1000, 10**6 // (i + 1), 1 / (i + 1)) for i in range(pairs)]
    title = "eca_resnet152 on …/a/folder/with/a/long/name, 50,000 images, 9,999 of them wrong"
    pictures.draw_pairs(top, names, f"{title}\nthe most confused of 1,000 classes")
    assert_legible(figures[0])
    axis = figures[0].axes[0]
    assert [bar.get_width() for bar in axis.patches] == [100 * share for *_, share in top[:20]]
    if pairs:
        assert len(axis.texts) == min(pairs, pictures.PAIRS)
        assert axis.texts[0].get_text() == " 1,000,000 (100 %)"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("images", [[0] * 15, [0] * 14 + [1], list(range(15)), [5]])
def test_calibration(figures, images):
    images = np.array(images)
    sure = np.where(images > 0, (np.arange(len(images)) + 0.5) / len(images), np.nan)
    right = np.where(images > 0, 1 - sure, np.nan)
    pictures.draw_calibration(images, sure, right, 0.25, "eca_resnet18 on demo:digits")
    assert_legible(figures[0])


@pytest.mark.parametrize("n", [5, 24])
def test_worst_images_are_there_with_awkward_names(n, tmp_path):
    chance = np.random.default_rng(0)
    for i in range(n):
        if i != 2:  # one that is gone
            size = tuple(chance.integers(1, 300, 2).tolist())
            Image.new("RGB", size, "red").save(tmp_path / f"{i}.png")
    folder = ImageFolder(
        str(tmp_path), FOREIGN, np.array([f"{i}.png".encode() for i in range(n)]), np.zeros(n, int)
    )
    true = np.arange(n) % len(FOREIGN)
    predicted = np.where(np.arange(n) == 3, NONE, (true + 1) % len(FOREIGN))
    sure = np.where(predicted == NONE, np.nan, 0.97)
    images = EvaluatedImages(true, predicted, sure > 1, sure, sure / 9, -sure, len(FOREIGN))
    paths = [PATHS[i % len(PATHS)] for i in range(n)]
    files = Report(images, FOREIGN, paths, "eca_resnet18").pictures(folder)
    with Image.open(io.BytesIO(files["worst_images.png"])) as drawn:
        columns = min(n, 6 if n > 20 else 3)
        assert drawn.width == max(320, 10 + columns * (MEDIUM_CELL + 10))


def test_what_the_font_lacks_is_not_drawn():
    drawn = [drawable(name, "class 3") for name in ("кошка", "Größe", "猫", "كلب", "", "cat 猫")]
    assert drawn == ["кошка", "Größe", *["class 3"] * 4]
