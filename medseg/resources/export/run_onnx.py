#!/usr/bin/env python3
"""Segment images with model.onnx and model.json beside this file; medseg is not needed.

    pip install numpy scipy onnxruntime nibabel pillow
    python run_onnx.py scan.nii.gz -o masks

Preprocessing, tiles that meet exactly, and the way back to the image's own grid follow model.json. NIfTI volumes give
NIfTI labels of the same grid; PNG, TIFF and JPEG give PNG. Research use only, not a medical device.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import sys
from pathlib import Path

import nibabel
import numpy as np
import onnxruntime
from PIL import Image
from scipy import ndimage

HERE = Path(__file__).resolve().parent
TARGETS_ONLY = {"BoundaryWeightMapd", "InstancesToLabeld", "InteriorBorderLabeld", "RemapLabelsd"}
LARGEST_WINDOW = {2: 1024, 3: 128}  # voxels per axis given to the network at once, besides the context


def component(entry):
    """Name and arguments of a pipeline's component as JSON holds it."""
    name, arguments = (entry, None) if isinstance(entry, str) else next(iter(entry.items()))
    return name, arguments or {}


def read(path, dataset):
    """Image (C, *spatial) float32, its 4x4 affine, and what is needed to write a label image like it."""
    channels, colour, affine, stored = len(dataset["channels"]), dataset.get("colour"), np.eye(4), None
    if path.name.lower().endswith((".nii", ".nii.gz")):
        stored = nibabel.load(path)
        array, affine = np.asarray(stored.dataobj, dtype=np.float32), place(path, stored, dataset.get("affine", "auto"))
        array = np.moveaxis(array.reshape((*array.shape[:3], -1)), -1, 0)
    else:
        with Image.open(path) as picture:
            grey = picture.mode in ("1", "L", "I;16", "I;16B", "I", "F")
            if getattr(picture, "n_frames", 1) > 1 or (not grey and ";16" in str(picture.tile)):
                sys.exit(f"{path}: several pages, or 16 bits a colour (eight would be lost): predict with medseg")
            array = np.asarray(picture if grey else picture.convert("RGB"), np.float32)
        if array.ndim == 3 and colour == "luma":
            array = np.rint(array @ np.array([0.299, 0.587, 0.114], np.float32))
        elif array.ndim == 3 and colour != "rgb" and channels == 1 and (array[..., :1] == array).all():
            array = array[..., 0]
        array = np.moveaxis(array, -1, 0) if array.ndim == 3 else np.repeat(array[None], 3 if colour == "rgb" else 1, 0)
    if len(array) != channels:
        sys.exit(f"{path}: {len(array)} channels (colours), but the model takes {channels}")
    return array, affine, stored


def place(path, stored, choice):
    """The affine in mm of a NIfTI, the one that the data set asks for; two that disagree are refused."""
    forms = [form for form in (stored.get_sform(coded=True)[0], stored.get_qform(coded=True)[0]) if form is not None]
    affine = stored.affine if choice == "auto" else getattr(stored, f"get_{choice}")()
    if choice == "auto" and len(forms) == 2:
        corners = np.array(list(itertools.product(*[(0, n - 1) for n in (*stored.shape, 1, 1)[:3]], [1]))).T
        if np.abs(np.linalg.solve(forms[0], (forms[1] - forms[0]) @ corners)).max() > 0.5:
            sys.exit(f"{path}: sform and qform disagree: mend the header, or predict with medseg")
    unit = {1: 1000.0, 3: 0.001}.get(int(stored.header["xyzt_units"]) & 7, 1.0)  # metres, micrometres
    return np.diag([unit, unit, unit, 1.0]) @ affine


def orient(image, affine, codes):
    """Permute and flip axes to the given codes."""
    wanted = nibabel.orientations.axcodes2ornt(codes)
    change = nibabel.orientations.ornt_transform(nibabel.orientations.io_orientation(affine), wanted)
    turned = np.stack([nibabel.orientations.apply_orientation(channel, change) for channel in image])
    return turned, affine @ nibabel.orientations.inv_ornt_aff(change, image.shape[1:])


def respace(image, affine, pixdim):
    """Linear resampling to a spacing along the same axes; the first voxel's place follows MONAI's Spacing."""
    dims = image.ndim - 1
    keep = np.ix_([*range(dims), 3], [*range(dims), 3])
    old, new, result = affine[keep], np.eye(dims + 1), affine.copy()
    matrix = old[:dims, :dims]
    upper = np.linalg.cholesky(matrix.T @ matrix).T
    given = np.abs(np.atleast_1d(np.asarray(pixdim, float)))
    spacing = np.append(given, given[-1:].repeat(dims))[:dims]  # the last one for all axes that are left
    new[:dims, :dims] = matrix @ np.linalg.inv(upper) @ np.diag(np.sign(np.diag(upper)) * spacing)
    corners = np.array(list(itertools.product(*[(0.0, n - 1.0) for n in image.shape[1:]], [1.0]))).T
    out = (np.linalg.solve(new, old) @ corners)[:dims]
    size = np.round(np.ptp(out, axis=1) + 1).astype(int)
    first = next(i for i in range(2**dims) if np.allclose((out - out[:, i : i + 1]).min(axis=1), 0, atol=1e-3))
    new[:dims, dims] = (old @ corners)[:dims, first]
    turn, shift = np.split(np.linalg.solve(old, new)[:dims], [dims], axis=1)
    moved = [ndimage.affine_transform(c, turn, shift[:, 0], tuple(size), order=1, mode="nearest") for c in image]
    result[keep] = new
    return np.stack(moved), result


def scale(image, low, high, arguments):
    """Linear scaling of [low, high] to [b_min, b_max]."""
    b_min, b_max = arguments.get("b_min"), arguments.get("b_max")
    if high == low:
        return image - low if b_min is None else image - low + b_min
    image = (image - low) / (high - low)
    if b_min is not None and b_max is not None:
        image = image * (b_max - b_min) + b_min
    return np.clip(image, b_min, b_max) if arguments.get("clip") else image


def normalize(image, arguments):
    """Subtract the mean, divide by the standard deviation, over all voxels or each channel."""

    def one(part, mean, deviation):
        mean = part.mean(dtype=np.float64) if mean is None else mean
        deviation = part.std(dtype=np.float64) if deviation is None else deviation
        return (part - mean) / (deviation or 1.0)

    given = [arguments.get(name) for name in ("subtrahend", "divisor")]
    if not arguments.get("channel_wise"):
        return one(image, *given)
    return np.stack([one(part, *(v and v[i] for v in given)) for i, part in enumerate(image)])


def preprocess(image, affine, steps):
    """What the pipeline does to an image before the network."""
    for name, arguments in map(component, steps):
        if name == "Orientationd":
            image, affine = orient(image, affine, arguments["axcodes"])
        elif name == "Spacingd":
            image, affine = respace(image, affine, arguments["pixdim"])
        elif name == "ScaleIntensityRanged":
            image = scale(image, arguments["a_min"], arguments["a_max"], arguments)
        elif name == "ScaleIntensityRangePercentilesd":
            parts, ends = image if arguments.get("channel_wise") else [image], [arguments["lower"], arguments["upper"]]
            image = np.stack([scale(p, *np.percentile(p, ends), arguments) for p in parts]).reshape(image.shape)
        elif name == "ScaleIntensityd":
            low, high, least, most = arguments.get("minv", 0.0), arguments.get("maxv", 1.0), image.min(), image.max()
            if least < most and (low, high) != (None, None):
                image = scale(image, least, most, {"b_min": low, "b_max": high})
            elif low is not None:  # a constant image is multiplied, as in MONAI's rescale_array
                image = image * low
        elif name == "NormalizeIntensityd":
            image = normalize(image, arguments)
        elif name not in TARGETS_ONLY:
            sys.exit(f"preprocessing step {name} is not known here: predict with medseg")
    return np.ascontiguousarray(image, np.float32), affine


def mirrored(length, start, size):
    """Indices of `size` voxels from `start`, mirrored at the ends of an axis."""
    period = max(1, 2 * (length - 1))
    index = np.arange(start, start + size) % period
    return np.minimum(index, period - index)


def windows(length, context, divisor, padded, largest):
    """(first voxel of the window, its size, kept from, kept to) along one axis."""
    step = max(divisor, largest // divisor * divisor)
    found = []
    if padded:  # the network's own padding acts at the border; inside, every window has its context
        whole = -(-length // divisor) * divisor
        for start in range(0, whole, step):
            stop = min(start + step, whole)
            first, last = max(0, start - context), min(whole, stop + context)
            found.append((first, last - first, start, min(stop, length)))
        return found
    for start in range(0, length, step):
        stop = min(start + step, length)
        kept = -(-(stop - start) // divisor) * divisor
        found.append((start - context, kept + 2 * context, start, stop))
    return found


def softmax(logits):
    """Probabilities over axis 1; sigmoid for one channel."""
    if logits.shape[1] == 1:
        return 1 / (1 + np.exp(-logits.astype(np.float64)))
    power = np.exp(logits - logits.max(axis=1, keepdims=True))
    return power / power.sum(axis=1, keepdims=True)


def predict(session, image, model):
    """Probabilities (K, *spatial) of a preprocessed image, tile by tile."""
    geometry = model["geometry"]
    dims = geometry["spatial_dims"]
    if image.ndim - 1 == 3 and dims == 2:  # a 2-D network goes through a volume slice by slice
        reach = model["in_channels"] // len(image) // 2  # neighbouring slices as further channels
        places = [mirrored(image.shape[-1], k - reach, 2 * reach + 1) for k in range(image.shape[-1])]
        slices = [np.moveaxis(image[..., p], -1, 1).reshape(-1, *image.shape[1:-1]) for p in places]
        return np.stack([predict(session, one, model) for one in slices], axis=-1)
    _name, arguments = component(model["pipeline"]["inference"])
    if not geometry["exact_under_tiling"]:
        sys.exit("this network is not exact under tiling: predict with medseg")
    mirror = arguments.get("mirror") or ()
    axes = tuple(range(dims)) if mirror is True else tuple(mirror)
    flips = [c for n in range(len(axes) + 1) for c in itertools.combinations(axes, n)]
    plans = [
        windows(n, c, d, geometry["padded"], LARGEST_WINDOW[dims])
        for n, c, d in zip(image.shape[1:], geometry["context"], geometry["divisor"], strict=False)
    ]
    result = np.zeros((model["out_channels"], *image.shape[1:]), np.float32)
    for tile in itertools.product(*plans):
        window = image
        for axis, (first, size, _, _) in enumerate(tile, start=1):
            window = np.take(window, mirrored(image.shape[axis], first, size), axis=axis)
        total = 0.0
        for flip in flips:
            turned = np.flip(window, [a + 1 for a in flip])[None]
            (logits,) = session.run(None, {"image": np.ascontiguousarray(turned)})
            total = total + np.flip(softmax(logits)[0], [a + 1 for a in flip])
        probabilities = total / len(flips)
        inner = tuple(
            slice(start - first, stop - first) if geometry["padded"] else slice(0, stop - start)
            for first, _, start, stop in tile
        )
        place = (slice(None), *(slice(start, stop) for _, _, start, stop in tile))
        result[place] = probabilities[(slice(None), *inner)]
    return result


def to_native(probabilities, affine_pre, affine, shape):
    """Probabilities on the image's own grid, linear; outside the preprocessed image there is background."""
    dims = len(shape)
    keep = [*range(dims), 3]
    way = np.linalg.solve(affine_pre[np.ix_(keep, keep)], affine[np.ix_(keep, keep)])
    if tuple(shape) == probabilities.shape[1:] and np.allclose(way, np.eye(dims + 1), atol=1e-6):
        return probabilities
    place = (way[:dims, :dims] @ np.indices(shape).reshape(dims, -1) + way[:dims, dims:]).reshape(dims, *shape)
    sizes = np.array(probabilities.shape[1:]).reshape(-1, *[1] * dims)
    outside = ((place < -0.5 - 1e-6) | (place > sizes - 0.5 + 1e-6)).any(axis=0)  # as medseg, whatever was rounded
    moved = np.stack([ndimage.map_coordinates(p, place, order=1, mode="nearest") for p in probabilities])
    moved[:, outside] = 0
    moved[0, outside] = len(moved) > 1
    return moved


def largest_component(labels, arguments):
    """Keep the largest connected part (faces) of each label, or of all chosen labels together."""
    chosen = arguments.get("labels") or [int(v) for v in np.unique(labels) if v]
    for mask in [np.isin(labels, chosen)] if arguments.get("together") else [labels == label for label in chosen]:
        parts, count = ndimage.label(mask)
        if count > 1:
            labels = np.where(mask & (parts != np.bincount(parts.ravel())[1:].argmax() + 1), 0, labels)
    return labels.astype(np.uint8)


def plan(images, output):
    """The file of each image's mask; no image is replaced, and no two masks share a file."""
    found = [output / (p.name if p.name.lower().endswith((".nii", ".nii.gz")) else f"{p.stem}.png") for p in images]
    places = [target.resolve() for target in found]
    for path, place in zip(images, places, strict=True):
        if not path.is_file() or place in {p.resolve() for p in images} or places.count(place) > 1:
            sys.exit(f"{path}: not there, or its mask {place} would replace an image or another mask")
    return found


def main():
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("masks"))
    options = parser.parse_args()
    model = json.loads((HERE / "model.json").read_text(encoding="utf-8"))
    graph = HERE / model["weights"]["file"]
    if hashlib.sha256(graph.read_bytes()).hexdigest() != model["weights"]["sha256"]:
        sys.exit(f"{graph}: damaged or changed since it was exported")
    if model["onnx"]["runner_lacks"]:
        sys.exit(f"not known here: {', '.join(model['onnx']['runner_lacks'])}: predict with medseg")
    if model["onnx"]["runner_skips"]:
        print(f"not done here, only by medseg: {', '.join(model['onnx']['runner_skips'])}", file=sys.stderr)
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    options.output.mkdir(parents=True, exist_ok=True)
    for path, target in zip(options.images, plan(options.images, options.output), strict=True):
        image, affine, stored = read(path, model["dataset"])
        if not np.isfinite(image).all():
            sys.exit(f"{path}: NaN or infinite voxels: predict with medseg")
        prepared, affine_pre = preprocess(image, affine, model["pipeline"].get("preprocess") or [])
        probabilities = to_native(predict(session, prepared, model), affine_pre, affine, image.shape[1:])
        least = 0.5 if model.get("threshold") is None else model["threshold"]
        labels = (probabilities[0] >= least) if len(probabilities) == 1 else probabilities.argmax(axis=0)
        labels = labels.astype(np.uint8)
        for name, arguments in map(component, model["pipeline"].get("postprocess") or []):
            labels = largest_component(labels, arguments) if name == "KeepLargestComponent" else labels
            if name == "Threshold":
                value = arguments.get("value", 0.5)  # a text: it was never chosen
                labels = (probabilities[1] > (0.5 if isinstance(value, str) else value)).astype(np.uint8)
        if stored is not None:
            header = stored.header.copy()
            header.set_data_dtype(np.uint8)
            header.set_slope_inter(1, 0)
            nibabel.Nifti1Image(labels, stored.affine, header).to_filename(target)
        else:
            Image.fromarray(labels).save(target)
        print(target)


if __name__ == "__main__":
    main()
