"""Captions, columns of images and GIFs: what sample.py and eval_calvin.py draw with."""
import io
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from nanogr.common import write_whole

FRAME_MS, LAST_MS = 150, 1000  # slower than life: a tabletop rollout lasts about a second
PAD, INK, GRAY = 8, (24, 24, 28), (100, 100, 108)
LARGE, SMALL = (ImageFont.load_default(size=size) for size in (19, 13))


def enlarge(image, side):
    return Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST)


def wrap(text, font, width):
    """Break text into lines of at most `width` px."""
    lines = [""]
    for word in text.split():
        fits = not lines[-1] or font.getlength(f"{lines[-1]} {word}") <= width
        lines[-1:] = [f"{lines[-1]} {word}".strip()] if fits else [lines[-1], word]
    return lines


def page(caption, heads, groups):
    """Lay out caption [(text, font, colour)], a head a column, groups of rows [[(label, images), ...]]."""
    rows = [row for group in groups for row in group]
    gutter = max(round(SMALL.getlength(line)) for label, _ in rows for line in label.split("\n"))
    left = PAD + (gutter + PAD if gutter else 0)
    columns = np.cumsum([left] + [image.width + PAD for image in rows[0][1]]).tolist()
    width = columns[-1]
    lines = [(line, font, ink) for text, font, ink in caption for line in wrap(text, font, width - 2 * PAD)]
    height = sum(font.size * 7 // 5 for _, font, _ in lines) + sum(x[0].height + PAD for _, x in rows)
    picture = Image.new("RGB", (width, height + 5 * PAD + 2 * PAD * (len(groups) - 1)), "white")
    pen, y = ImageDraw.Draw(picture), PAD
    for line, font, ink in lines:
        pen.text((PAD, y), line, ink, font)
        y += font.size * 7 // 5
    y += 4 * PAD
    for x, head in zip(columns, heads):
        pen.text((x, y - PAD // 2), head, INK, SMALL, anchor="ls")
    for group in groups:
        for label, images in group:
            pen.text((PAD, y + images[0].height // 2), label, INK, SMALL, anchor="lm")
            for x, image in zip(columns, images):
                picture.paste(image, (x, y))
            y += images[0].height + PAD
        y += 2 * PAD
    return picture


def write_sheet(path, rows, side, line=18):
    """Write a PNG: a row for each (label, images), images of `side` px below their label."""
    width = side * max(len(images) for _, images in rows)
    sheet = Image.new("RGB", (width, (side + line) * len(rows)), "white")
    for top, (label, images) in zip(range(0, sheet.height, side + line), rows):
        label = label.encode("ascii", "replace").decode()                        # what any font can write
        ImageDraw.Draw(sheet).text((4, top + 3), label, "black")
        for column, image in enumerate(images):
            sheet.paste(Image.fromarray(image).resize((side, side)), (column * side, top + line))
    write_png(path, sheet)


def write_png(path, image):
    content = io.BytesIO()
    image.save(content, "PNG")
    write_whole(path, content.getvalue())


def write_gif(path, pages):
    # One palette for all pages: they don't flicker, and what stays still takes no bytes. Pillow's usual one
    # would fade what is small and bright, the blocks; "maximum coverage" keeps it.
    some = np.concatenate([np.asarray(page)[::2, ::2] for page in pages[::math.ceil(len(pages) / 8)]])
    palette = Image.fromarray(some).quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=2)
    pages = [page.quantize(palette=palette, dither=Image.Dither.NONE) for page in pages]
    file, times = io.BytesIO(), [FRAME_MS] * (len(pages) - 1) + [LAST_MS]
    pages[0].save(file, "GIF", save_all=True, append_images=pages[1:], duration=times, loop=0)
    write_whole(path, file.getvalue())
