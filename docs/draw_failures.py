"""Draw where the three worst cases of a run are wrong: `python docs/draw_failures.py RUN -o FILE [--images]`.

Takes what `medseg train` and `medseg evaluate RUN` leave in RUN/validation/views. Of a volume the axial slice with most
wrong voxels is drawn. `--images` puts the image above each map; leave it away where the images may not be passed on,
as for the pictures of docs/failures.md, which hold no pixel of an image.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import numpy as np

from medseg.report_pictures import ERROR_COLOURS, error_map, match_objects, shows_objects
from medseg.run import newest_run
from medseg.views import View, read_views

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Patch

MARGIN = 8  # voxels shown around what is marked


def choose_plane(view: View, labels: Mapping[int, str]) -> tuple[np.ndarray, np.ndarray | None, str]:
    """Error map and image of what is drawn, cut to what is marked, and which slice it is."""
    if shows_objects(view, labels):
        view = replace(view, prediction=match_objects(view.prediction, view.reference))
    error, image, where = error_map(view.prediction, view.reference), view.image, ""
    if view.is_volume:
        wrong = (error > 1).sum(axis=(0, 1))
        index = int(wrong.argmax())
        # the patient's right on the left, anterior at the top, as the report shows them
        error = error[::-1, ::-1, index].T
        image = None if image is None else image[::-1, ::-1, index].T
        where = f", slice {index + 1}"
    marked = np.argwhere(error > 0)
    if len(marked):
        low, high = np.maximum(marked.min(axis=0) - MARGIN, 0), marked.max(axis=0) + MARGIN + 1
        cut = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        error, image = error[cut], None if image is None else image[cut]
    return error, image, where


def draw(views: list[View], labels: Mapping[int, str], output: Path, *, images: bool) -> None:
    rows = 2 if images else 1
    figure, axes = plt.subplots(rows, len(views), figsize=(3.6 * len(views), 3.5 * rows + 0.4), squeeze=False)
    table = np.array([mpl.colors.to_rgb(colour) for colour in ("#12161c", *ERROR_COLOURS.values())])
    for column, view in enumerate(views):
        error, image, where = choose_plane(view, labels)
        drawn = [error if image is None else image, error] if images else [error]
        for axis, picture in zip(axes[:, column], drawn, strict=True):
            picture = table[picture] if picture is error else picture
            axis.imshow(picture, interpolation="nearest", cmap="gray")
            axis.set_axis_off()
        name = view.case if len(view.case) <= 20 else f"{view.case[:8]}..."
        score = "no score" if view.score is None else f"{view.score:.3f}"
        axes[0, column].set_title(f"{name}: {view.metric} {score}{where}", fontsize=9)
    objects = any(shows_objects(view, labels) for view in views)
    names = {"wrong label": "wrong object"} if objects else {}
    handles = [Patch(facecolor=colour, label=names.get(name, name)) for name, colour in ERROR_COLOURS.items()]
    figure.legend(handles=handles, loc="lower center", ncols=4, fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(output, dpi=75)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=newest_run, help="a run's folder, or a folder of runs")
    parser.add_argument("-o", "--output", type=Path, default=Path("failures.png"))
    parser.add_argument("--images", action="store_true", help="the image above each error map")
    arguments = parser.parse_args()
    folder = arguments.run / "validation"
    views = [view for view in read_views(folder / "views") if view.role == "worst"]
    if not views:
        parser.error(f"no views in {arguments.run}: medseg evaluate {arguments.run}")
    labels = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["labels"]
    draw(views, {int(index): name for index, name in labels.items()}, arguments.output, images=arguments.images)
    print(arguments.output)


if __name__ == "__main__":
    main()
