"""Places the labels of boxes in a picture, so that no label covers another one."""

from collections.abc import Iterator, Sequence

Place = tuple[int, int, tuple[int, int] | None]


def place_labels(
    boxes: Sequence[Sequence[float]], sizes: Sequence[tuple[int, int]], canvas: tuple[int, int]
) -> list[Place]:
    """Finds a place for each label, the first ones first.

    A label stands above its box, within it at the top, or below it. Where all of these are taken,
    it stands at the nearest free place. Where the whole picture is taken, it stays at its box, and
    covers another one.

    Args:
        boxes: x1, y1, x2, y2 in pixels.
        sizes: width and height of each label, not larger than the canvas.
        canvas: width and height of the picture.

    Returns:
        For each label its left and top, and where it was moved away from its box the point of the
        box that a line should lead to.
    """
    taken: list[tuple[int, int, int, int]] = []
    places: list[Place] = []
    for box, size in zip(boxes, sizes, strict=True):
        at_box = list(_at_box(box, size, canvas))
        place = next((p for p in at_box if _is_free(p, size, taken)), None)
        lead = None
        if place is None:
            away = sorted(_grid(size, canvas), key=lambda p: _distance(p, at_box[0]))
            place = next((p for p in away if _is_free(p, size, taken)), None)
            lead = (round(box[0]), round(box[1]))
        if place is None:
            place, lead = at_box[0], None
        taken.append((*place, place[0] + size[0], place[1] + size[1]))
        places.append((*place, lead))
    return places


def _at_box(
    box: Sequence[float], size: tuple[int, int], canvas: tuple[int, int]
) -> Iterator[tuple[int, int]]:
    """Yields places that touch the box, moved into the canvas."""
    x1, y1, x2, y2 = (round(value) for value in box)
    width, height = size
    for x, y in (
        (x1, y1 - height),
        (x2 - width, y1 - height),
        (x1, y2),
        (x2 - width, y2),
        (x1, y1),
        (x1, y2 - height),
    ):
        yield _inside(x, canvas[0] - width), _inside(y, canvas[1] - height)


def _inside(value: int, most: int) -> int:
    return max(0, min(value, most))


def _grid(size: tuple[int, int], canvas: tuple[int, int]) -> list[tuple[int, int]]:
    xs = range(0, max(1, canvas[0] - size[0] + 1), 8)
    return [(x, y) for y in range(0, max(1, canvas[1] - size[1] + 1), 4) for x in xs]


def _distance(a: tuple[int, int], b: tuple[int, int]) -> int:
    return (a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2


def _is_free(
    place: tuple[int, int], size: tuple[int, int], taken: Sequence[tuple[int, int, int, int]]
) -> bool:
    x, y = place
    return all(
        x >= right or x + size[0] <= left or y >= bottom or y + size[1] <= top
        for left, top, right, bottom in taken
    )
