"""The `medseg` command: one function for each command, which reads options, calls one or more programs, and prints.

Nothing heavy is imported before a command runs, so that `medseg --help` answers at once. Programs meet here and only
here: training writes predictions into the run, evaluation scores them, the report shows both.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from medseg import __version__
from medseg.cli_common import (
    DataOption,
    DebugOption,
    DeviceOption,
    JsonOption,
    call,
    examples,
    exit_codes,
    kept,
    newest,
    note,
    say,
    show_json,
    show_summary,
    state,
)
from medseg.cli_data import data_app
from medseg.cli_lists import networks_app, pipelines_app
from medseg.cli_train import train

app = typer.Typer(
    name="medseg",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Medical image segmentation with U-Nets: train, predict, evaluate, compare, report.",
)
app.add_typer(data_app, name="data")
app.add_typer(pipelines_app, name="pipelines")
app.add_typer(networks_app, name="networks")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; ends with SystemExit, whose code is one of medseg's."""
    state.update(debug=False, json=False)
    with exit_codes():
        code = call(app, sys.argv[1:] if arguments is None else arguments)
        if code == 130:
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)


def _version(shown: bool) -> None:
    if shown:
        print(f"medseg {__version__}")
        raise typer.Exit


@app.callback(
    epilog=examples("medseg train liver --data DATA", "medseg predict runs/liver scans/*.nii.gz -o masks")
    + "\n\nExit codes: 0 done, 1 bug, 2 usage or config, 3 data refused, 4 some cases failed, 5 environment, "
    "130 interrupted, 143 terminated."
)
def _options(
    debug: DebugOption = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    state["debug"] = debug


app.command(
    epilog=examples(
        "medseg train liver --data DATA",
        "medseg train hippocampus --data DATA --fold all --set train.minutes=15",
        "medseg train mycells --pipeline cell --data DATA --minutes 10",
        "medseg train --resume runs/liver/2026-11-21_101500",
    )
)(train)


@app.command(
    epilog=examples(
        "medseg predict runs/liver scan.nii.gz -o masks",
        "medseg predict runs/liver 'scans/*.nii.gz' dicom_folder -o masks --resume",
        "medseg predict runs/liver scans -o masks --plan",
    )
)
def predict(
    model: Annotated[
        list[Path], typer.Argument(help="RUN IMAGES...: a run, checkpoint or package, then files or folders.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the label images.")] = Path("predictions"),
    ensemble: Annotated[
        list[Path] | None, typer.Option("--with", help="Another run; probabilities are averaged.")
    ] = None,
    device: DeviceOption = "auto",
    plan: Annotated[bool, typer.Option("--plan", help="Say what it would cost, predict nothing.")] = False,
    certify: Annotated[bool, typer.Option("--certify", help="Compare tiled with whole-image output first.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Skip cases whose output is there and complete.")] = False,
    save_probabilities: Annotated[
        bool, typer.Option("--save-probabilities", help="Also write probabilities (Zarr).")
    ] = False,
    format: Annotated[str | None, typer.Option(help="Format of the output: nifti, dicom-seg, png, tiff.")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16, fp16; else the pipeline's.")] = None,
    max_ram: Annotated[float | None, typer.Option(help="GB of memory to keep below.")] = None,
    max_vram: Annotated[float | None, typer.Option(help="GB of GPU memory to keep below.")] = None,
    shard: Annotated[
        str | None, typer.Option(help="K/N: do only every Nth case, starting with the Kth (from 0).")
    ] = None,
    series: Annotated[str | None, typer.Option(help="Series to take when a DICOM folder holds several.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Segment images: NIfTI, DICOM series, MetaImage, NRRD, TIFF, PNG or JPEG in, the same grid out."""
    state["json"] = as_json
    from medseg import prediction

    run, *images = model
    with kept(f"masks that are complete stay in {output}; the same command with --resume does the others"):
        result = prediction.predict(
            [run, *ensemble] if ensemble else run,
            images,
            output,
            device=device,
            plan=plan,
            certify=certify,
            resume=resume,
            save_probabilities=save_probabilities,
            format=format,
            precision=precision,
            max_ram=max_ram,
            max_vram=max_vram,
            shard=shard,
            series=series,
            progress=not as_json,
        )
    if as_json:
        show_json(result.as_dict())
    else:
        say(result.text())
    if result.exit_code:
        sys.exit(result.exit_code)


@app.command(
    epilog=examples(
        "medseg evaluate masks labels -o scores",
        "medseg evaluate runs/liver/2026-11-21_101500",
        "medseg evaluate masks drive --data DATA --part test --format latex",
    )
)
def evaluate(
    predictions: Annotated[Path, typer.Argument(help="Folder of predicted label images, or a run.")],
    reference: Annotated[str | None, typer.Argument(help="Folder of reference labels, or a data set's name.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for cases.csv, summary.json, report.html.")
    ] = None,
    data: DataOption = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the images, for the report's pictures; with a folder of labels.")
    ] = None,
    run: Annotated[Path | None, typer.Option(help="Run whose label names and scores to use.")] = None,
    part: Annotated[str, typer.Option(help="Part of the data set: training or test.")] = "test",
    protocol: Annotated[
        str | None,
        typer.Option(help="Named set of scores: lits, msd, drive, ctc, isbi_em, dsb2018; or 'msd: {tolerance: 7}'."),
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="Scores: Dice,HD95 or 'SurfaceDice: {tolerance: 2}'.")
    ] = None,
    labels: Annotated[str | None, typer.Option(help="Names: 1=liver,2=tumour.")] = None,
    ignore: Annotated[int | None, typer.Option(help="Value of void pixels in a folder of labels.")] = None,
    resample: Annotated[
        bool, typer.Option("--resample", help="Bring predictions on another grid to the reference's.")
    ] = False,
    observer: Annotated[
        str | None, typer.Option(help="Second observer's labels: a folder, or a path with {id}.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes; as many as cores and memory allow when not given.")
    ] = None,
    format: Annotated[list[str] | None, typer.Option(help="Also write a table: markdown, latex.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Score predictions against references: per case and label, with intervals and a report."""
    state["json"] = as_json
    from medseg import evaluation, report

    with kept("scores are written when all cases are scored: run the same command again"):
        result = evaluation.evaluate(
            predictions, reference, output=output, data=data, images=images, run=newest(run) if run else None,
            part=part, protocol=protocol, metrics=metric or None, labels=labels, ignore=ignore, resample=resample,
            observer=observer, workers=workers, formats=tuple(format or ()), progress=not as_json,
        )  # fmt: skip
        page = report.write_report(result.folder)
    if as_json:
        show_json({**result.as_dict(), "report": page})
    else:
        show_summary(result)
        say(f"scores: {result.folder / 'cases.csv'}")
        say(f"report: {page}")
    if result.exit_code:
        note("medseg: E400: some cases failed or are missing; they are counted as missed and listed in the report")
        sys.exit(result.exit_code)


@app.command(epilog=examples("medseg compare runs/a/scores runs/b/scores", "medseg compare A B C -o comparison"))
def compare(
    scores: Annotated[list[Path], typer.Argument(help="Two or more folders with cases.csv: evaluations or runs.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for comparison.csv and .json.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Say whether one set of predictions is better than another, on the same cases."""
    state["json"] = as_json
    from medseg import comparison

    result = comparison.compare(*scores, output=output)
    say(result.text())
    if as_json:
        show_json(result.as_dict())


@app.command(epilog=examples("medseg report runs/liver/2026-11-21_101500", "medseg report scores -o scores.html"))
def report(
    folder: Annotated[Path, typer.Argument(help="A run or a folder written by evaluate.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; report.html inside by default.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write the one-file HTML report of a run or an evaluation."""
    state["json"] = as_json
    from medseg import report as program

    page = program.write_report(newest(folder), output=output)
    show_json({"report": page}) if as_json else say(f"report: {page}")


@app.command(
    epilog=examples(
        "medseg export runs/liver --format package -o liver_package",
        "medseg export runs/liver --format bundle -o liver_bundle",
        "medseg export runs/liver --format onnx -o liver_onnx",
    )
)
def export(
    run: Annotated[Path, typer.Argument(help="A run or checkpoint.")],
    format: Annotated[str, typer.Option(help="package (safetensors and JSON), bundle (MONAI) or onnx.")] = "package",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a trained model in a form that others can use, after checking that tiled equals whole-image output."""
    state["json"] = as_json
    from medseg import export as program
    from medseg.errors import UsageError

    makers = {"package": program.export_package, "bundle": program.export_bundle, "onnx": program.export_onnx}
    if format not in makers:
        raise UsageError("unknown export format", field="--format", expected=", ".join(makers), found=format)
    run = newest(run)
    written = makers[format](run, output or Path(f"{run.name}_{format}"))
    say(f"{format}: {written}")
    if as_json:
        show_json({"format": format, "written": written})


@app.command(epilog=examples("medseg doctor", "medseg doctor --json"))
def doctor(as_json: JsonOption = False) -> None:
    """Print versions, devices, threads, memory, disk and extras, and run a ten-second self test."""
    state["json"] = as_json
    from medseg import doctor as program

    facts = program.describe_machine()
    for name, value in facts.items():
        shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        say(f"{name:10} {', '.join(shown) if isinstance(shown, list) else shown}")
    checks = []
    for what, passed, measured in program.self_test():
        say(f"{'ok ' if passed else 'BAD'}  {what}: {measured}")
        checks.append({"what": what, "passed": passed, "measured": measured})
    if as_json:
        show_json({**facts, "self_test": checks})
    if not all(check["passed"] for check in checks):
        sys.exit(5)


if __name__ == "__main__":
    main()
