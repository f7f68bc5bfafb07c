"""Pictures side by side: a column a candidate, a row a call."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

__all__ = ["grid"]

_LEAST = 256
"""Pixels of a picture's longer side below which it is shown larger, by a whole factor, its pixels as they are."""

_GAP, _INK, _GREY = 8, (20, 20, 20), (110, 110, 110)


def grid(
    columns: Sequence[Sequence[Image.Image]], captions: Sequence[tuple[str, str]], rows: Sequence[str] = ()
) -> Image.Image:
    """Return one picture of all: `captions` are each column's name and a line below it, `rows` stand above each row.

    A row that has no name, and columns without pictures, take no place.
    """
    shown = [(pictures, caption) for pictures, caption in zip(columns, captions, strict=True) if pictures]
    cells = [[_enlarged(picture) for picture in pictures] for pictures, _ in shown]
    large, small = ImageFont.load_default(20), ImageFont.load_default(15)
    texts = [*((name, large) for _, (name, _) in shown), *((line, small) for _, (_, line) in shown)]
    width = max([picture.width for column in cells for picture in column] + [int(f.getlength(t)) for t, f in texts])
    count = max(map(len, cells))
    heights = [max(column[row].height for column in cells if row < len(column)) for row in range(count)]
    names = [*rows, *[""] * count][:count]
    head = 2 * _GAP + 48
    height = head + sum(tall + _GAP + (26 if name else 0) for tall, name in zip(heights, names, strict=True))
    sheet = Image.new("RGB", (len(cells) * (width + _GAP) + _GAP, height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (_, (name, line)) in enumerate(shown):
        middle = _GAP + column * (width + _GAP) + width / 2
        draw.text((middle, _GAP), name, _INK, large, anchor="ma")
        draw.text((middle, _GAP + 28), line, _GREY, small, anchor="ma")
    top = head
    for row, (tall, name) in enumerate(zip(heights, names, strict=True)):
        if name:
            draw.text((_GAP, top), _fitting(name, small, sheet.width - 2 * _GAP), _INK, small)
            top += 26
        for column, pictures in enumerate(cells):
            if row < len(pictures):
                left = _GAP + column * (width + _GAP) + (width - pictures[row].width) // 2
                sheet.paste(pictures[row], (left, top))
        top += tall + _GAP
    return sheet


def _enlarged(picture: Image.Image) -> Image.Image:
    factor = -(-_LEAST // max(picture.size))
    image = picture.convert("RGB")
    return (
        image if factor == 1 else image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    )


def _fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """Return the text, cut where it is longer than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."
