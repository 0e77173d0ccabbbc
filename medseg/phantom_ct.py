"""An abdominal CT by arithmetic: body, lungs, liver with vessels and tumours, other organs, bones, scanner noise."""

from __future__ import annotations

import numpy as np

__all__ = ["draw_ct"]


def draw_ct(rng: np.random.Generator, *, oblique: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One abdominal CT: (image int16 HU (i, j, k), label uint8 (i, j, k), affine 4x4 voxel -> RAS mm).

    The anatomy is drawn in patient coordinates and sampled through the affine, so that an oblique or flipped grid shows
    the same body: 0.05 rad about each axis when `oblique`, voxels of 2.8-3.2 mm in the plane and 4-6 mm between slices.
    """
    shape = (112, 96, int(rng.integers(36, 48)))
    spacing = np.array([*(rng.uniform(2.8, 3.2) * np.ones(2)), rng.uniform(4.0, 6.0)])
    flips = rng.choice([-1.0, 1.0], size=3)
    rotation = _rotation(rng.uniform(-0.05, 0.05, 3) if oblique else np.zeros(3))
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.diag(flips * spacing)
    affine[:3, 3] = -affine[:3, :3] @ (np.array(shape) - 1) / 2
    # scanners put the origin anywhere: the anatomy stays centred on the grid, whose world position is shifted
    shift = rng.uniform(-120, 120, 3)
    grid = np.stack(np.meshgrid(*[np.arange(n, dtype=np.float32) for n in shape], indexing="ij"))
    x, y, z = np.tensordot(affine[:3, :3], grid, 1) + affine[:3, 3].reshape(3, 1, 1, 1)
    x = -x  # world x grows to the patient's right (RAS), the anatomy below is drawn with x to the left
    affine[:3, 3] += shift

    def blob(centre, radii, wobble: float = 0.12) -> np.ndarray:
        """Signed size of an ellipsoid (positive inside) whose surface waves smoothly by the share `wobble`."""
        centre = np.asarray(centre) + rng.normal(0, 3, 3)
        radii = np.asarray(radii) * rng.uniform(0.92, 1.08, 3)
        u, v, w = ((a - c) / r for a, c, r in zip((x, y, z), centre, radii, strict=True))
        phase = rng.uniform(0, 2 * np.pi, 3)
        wave = np.sin(2.3 * u + phase[0]) + np.sin(2.9 * v + phase[1]) + np.sin(2.6 * w + phase[2])
        return 1 + wobble * wave / 3 - np.sqrt(u**2 + v**2 + w**2)

    # x grows to the patient's left, y to the front, z up
    body = 1 - (np.abs(x / 155) ** 2.5 + np.abs(y / 112) ** 2.5) ** 0.4
    inside = body > 0
    hu = np.full(shape, -1000.0, np.float32)
    hu[inside] = -105.0
    hu[body > 0.09] = 45.0
    for side in (-1, 1):
        hu[(blob((side * 75, 5, 115), (62, 75, 62), 0.05) > 0) & inside] = -840.0
    hu[blob((75, -15, 40), (30, 42, 42)) > 0] = 118.0  # spleen
    hu[blob((52, 45, 25), (42, 32, 38)) > 0] = 25.0  # stomach
    hu[blob((50, 62, 30), (20, 12, 22)) > 0] = -900.0  # and the air in it
    for side in (-1, 1):
        hu[blob((side * 58, -48, -40), (24, 22, 46)) > 0] = 150.0
    hu[blob((12, -38, 0), (11, 11, 400), 0) > 0] = 160.0  # aorta
    spine = blob((0, -68, 0), (22, 20, 400), 0)
    hu[spine > 0] = 190.0 + 140.0 * (np.cos(z[spine > 0] / 5.5) > 0.6)
    hu[(spine > 0) & (spine < 0.15)] = 420.0
    ribs = (np.abs(body - 0.12) < 0.025) & (np.cos(z / 4.2 + y / 30) > 0.72) & (y < 75)
    hu[ribs] = 380.0

    liver = np.maximum(blob((-62, 8, 42), (72, 70, 62)), blob((0, 38, 52), (62, 38, 34)))
    liver = (liver > 0) & (body > 0.14) & (spine < -0.1) & (hu > -500)
    hu[liver] = rng.uniform(95, 125)
    label = liver.astype(np.uint8)
    hu[liver & (np.abs(np.sin(x / 17 + y / 23) * np.cos(z / 19 - y / 21)) < 0.045)] += 40  # its vessels
    voxels = np.argwhere(liver)
    for _ in range(int(rng.integers(1, 5))):
        i, j, k = voxels[rng.integers(len(voxels))]
        tumour = (blob((x[i, j, k], y[i, j, k], z[i, j, k]), rng.uniform(9, 22) * np.ones(3)) > 0) & liver
        hu[tumour] = rng.uniform(40, 65)
        label[tumour] = 2
    return _scanner(hu, rng), label, affine


def _scanner(hu: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blur by the scanner's point spread and add noise that neighbours share, as a reconstruction's has."""
    from scipy.ndimage import gaussian_filter

    noise = gaussian_filter(rng.normal(0, 1, hu.shape).astype(np.float32), (0.7, 0.7, 0))
    noise *= rng.uniform(10, 20) / noise.std()
    return np.clip(gaussian_filter(hu, (0.6, 0.6, 0.3)) + noise, -1024, 3071).round().astype(np.int16)


def _rotation(angles: np.ndarray) -> np.ndarray:
    (ca, cb, cc), (sa, sb, sc) = np.cos(angles), np.sin(angles)
    about_x = np.array([[1, 0, 0], [0, ca, -sa], [0, sa, ca]])
    about_y = np.array([[cb, 0, sb], [0, 1, 0], [-sb, 0, cb]])
    about_z = np.array([[cc, -sc, 0], [sc, cc, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x
