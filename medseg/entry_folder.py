"""What the dataset.json of a Medical Segmentation Decathlon or nnU-Net folder says of the files of a new data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medseg.config_dataset import Layout
from medseg.data_folder import read_dataset_json
from medseg.entry_pairing import no_signs
from medseg.errors import ConfigError, collect, listed

__all__ = ["from_folder"]


def from_folder(root: Path, place: str) -> tuple[Layout, dict[str, Any]]:
    """Layout of the folder `place` below `root`; channels, labels, ignore, modality and title as dataset.json has them.

    Raises:
        ConfigError: dataset.json is not there, cannot be read, or tells no channels or labels.
    """
    if not (root / place / "dataset.json").exists():
        message, expected = "the folder has no dataset.json", "an MSD or nnU-Net folder, which describes itself"
        fix = "describe it with --images and --labels, or --csv; annotations in JSON (COCO, LabelMe) are not read: "
        fix += "draw them into one label image for each image"
        raise ConfigError(
            message, code="E119", field="--folder", file=root / place, expected=expected, found=_content(root / place),
            fix=fix,
        )  # fmt: skip
    table, problems = read_dataset_json(root / place / "dataset.json", ("labels",))
    if problems:
        raise collect(problems)
    file = root / place / "dataset.json"
    no_signs(place, "--folder", file)
    channels = table.get("channel_names") or table.get("modality") or {"0": "image"}
    told = {"channels": _values(channels, file, "channel_names"), **_labels(table["labels"], file)}
    told["modality"] = ", ".join(told["channels"])
    told["title"] = str(table.get("name") or table.get("description") or place)
    if "channel_names" in table and "file_ending" in table:
        return Layout(nnunet=place), told
    ending = ".nii.gz"
    if any((root / place / "imagesTr").glob(f"*_0000{ending}")):  # nnU-Net version 1: MSD's json, nnU-Net's file names
        images = [f"{place}/imagesTr/{{id}}_{i:04d}{ending}" for i in range(len(told["channels"]))]
        return Layout.model_validate({"training": {"image": images, "label": f"{place}/labelsTr/{{id}}{ending}"}}), told
    return Layout(msd=place), told


def _content(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else ["a file"]
    return listed(names) or "nothing"


def _labels(table: Any, file: Path) -> dict[str, Any]:
    if not isinstance(table, dict) or not table:
        expected = '{"background": 0, "liver": 1} or {"0": "background", "1": "liver"}'
        fix = "give each label its stored value"
        message = "labels are not told"
        raise ConfigError(message, code="E119", field="labels", file=file, expected=expected, found=table, fix=fix)
    result: dict[int, str] = {}
    ignore = None
    for key, value in table.items():  # {"0": "background"} (MSD) or {"background": 0} (nnU-Net)
        index, text = (key, value) if str(key).isdecimal() else (value, key)
        if not isinstance(index, int | str) or not str(index).isdecimal():
            fix = "regions of several labels are not supported: give one index for each label"
            raise ConfigError(
                "a label without an index", code="E119", field=f"labels.{key}", file=file, found=value, fix=fix
            )
        if text == "ignore":
            ignore = int(index)
        else:
            result[int(index)] = str(text)
    if 0 in result and sorted(result) != list(range(len(result))):  # 0, 1, 2, 4
        encoding = {value: number for number, value in enumerate(sorted(result)) if value}
        labels = {0: result[0], **{number: result[value] for value, number in encoding.items()}}
        return {"labels": labels, "ignore": ignore, "encoding": encoding}
    return {"labels": result, "ignore": ignore}


def _values(table: Any, file: Path, field: str) -> list[str]:
    if isinstance(table, dict) and all(str(key).isdecimal() for key in table):
        return [str(table[key]) for key in sorted(table, key=int)]
    raise ConfigError("channels are not told", code="E119", field=field, file=file, expected='{"0": "CT"}', found=table)
