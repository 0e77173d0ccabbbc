"""Cases from folders that describe themselves in a dataset.json: Medical Segmentation Decathlon, nnU-Net version 2."""

from __future__ import annotations

import glob
import json
from pathlib import Path
from typing import Any

from medseg.config import DatasetSpec
from medseg.config_dataset import Layout, PartFiles
from medseg.data_case import Case, Problems, stay_inside
from medseg.data_pattern import by_pattern
from medseg.errors import ConfigError, DataError, MedsegError
from medseg.files import written_suffix
from medseg.volumes import case_id, read_geometry

__all__ = ["by_msd", "by_nnunet", "read_dataset_json"]


def by_msd(layout: Layout, spec: DatasetSpec, root: Path) -> tuple[list[Case], Problems]:
    folder = root / str(layout.msd)
    if not folder.is_dir():
        return [], []
    table, problems = read_dataset_json(folder / "dataset.json", ("training",))
    cases: list[Case] = []
    for part, count in (("training", "numTraining"), ("test", "numTest")):
        entries = table.get(part, [])
        file = folder / "dataset.json"
        if not isinstance(entries, list):
            problems.append(ConfigError("not a list", code="E119", field=part, file=file, found=type(entries).__name__))
            continue
        if count in table and table[count] != len(entries):
            fix = "one of the two is wrong: count the cases"
            problems.append(
                ConfigError(
                    f"{count} differs from the list",
                    code="E119",
                    field=count,
                    file=file,
                    expected=len(entries),
                    found=table[count],
                    fix=fix,
                )
            )
        for index, entry in enumerate(entries):
            case = _msd_case(entry, f"{part}[{index}]", part, folder, spec, root, problems)
            cases += [case] if case else []
    return cases, problems


def _msd_case(
    entry: Any, where: str, part: str, folder: Path, spec: DatasetSpec, root: Path, problems: Problems
) -> Case | None:
    file = folder / "dataset.json"
    entry = {"image": entry} if isinstance(entry, str) else entry
    needed = ("image", "label") if part == "training" else ("image",)
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in needed):
        expected = " and ".join(f'"{key}"' for key in needed)
        problems.append(
            ConfigError(
                "an entry is not complete",
                code="E119",
                field=where,
                file=file,
                expected=expected,
                found=entry,
                fix="write what is missing, or remove the entry",
            )
        )
        return None
    name = case_id(Path(entry["image"]).name)
    paths: dict[str, Path | None] = {}
    for key in ("image", "label"):
        if not isinstance(entry.get(key), str):
            continue
        path = stay_inside(folder / entry[key], root, spec, problems, name)
        if path is not None and not path.exists():
            fix = "add the file, or remove the entry from dataset.json"
            problems.append(
                DataError(
                    f"the {key} of a case is missing",
                    code="E350",
                    case=name,
                    field=where,
                    file=folder / entry[key],
                    fix=fix,
                )
            )
            path = None
        paths[key] = path
    if paths["image"] is None:
        return None
    return Case(id=name, images=(paths["image"],), label=paths.get("label"), split=part)


def by_nnunet(layout: Layout, spec: DatasetSpec, root: Path) -> tuple[list[Case], Problems]:
    folder = root / str(layout.nnunet)
    if not folder.is_dir():
        return [], []
    table, problems = read_dataset_json(folder / "dataset.json", ("channel_names", "labels", "file_ending"))
    if problems:
        return [], problems
    ending = str(table["file_ending"])
    if set("{}*/") & set(ending):
        file = folder / "dataset.json"
        return [], [ConfigError("not a suffix", code="E119", field="file_ending", file=file, found=ending)]
    several = len(spec.channels)
    files = 1 if several > 1 and _holds_all_channels(folder, ending, several) else several
    parts = {}
    for part, suffix in (("training", "Tr"), ("test", "Ts")):
        images = tuple(f"{layout.nnunet}/images{suffix}/{{id}}_{i:04d}{ending}" for i in range(files))
        parts[part] = PartFiles(image=images, label=f"{layout.nnunet}/labels{suffix}/{{id}}{ending}")
    cases, more = by_pattern(Layout(training=parts["training"], test=parts["test"]), spec, root)
    seen = sorted({written_suffix(path) for path in (folder / "imagesTr").glob("*_0000.*")})
    if seen and ending not in seen:
        file, fix = folder / "dataset.json", "write the suffix that the files have"
        message = "no image has this suffix"
        return [], [
            ConfigError(message, code="E119", field="file_ending", file=file, expected=seen[0], found=ending, fix=fix)
        ]
    count, listed = table.get("numTraining"), sum(case.split == "training" for case in cases)
    if count is not None and count != listed:
        problems.append(
            ConfigError(
                "numTraining differs from the cases in imagesTr",
                code="E119",
                field="numTraining",
                file=folder / "dataset.json",
                expected=listed,
                found=count,
                fix=f"write {listed} into dataset.json, or add the images that are missing",
            )
        )
    return cases, problems + more


def _holds_all_channels(folder: Path, ending: str, channels: int) -> bool:
    """Whether an image is one file with all channels (nnU-Net's colour pictures) and not one file for each."""
    names = [f"images{part}/*_{{:04d}}{glob.escape(ending)}" for part in ("Tr", "Ts")]
    if any(True for name in names for _ in folder.glob(name.format(1))):
        return False
    for path in (path for name in names for path in sorted(folder.glob(name.format(0)))):
        try:
            _, bands, _ = read_geometry(path)
        except MedsegError:
            continue  # told when the case is read
        return bands >= channels
    return False


def read_dataset_json(path: Path, needed: tuple[str, ...]) -> tuple[dict[str, Any], Problems]:
    try:
        table = json.loads(path.read_bytes())
    except OSError as error:
        return {}, [ConfigError("cannot read dataset.json", code="E119", file=path, found=error.strerror)]
    except (UnicodeDecodeError, RecursionError) as error:
        return {}, [ConfigError("dataset.json is broken", code="E119", file=path, found=error)]
    except json.JSONDecodeError as error:
        place = f"{path}:{error.lineno}:{error.colno}"
        return {}, [ConfigError("dataset.json is broken", code="E119", file=place, found=error.msg)]
    if not isinstance(table, dict):
        return {}, [ConfigError("dataset.json is broken", code="E119", file=path, expected="keys and values")]
    missing = [key for key in needed if key not in table]
    fix = "add it, or describe the files with --images and --labels"
    return table, [ConfigError("a key is missing", code="E119", field=key, file=path, fix=fix) for key in missing]
