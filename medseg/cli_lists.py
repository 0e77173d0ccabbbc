"""`medseg pipelines ...` and `medseg networks ...`: what there is, and a look at one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medseg.cli_common import JsonOption, PipelinesOption, SetOption, examples, say, show_json, state, table

pipelines_app = typer.Typer(help="List, show, copy and check pipelines.", no_args_is_help=True, rich_markup_mode=None)
networks_app = typer.Typer(
    help="List networks, and show one's size and cost.", no_args_is_help=True, rich_markup_mode=None
)


@pipelines_app.command("list", epilog=examples("medseg pipelines list", "medseg pipelines list --json"))
def pipelines_list(folder: PipelinesOption = None, as_json: JsonOption = False) -> None:
    """All pipelines that can be found: in --pipelines, in ./pipelines, and those that come with medseg."""
    state["json"] = as_json
    from medseg import config

    rows = []
    for name in config.pipeline_names(folder):
        pipeline = config.load_pipeline(name, folder=folder)
        rows.append([name, pipeline.dataset, pipeline.network.name, pipeline.loss.name, pipeline.title])
    table("Pipelines", ["name", "data set", "network", "loss", "what"], rows)
    if as_json:
        show_json([dict(zip(("name", "dataset", "network", "loss", "title"), row, strict=True)) for row in rows])


@pipelines_app.command(
    "show", epilog=examples("medseg pipelines show liver", "medseg pipelines show liver --set train.batch=4")
)
def pipelines_show(
    name: Annotated[str, typer.Argument(help="A pipeline's name or a YAML file.")],
    folder: PipelinesOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """The whole pipeline as it would run, overrides included."""
    state["json"] = as_json
    from medseg import config

    pipeline = config.load_pipeline(name, folder=folder, overrides=settings or ())
    if as_json:
        show_json(pipeline.to_dict())
    else:
        say(config.to_yaml(pipeline))


@pipelines_app.command("copy", epilog=examples("medseg pipelines copy liver pipelines/mine.yaml"))
def pipelines_copy(
    name: Annotated[str, typer.Argument(help="A pipeline's name.")],
    target: Annotated[Path, typer.Argument(help="The file to write; never overwritten.")],
    folder: PipelinesOption = None,
) -> None:
    """Copy a pipeline's file, comments included, to start one of your own."""
    from medseg import config
    from medseg.errors import UsageError
    from medseg.files import write_text

    if target.exists():
        raise UsageError("the file is there already; nothing is overwritten", file=target, fix="give another name")
    if target.suffix not in (".yaml", ".yml"):
        raise UsageError("a pipeline's file ends with .yaml", file=target)
    write_text(target, config.pipeline_file(name, folder=folder).read_text(encoding="utf-8"))
    say(f"{target}")


@pipelines_app.command("check", epilog=examples("medseg pipelines check", "medseg pipelines check pipelines/mine.yaml"))
def pipelines_check(
    names: Annotated[list[str] | None, typer.Argument(help="Names or files; all when none is given.")] = None,
    folder: PipelinesOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check pipelines without data: keys, values, names of components and their arguments, the network's geometry."""
    state["json"] = as_json
    from medseg import config
    from medseg.errors import MedsegError, collect

    problems: list[MedsegError] = []
    checked = list(names or config.pipeline_names(folder))
    for name in checked:
        try:
            config.load_pipeline(name, folder=folder, overrides=settings or ())
            say(f"ok   {name}")
        except MedsegError as error:
            problems.append(error)
            say(f"BAD  {name}")
    if problems:
        raise collect(problems)
    if as_json:
        show_json({"checked": checked, "problems": []})


@networks_app.command("list", epilog=examples("medseg networks list"))
def networks_list(as_json: JsonOption = False) -> None:
    """All networks, with their parameters at default settings."""
    state["json"] = as_json
    from medseg.networks import summary

    rows = summary.list_networks()
    names = list(rows[0])
    table("Networks", names, [[row[name] for name in names] for row in rows])
    if as_json:
        show_json(rows)


@networks_app.command(
    "show",
    epilog=examples(
        "medseg networks show UNet",
        "medseg networks show UNet --input 572,572",
        "medseg networks show AttentionUNet --dims 3 --input 96,96,96 --set channels=[16,32,64,128,256]",
    ),
)
def networks_show(
    name: Annotated[str, typer.Argument(help="A network's name.")],
    dims: Annotated[int, typer.Option(help="2 or 3.")] = 2,
    size: Annotated[
        str | None, typer.Option("--input", help="Voxels a side: 572,572; the nearest legal size is taken.")
    ] = None,
    in_channels: Annotated[int, typer.Option(help="Channels of the image.")] = 1,
    out_channels: Annotated[int, typer.Option(help="Classes, background included.")] = 2,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="An argument of the network: --set channels=[16,32].", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Parameters, operations, receptive field, tiling geometry and memory for one training step."""
    state["json"] = as_json
    from medseg import component, config
    from medseg.errors import UsageError, collect
    from medseg.networks import summary

    arguments = config.parse_settings(settings or ())
    part = component.Component(name, arguments)
    if problems := component.check_component(part, "network"):
        raise collect(problems)
    network = component.build_component(
        part, "network", spatial_dims=dims, in_channels=in_channels, out_channels=out_channels
    )
    try:
        sides = (
            tuple(int(n) for n in size.replace("x", ",").split(",")) if size else (256,) * 2 if dims == 2 else (96,) * 3
        )
    except ValueError:
        sides = (0,)
    if min(sides) < 1:
        raise UsageError("not a size", field="--input", expected="numbers above 0: 572,572", found=size)
    if len(sides) != dims:
        raise UsageError(
            "the input's size has another number of axes", field="--input", expected=dims, found=len(sides)
        )
    facts = summary.describe(network, network.legal_size(sides))
    table(name, ["what", "value"], [[key, value] for key, value in facts.items()])
    if as_json:
        show_json(facts)
