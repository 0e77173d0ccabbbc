"""`medseg data ...`: what data sets there are, whether one is sound, and how to add one's own."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from medseg.cli_common import DataOption, JsonOption, examples, note, say, show_json, state, table

data_app = typer.Typer(
    help="List, describe, check, fetch and add data sets; draw phantoms.", no_args_is_help=True, rich_markup_mode=None
)


@data_app.command("list", epilog=examples("medseg data list", "medseg data list --data DATA"))
def data_list(data: DataOption = None, as_json: JsonOption = False) -> None:
    """All data sets that datasets.yaml knows, and whether they are in the data folder."""
    state["json"] = as_json
    from medseg import config, config_place
    from medseg.data_layout import list_cases  # without torch and MONAI, which take seconds

    rows = []
    root = config_place.known_root(data, must_exist=True)
    for name in config.dataset_names(root=root):
        spec = config.load_dataset(name, root=root)
        found = "?"
        if root is not None:
            cases, problems = list_cases(spec, root)
            count = sum(case.split != "test" for case in cases)
            found = "-" if problems or not count else str(count)
        rows.append([name, spec.modality, spec.dims, ", ".join(spec.labels.values()), found, spec.licence])
    table("Data sets", ["name", "modality", "dims", "labels", "cases here", "licence"], rows)
    if as_json:
        names = ("name", "modality", "dims", "labels", "cases", "licence")
        show_json([dict(zip(names, row, strict=True)) for row in rows])


@data_app.command("info", epilog=examples("medseg data info liver"))
def data_info(
    name: Annotated[str, typer.Argument(help="The data set's name.")],
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Everything that datasets.yaml says of a set: files, labels, splits, licence, citation, where to get it."""
    state["json"] = as_json
    from medseg import config

    spec = config.load_dataset(name, root=data)
    if as_json:
        show_json(spec.model_dump(mode="json"))
    else:
        say(config.to_yaml(spec))


@data_app.command(
    "check", epilog=examples("medseg data check liver --data DATA", "medseg data check liver --only liver_3 --json")
)
def data_check(
    name: Annotated[str, typer.Argument(help="The data set's name.")],
    data: DataOption = None,
    only: Annotated[list[str] | None, typer.Option(help="Only this case; may be given several times.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes; as many as cores when not given.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write all problems to this check.json.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Read every image and label of a set and list every problem, with code and fix."""
    state["json"] = as_json
    from medseg.config_place import data_root

    root = data_root(data)  # before the rest of the imports, which take seconds
    from medseg import checking, config
    from medseg.errors import collect, counted
    from medseg.files import write_json

    spec = config.load_dataset(name, root=data)
    result = checking.check_dataset(spec, root, only=only or None, workers=workers, progress=not as_json)
    report = {"dataset": name, "cases": result.cases, "problems": [p.as_dict() for p in result.problems],
              "warnings": [w.as_dict() for w in result.warnings]}  # fmt: skip
    if output is not None:
        write_json(output, report)
    for warning in result.warnings:
        note(f"warning: {warning}")
    if result.problems:
        if not as_json:
            raise collect(result.problems)
        error = collect(result.problems)
        show_json({**report, "exit_code": error.exit_code})
        raise SystemExit(error.exit_code)
    say(f"ok: {counted(result.cases, 'case')} of {name}, no problem found")
    if as_json:
        show_json({**report, "exit_code": 0})


@data_app.command("fetch", epilog=examples("medseg data fetch hippocampus --data DATA"))
def data_fetch(
    name: Annotated[str, typer.Argument(help="The data set's name.")],
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Download and unpack a set whose address and checksum datasets.yaml knows; else say where to get it."""
    state["json"] = as_json
    from medseg.config_place import data_root

    root = data_root(data, must_exist=False)
    from medseg import config, fetching

    folder = fetching.fetch_dataset(config.load_dataset(name, root=data), root)
    say(f"{folder}")
    if as_json:
        show_json({"folder": folder})


@data_app.command(
    "add",
    epilog=examples(
        "medseg data add mycells --data DATA --images 'mycells/images/*.png' --labels 'mycells/masks/*.png'",
        "medseg data add mycells --data DATA --csv mycells/cases.csv",
        "medseg data add myorgan --data DATA --folder Task99_Organ",
    ),
)
def data_add(
    name: Annotated[str, typer.Argument(help="A name for the set: letters, digits, _.")],
    data: DataOption = None,
    images: Annotated[str | None, typer.Option(help="Pattern of the images, below the data folder.")] = None,
    labels: Annotated[str | None, typer.Option(help="Pattern of the labels, below the data folder.")] = None,
    instances: Annotated[
        str | None,
        typer.Option(
            help="Instead of --labels: a mask for each image that numbers its objects, or a folder of masks for each "
            "image, one file for each object."
        ),
    ] = None,
    folder: Annotated[Path | None, typer.Option(help="An MSD or nnU-Net folder with dataset.json.")] = None,
    csv: Annotated[
        Path | None, typer.Option(help="A table with columns image, label and perhaps id, patient, split.")
    ] = None,
    group: Annotated[str | None, typer.Option(help="Regular expression that finds the patient in a case's id.")] = None,
    names: Annotated[str | None, typer.Option(help="Names of the values in the files: 1=liver,2=tumour.")] = None,
    nan: Annotated[
        float | None, typer.Option(help="A number that replaces NaN and infinite voxels; else they are refused.")
    ] = None,
    affine: Annotated[
        str, typer.Option(help="sform or qform, where the two of NIfTI files disagree; auto refuses such files.")
    ] = "auto",
    links: Annotated[
        bool, typer.Option("--links", help="Links may lead out of the data folder; written into the entry.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Look at a folder of images and labels and write its entry into DATA/datasets.yaml."""
    state["json"] = as_json
    from medseg.config_place import data_root

    root = data_root(data)
    from medseg import entry
    from medseg.errors import counted

    result = entry.add_dataset(
        name,
        root,
        images=images,
        labels=labels,
        instances=instances,
        folder=folder,
        csv=csv,
        group=group,
        names=names,
        nan="refuse" if nan is None else nan,
        affine=affine,
        links=links,
    )
    for line in result.notes:
        note(line)
    say(f"added {name} to {result.file}: {counted(result.cases, 'case')}")
    say(f"next: {shlex.join(['medseg', 'data', 'check', name, *(['--data', str(data)] if data else [])])}")
    if as_json:
        show_json({"file": result.file, "cases": result.cases, "entry": result.entry, "notes": result.notes})


@data_app.command("pages", epilog=examples("medseg data pages DATA/em/train-volume.tif -o DATA/em/images"))
def data_pages(
    stacks: Annotated[list[Path], typer.Argument(help="TIFF stacks, of images or of labels.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write into.")],
    as_json: JsonOption = False,
) -> None:
    """Save each page of TIFF stacks as a picture of its own, for 2-D data sets and models."""
    state["json"] = as_json
    from medseg import entry_pages
    from medseg.errors import counted

    files = entry_pages.split_stacks(stacks, output)
    say(f"{counted(len(files), 'picture')} in {output}")
    if as_json:
        show_json({"files": files})


@data_app.command(
    "phantom",
    epilog=examples(
        "medseg data phantom liver -o DATA --cases 8", "medseg data phantom cell -o DATA --cases 20 --seed 1"
    ),
)
def data_phantom(
    kind: Annotated[str, typer.Argument(help="liver, drive, cell or shapes.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The data folder to write into.")],
    cases: Annotated[int, typer.Option(help="Labelled training cases.")] = 8,
    seed: Annotated[int, typer.Option(help="The same seed draws the same images.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Draw images that look like the real thing, in the real set's layout."""
    state["json"] = as_json
    from rich.console import Console
    from rich.progress import Progress

    from medseg import phantom

    with Progress(console=Console(stderr=True), transient=True, disable=as_json) as bar:
        task = bar.add_task(f"drawing {kind}", total=None)
        folder = phantom.write_phantom(
            kind,
            output,
            cases=cases,
            seed=seed,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    say(f"{folder}")
    if as_json:
        show_json({"folder": folder})
