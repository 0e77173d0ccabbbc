"""Photographs of the retina, pictures of nuclei and of plain shapes by arithmetic."""

from __future__ import annotations

import numpy as np

__all__ = ["draw_fundus", "draw_nuclei", "draw_shapes"]


def draw_fundus(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One retinal photograph of DRIVE's size: (RGB uint8 (584, 565, 3), vessels bool, field of view bool)."""
    from scipy.ndimage import gaussian_filter

    height, width = 584, 565
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    view = (rows - height / 2) ** 2 + (columns - width / 2) ** 2 < 270**2
    disc = np.array([height / 2 + rng.uniform(-40, 40), width * rng.choice([0.27, 0.73])])

    from PIL import Image, ImageDraw

    # drawn at four times the size and averaged: widths below a pixel become partial grey, as in a photograph
    canvas = Image.new("L", (width * 4, height * 4))
    pen = ImageDraw.Draw(canvas)
    toward = 1.0 if disc[1] < width / 2 else -1.0
    stems = [(disc, a * toward, rng.uniform(5.5, 8.0)) for a in (-1.9, -1.2, -0.75, 0.75, 1.2, 1.9)]
    while stems:
        point, angle, calibre = stems.pop()
        curl = rng.normal(0, 0.012)
        for _ in range(int(rng.integers(14, 34) * (1 + calibre / 6))):
            curl = 0.9 * curl + rng.normal(0, 0.012)
            angle += curl
            step = point + 5 * np.array([np.sin(angle), toward * np.cos(angle)])
            pen.line([tuple(point[::-1] * 4), tuple(step[::-1] * 4)], fill=255, width=max(1, round(calibre * 4)))
            pen.ellipse([*(step[::-1] * 4 - calibre * 2), *(step[::-1] * 4 + calibre * 2)], fill=255)
            point, calibre = step, calibre * 0.99
            if calibre > 1.8 and rng.random() < 0.07:  # a side branch leaves under 30 to 70 degrees
                side = rng.choice([-1, 1]) * rng.uniform(0.5, 1.2)
                stems.append((point, angle + side, calibre * rng.uniform(0.4, 0.65)))
        if calibre > 1.3 and 0 < point[0] < height and 0 < point[1] < width:
            fork = rng.uniform(0.25, 0.6)
            stems += [
                (point, angle + fork, calibre * rng.uniform(0.6, 0.75)),
                (point, angle - fork / 2, calibre * 0.85),
            ]
    cover = np.asarray(canvas.resize((width, height), Image.Resampling.BOX), np.float32) / 255
    vessels = (cover > 0.5) & view

    glow = np.exp(-((rows - height / 2) ** 2 + (columns - width / 2) ** 2) / (2 * 260**2))
    spot = np.exp(-((rows - disc[0]) ** 2 + (columns - disc[1]) ** 2) / (2 * 26**2))
    macula = np.exp(-((rows - height / 2) ** 2 + (columns - width / 2 - toward * 30) ** 2) / (2 * 38**2))
    mottle = gaussian_filter(rng.normal(0, 1, (height, width)).astype(np.float32), 9) * 60
    tone = 0.75 * glow + 0.25 + 0.55 * spot - 0.25 * macula + 0.02 * mottle
    tone = tone * (1 - rng.uniform(0.3, 0.42) * gaussian_filter(cover, 0.8))
    colour = np.array([205, 112, 62], np.float32) * rng.uniform(0.85, 1.1, 3)
    noise = gaussian_filter(rng.normal(0, 1, (height, width, 3)).astype(np.float32), (0.7, 0.7, 0)) * 9
    picture = np.where(view[..., None], tone[..., None] * colour + noise, 2)
    return np.clip(picture, 0, 255).astype(np.uint8), vessels, view


def draw_nuclei(rng: np.random.Generator, size: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """One fluorescence picture: (grey uint8 (size, size), instances int32 of the same shape, 0 background).

    About half the nuclei stand in clusters whose members touch: a later nucleus never covers an earlier one.
    """
    from scipy.ndimage import gaussian_filter

    rows, columns = np.mgrid[:size, :size].astype(np.float32)
    instances = np.zeros((size, size), np.int32)
    light = np.zeros((size, size), np.float32)
    base = rng.uniform(7, 12)
    centres: list[np.ndarray] = []
    for _ in range(int(rng.integers(12, 45))):
        if centres and rng.random() < 0.5:  # beside a neighbour, about two radii away
            angle = rng.uniform(0, 2 * np.pi)
            centre = centres[int(rng.integers(len(centres)))] + 2 * base * np.array([np.sin(angle), np.cos(angle)])
        else:
            centre = rng.uniform(0, size, 2)
        a, b = base * rng.uniform(0.75, 1.3, 2)
        turn = rng.uniform(0, np.pi)
        u = (rows - centre[0]) * np.cos(turn) + (columns - centre[1]) * np.sin(turn)
        v = (columns - centre[1]) * np.cos(turn) - (rows - centre[0]) * np.sin(turn)
        bend = 1 + 0.08 * np.sin(2 * np.arctan2(v, u) + rng.uniform(0, 6)) + 0.05 * np.sin(3 * np.arctan2(v, u))
        whole = (u / a) ** 2 + (v / b) ** 2 < bend**2
        free = whole & (instances == 0)
        if free.sum() < 0.7 * whole.sum() or free.sum() < 30:
            continue
        centres.append(centre)
        instances[free] = len(centres)
        light[free] = rng.uniform(0.45, 1.0)
    texture = 1 + 1.1 * gaussian_filter(rng.normal(0, 1, light.shape).astype(np.float32), 2)
    picture = gaussian_filter(light * texture, 1.2) * rng.uniform(90, 190) + rng.uniform(4, 22)
    picture += rng.normal(0, 1, light.shape) * rng.uniform(1.5, 5)
    return np.clip(picture, 0, 255).astype(np.uint8), instances


def draw_shapes(rng: np.random.Generator, size: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """One to four coloured shapes: (RGB uint8 (size, size, 3), label uint8: 1 circle, 2 square, 3 triangle, 255 void).

    Void are the two pixels on either side of every outline. A later shape covers a part of an earlier one at most.
    """
    from scipy.ndimage import maximum_filter, minimum_filter

    rows, columns = np.mgrid[:size, :size].astype(np.float32)
    label, number = np.zeros((size, size), np.uint8), np.zeros((size, size), np.uint8)
    picture = np.empty((size, size, 3), np.float32)
    picture[:] = ground = rng.uniform(30, 225, 3)
    for shape in range(1, int(rng.integers(1, 5)) + 1):
        kind, radius = int(rng.integers(1, 4)), rng.uniform(size / 10, size / 5)
        y, x = rng.uniform(radius, size - radius, (2, 1, 1))
        colour = rng.uniform(30, 225, 3)
        while abs(colour - ground).max() < 60:
            colour = rng.uniform(30, 225, 3)
        down, right = rows - y, columns - x
        if kind == 1:
            inside = down**2 + right**2 <= radius**2
        elif kind == 2:
            inside = np.maximum(abs(down), abs(right)) <= radius
        else:  # as high as wide, the point at the top
            inside = (abs(down) <= radius) & (2 * abs(right) <= down + radius)
        if (number[inside] > 0).mean() > 0.3:
            continue
        label[inside], number[inside], picture[inside] = kind, shape, colour
    outline = maximum_filter(number, 3) != minimum_filter(number, 3)
    picture += rng.normal(0, 6, picture.shape)
    return np.clip(picture, 0, 255).astype(np.uint8), np.where(outline, np.uint8(255), label)
