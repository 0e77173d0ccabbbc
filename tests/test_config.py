"""Configuration: strict YAML, all faults at once with their places, overrides, lookup, round trips."""

from __future__ import annotations

import contextlib
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg import config, config_yaml
from medseg.config import DatasetSpec, Pipeline, TrainConfig, load_dataset, load_pipeline, parse_settings
from medseg.config_yaml import parse_yaml, read_yaml, write_yaml
from medseg.errors import ConfigError, MedsegError, UsageError

PIPELINE = """\
# A title for the list.
# Command: medseg train tiny
dataset: tiny
preprocess:
  - NormalizeIntensityd
augment:
  - RandFlipd: {prob: 0.5, spatial_axis: [0]}
  - RandGaussianNoised
network: {UNet: {channels: [4, 8, 16], padding: same}}
loss: DistanceWeightedDiceCELoss
optimizer: {AdamW: {lr: 1e-3}}
schedule: {PolynomialLR: {power: 0.9}}
train:
  epochs: 3
  batch: 2
  patch: [32, 32]
metrics: [Dice, {SurfaceDice: {tolerance: 2.0}}]
best: Dice
"""
DATASETS = """\
tiny:
  title: A tiny set
  modality: drawing
  dims: 2
  channels: [grey]
  colour: grey
  unit: px
  labels: {0: background, 1: thing}
  files: {training: {image: "tiny/{id}.png", label: "tiny/labels/{id}.png"}}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with its own datasets.yaml and pipelines/tiny.yaml."""
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines" / "tiny.yaml").write_text(PIPELINE, encoding="utf-8")
    (tmp_path / "datasets.yaml").write_text(DATASETS, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def problems_of(action) -> list[MedsegError]:
    with pytest.raises(MedsegError) as caught:
        action()
    assert caught.value.exit_code == 2
    return list(caught.value.problems)


def change(folder: Path, old: str, new: str, file: str = "pipelines/tiny.yaml") -> None:
    path = folder / file
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


# --- YAML -------------------------------------------------------------------------------------------------------


def test_scalars_follow_yaml_1_2():
    text = "a: 1e-3\nb: 1.0e-3\nc: .5\nd: yes\ne: 2026-11-21\nf: 1:30\ng: '1'\nh: ~\ni: -5\nj: true\nk: on\n"
    text += "l:\nm: 1e3\nn: no"
    assert parse_yaml(text).value == {
        "a": 0.001,
        "b": 0.001,
        "c": 0.5,
        "d": "yes",
        "e": "2026-11-21",
        "f": "1:30",
        "g": "1",
        "h": None,
        "i": -5,
        "j": True,
        "k": "on",
        "l": None,
        "m": 1000.0,
        "n": "no",
    }


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("a: 1\nb: 2\na: 3", "3:1", "written twice"),
        ("a: {b: 1, b: 2}", "1:11", "written twice"),
        ("1: x\n'1': y", "2:1", "written twice"),
        ("a:\n\t- 1", "2:1", "tab"),
        ("\ta: 1", "1:1", "tab"),
        ("a: !!python/object/apply:os.system [ls]", "1:4", "tags"),
        ("a: !!int 3", "1:4", "tags"),
        ("a: !x 3", "1:4", "tags"),
        ("%TAG ! tag:x,2000:\n---\na: !foo 1", "3:4", "tags"),
        ("a: &x [1]\nb: *x", "1:4", "anchors"),
        ("a: 1\n---\nb: 2", "2:1", "several documents"),
        ("a: [1, 2", "1:9", "not valid YAML"),
        ("a: b: c", "1:5", "not valid YAML"),
        ("[" * 100, "1:21", "nested too deeply"),
        ("a: 010", "1:4", "read differently"),
        ("a: 0x10", "1:4", "read differently"),
        ("a: 1_000", "1:4", "read differently"),
        ("a: .inf", "1:4", "not a finite number"),
        ("a: -.NaN", "1:4", "not a finite number"),
        ("a: 1e999", "1:4", "too large"),
        ("a: " + "9" * 40, "1:4", "more than 30 digits"),
        ("? [1, 2]\n: 3", "1:3", "a key has to be"),
        ("1.5: 2", "1:1", "a key has to be"),
        ("true: 2", "1:1", "a key has to be"),
        ("~: 2", "1:1", "a key has to be"),
        ('a: "\\ud800"', "1:4", "lone surrogate"),
        ("a: b\x07", None, "not valid YAML"),
    ],
)
def test_what_the_reader_refuses_with_line_and_column(text, place, message):
    (problem, *_) = problems_of(lambda: parse_yaml(text, source="f.yaml"))
    assert message in problem.message
    assert problem.file == (f"f.yaml:{place}" if place else "f.yaml")


def test_billion_laughs_is_refused_at_once():
    lines = ["a0: &a0 [lol]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    (problem,) = problems_of(lambda: parse_yaml("\n".join(lines)))
    assert "aliases" in problem.message


def test_all_faults_of_a_text_come_together():
    assert len(problems_of(lambda: parse_yaml("a: 010\nb: .nan\nc: 1\nc: 2"))) == 3


@pytest.mark.parametrize(
    ("raw", "message"),
    [(b"\xff\xfea\x00", "not a text in UTF-8"), (b"# " + b"x" * 1_000_001, "too large"), (None, "cannot read")],
)
def test_files_that_cannot_be_configuration(tmp_path, raw, message):
    path = tmp_path / "x.yaml"
    if raw is not None:
        path.write_bytes(raw)
    (problem,) = problems_of(lambda: read_yaml(path))
    assert message in problem.message


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(blacklist_categories=("Cs", "Cc")), max_size=12)
    | st.sampled_from(
        ["1e-3", "yes", "on", "010", "0x1f", "1_0", "null", "~", "true", "-", ".inf", "1:30", "a: b", "# x", ""]
    ),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(categories=("L", "Nd")), min_size=1, max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(plain)
def test_what_is_written_reads_back_equal(value):
    assert parse_yaml(write_yaml({"value": value})).value == {"value": value}


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_read_or_refused_never_anything_else(text):
    with contextlib.suppress(ConfigError):
        parse_yaml(text)


# --- pipelines --------------------------------------------------------------------------------------------------


def test_a_pipeline_is_read(folder):
    pipeline = load_pipeline("tiny")
    assert pipeline.title == "A title for the list."
    assert pipeline.network.arguments == {"channels": [4, 8, 16], "padding": "same"}
    assert pipeline.optimizer.arguments == {"lr": 0.001}
    assert pipeline.train == TrainConfig(epochs=3, batch=2, patch=(32, 32))
    assert [part.name for part in pipeline.augment] == ["RandFlipd", "RandGaussianNoised"]
    assert pipeline.postprocess == ()
    assert pipeline.inference.name == "OverlapTileInferer"


def test_a_pipeline_cannot_be_changed(folder):
    pipeline = load_pipeline("tiny", check=False)
    with pytest.raises(ValueError, match="frozen"):
        pipeline.best = "IoU"


def test_round_trips(folder):
    pipeline = load_pipeline("tiny", check=False)
    assert Pipeline.from_dict(pipeline.to_dict()) == pipeline
    assert pickle.loads(pickle.dumps(pipeline)) == pipeline
    (folder / "again.yaml").write_text(config.to_yaml(pipeline), encoding="utf-8")
    again = load_pipeline("again.yaml", check=False)
    assert (pipeline.name, again.name) == ("tiny", "again")
    assert again.model_copy(update={"name": "tiny"}) == pipeline


@pytest.mark.parametrize(
    ("old", "new", "place", "field", "fix"),
    [
        ("augment:", "augmnet:", "6:1", "augmnet", "did you mean `augment`?"),
        ("  epochs: 3", "  epochs: -3", "14:3", "train.epochs", None),
        ("  epochs: 3", "  epochs: 0", "14:3", "train.epochs", None),
        ("  epochs: 3", "  epochs: 2.5", "14:3", "train.epochs", None),
        ("  epochs: 3", "  epochs: three", "14:3", "train.epochs", None),
        ("  epochs: 3", "  epochs: 3\n  minutes: 2", "13:1", "train", None),
        ("  epochs: 3", "  validate_every: 1", "13:1", "train", None),
        ("  batch: 2", "  batchs: 2", "15:3", "train.batchs", "did you mean `batch`?"),
        ("  batch: 2", "  batch: true", "15:3", "train.batch", None),
        ("  patch: [32, 32]", "  patch: [32, 0]", "16:15", "train.patch.1", None),
        ("  patch: [32, 32]", "  patch: [30, 32]", "16:3", "train.patch", None),
        (
            "  patch: [32, 32]",
            "  patch: [32, 32, 32]",
            "16:3",
            "train.patch",
            "--set 'train.patch=[32,32]', or another pipeline",
        ),
        ("  patch: [32, 32]", "  patch: [32, 32]\n  context_slices: 1", "17:3", "train.context_slices", None),
        ("dataset: tiny", "dataset: tinny", "3:1", "dataset", "did you mean `tiny`?"),
        ("network: {UNet:", "network: {UNett:", "9:11", "network.UNett", "did you mean `UNet`?"),
        ("{channels:", "{chanels:", "9:18", "network.UNet.chanels", "did you mean `channels`?"),
        ("[4, 8, 16]", "[4, 8, x]", "9:18", "network.UNet.channels", None),
        ("loss: DistanceWeightedDiceCELoss", "loss: DiceLoss", "10:1", "loss.DiceLoss", None),
        ("lr: 1e-3", "lr: -1e-3", "11:13", "optimizer.AdamW", None),
        ("{prob: 0.5,", "{probability: 0.5,", "7:17", "augment.0.RandFlipd.probability", "did you mean `prob`?"),
        ("  - NormalizeIntensityd", "  - RandGaussianNoised", "5:5", "preprocess", "move it to `augment`"),
        ("{tolerance: 2.0}", "{tolerance: -2.0}", "17:33", "metrics.1.SurfaceDice.tolerance", None),
        ("best: Dice", "best: Dicee", "18:1", "best", None),
        ("best: Dice", "", "3:1", "best", None),
        (
            "schedule: {PolynomialLR: {power: 0.9}}",
            "schedule: {PolynomialLR: {power: 0.9}, StepLR: {}}",
            "12:1",
            "schedule",
            None,
        ),
    ],
)
def test_each_fault_is_told_with_its_place(folder, old, new, place, field, fix):
    change(folder, old, new)
    found = problems_of(lambda: load_pipeline("tiny"))
    match = [problem for problem in found if (problem.field or "").startswith(field) or problem.field == field]
    assert match, [str(problem) for problem in found]
    problem = match[0]
    line = place.split(":")[0]  # the column depends on how deep the fault is, the line is what one jumps to
    assert (problem.file or "").startswith(f"pipelines/tiny.yaml:{line}:"), problem.file
    if fix:
        assert problem.fix == fix


def test_a_signed_error_picks_no_weights(folder):
    """Of two networks the one that finds most beside the structure would be the better."""
    change(folder, "metrics: [Dice,", "metrics: [Dice, RVD,")
    load_pipeline("tiny")
    change(folder, "best: Dice", "best: RVD")
    (found,) = problems_of(lambda: load_pipeline("tiny"))
    assert (found.field, found.code, found.expected) == ("best", "E118", "Dice or SurfaceDice")
    assert (found.file or "").startswith("pipelines/tiny.yaml:18:")


def test_all_faults_of_a_pipeline_come_together(folder):
    change(folder, "augment:", "augmnet:")
    change(folder, "epochs: 3", "epochs: -3")
    change(folder, "lr: 1e-3", "lrr: 1e-3")
    change(folder, "dataset: tiny", "dataset: nowhere")
    change(folder, "best: Dice", "best: Dicee")
    change(folder, "UNet:", "Unet:")
    fields = {problem.field for problem in problems_of(lambda: load_pipeline("tiny"))}
    assert fields >= {"augmnet", "train.epochs", "optimizer.AdamW.lrr", "dataset", "best", "network.Unet"}


def test_volumes_may_be_cut_into_slices(folder):
    change(folder, "dims: 2", "dims: 3", "datasets.yaml")
    change(folder, ".png", ".nii.gz", "datasets.yaml")
    change(folder, "  patch: [32, 32]", "  patch: [32, 32]\n  context_slices: 1")
    assert load_pipeline("tiny").train.context_slices == 1
    change(folder, "[32, 32]", "[32, 32, 32]")
    assert [problem.field for problem in problems_of(lambda: load_pipeline("tiny"))] == ["train.context_slices"]


def test_an_unknown_pipeline_is_told_with_the_nearest(folder):
    (problem,) = problems_of(lambda: load_pipeline("tyni"))
    assert problem.fix == "did you mean `tiny`?"
    (problem,) = problems_of(lambda: load_pipeline("nowhere/tiny.yaml"))
    assert problem.code == "E111"
    (problem,) = problems_of(lambda: load_pipeline("tiny", folder="nowhere"))
    assert problem.field == "--pipelines"


def test_lookup_order_of_pipelines(folder):
    (folder / "mine").mkdir()
    (folder / "mine" / "tiny.yaml").write_text(PIPELINE.replace("A title", "My title"), encoding="utf-8")
    assert load_pipeline("tiny", folder="mine", check=False).title == "My title for the list."
    assert load_pipeline("tiny", check=False).title == "A title for the list."
    names = config.pipeline_names("mine")
    assert "tiny" in names
    assert "hippocampus" in names  # medseg's own come last, but they come


# --- overrides --------------------------------------------------------------------------------------------------


def test_overrides(folder):
    pipeline = load_pipeline(
        "tiny",
        overrides=[
            "train.minutes=1.5",
            "train.batch=8",
            "network.UNet.channels=[8, 16]",
            "augment.RandFlipd.prob=1",
            "augment.1.RandGaussianNoised.std=0.3",
            "metrics.Dice=IoU",
            "best=IoU",
            "schedule=ConstantLR",
            "preprocess=[]",
        ],
    )
    assert pipeline.train.minutes == 1.5
    assert pipeline.train.epochs is None  # one budget replaces the other
    assert pipeline.train.batch == 8
    assert pipeline.network.arguments["channels"] == [8, 16]
    assert pipeline.augment[0].arguments["prob"] == 1
    assert pipeline.augment[1].arguments == {"std": 0.3}
    assert [part.name for part in pipeline.metrics] == ["IoU", "SurfaceDice"]
    assert (pipeline.schedule.name, pipeline.schedule.arguments) == ("ConstantLR", {})
    assert pipeline.preprocess == ()


@pytest.mark.parametrize(
    ("setting", "field", "fix"),
    [
        ("train.epochs=-1", "train.epochs", None),
        ("train.epoch=4", "train.epoch", "did you mean `epochs`?"),
        ("network.UNett.channels=[1]", "network.UNett", "did you mean `UNet`?"),
        ("network.UNet.chanels=[1, 2]", "network.UNet.chanels", "did you mean `channels`?"),
        ("augment.RandFlip.prob=1", "augment.RandFlip", "did you mean `RandFlipd`?"),
        ("augment.7.RandFlipd.prob=1", "augment.7", None),
        ("trian.epochs=3", "trian", "did you mean `train`?"),
        ("train.batch.size=3", None, None),
        ("no equals sign", "--set", None),
        ("=3", "--set", None),
        ("a..b=3", "--set", None),
        ("train.batch=[1", None, None),
        ("train.batch=!!python/name:os.system", None, None),
    ],
)
def test_wrong_overrides_are_told_like_the_file(folder, setting, field, fix):
    (problem, *_) = problems_of(lambda: load_pipeline("tiny", overrides=[setting]))
    assert problem.field == field
    assert problem.fix == fix or fix is None
    assert (problem.file or problem.field or "").startswith("--set")


def test_two_budgets_on_the_command_line_are_refused(folder):
    (problem, *_) = problems_of(lambda: load_pipeline("tiny", overrides=["train.epochs=3", "train.minutes=3"]))
    assert (problem.field, problem.found) == ("--set", "train.epochs, train.minutes")


def test_one_setting_needs_no_list():
    assert parse_settings("train.epochs=5") == {"train": {"epochs": 5}}


def test_settings_for_a_single_component():
    assert parse_settings(["channels=[16, 32]", "a.b=1e-3"]) == {"channels": [16, 32], "a": {"b": 0.001}}


# --- data sets --------------------------------------------------------------------------------------------------


def test_lookup_order_of_data_sets(folder):
    root = folder / "data"
    root.mkdir()
    (root / "datasets.yaml").write_text(DATASETS.replace("A tiny set", "The data folder's"), encoding="utf-8")
    assert load_dataset("tiny").title == "A tiny set"
    assert load_dataset("tiny", root=root).title == "The data folder's"
    assert load_dataset("liver").dims == 3
    with pytest.raises(ConfigError, match="unknown data set"):
        load_dataset("liver", file=root / "datasets.yaml")
    assert {"tiny", "liver"} <= set(config.dataset_names())


def test_a_pipeline_finds_the_data_set_of_the_data_folder(folder):
    (folder / "data").mkdir()
    (folder / "data" / "datasets.yaml").write_text(DATASETS.replace("tiny:", "mine:"), encoding="utf-8")
    assert load_pipeline("tiny", overrides=["dataset=mine"], root=folder / "data").dataset == "mine"
    (problem,) = problems_of(lambda: load_pipeline("tiny", overrides=["dataset=mine"]))
    assert problem.field == "dataset"


@pytest.mark.parametrize(
    ("old", "new", "field", "expected"),
    [
        ("dims: 2", "dims: 4", "tiny.dims", None),
        ("dims: 2", "dim: 2", "tiny.dim", None),
        ("unit: px", "unit: cm", "tiny.unit", None),
        ("{0: background, 1: thing}", "{0: background, 1: all}", None, "no label called `all`"),
        ("{0: background, 1: thing}", "{0: background, 2: thing}", None, "without gaps"),
        ("{0: background, 1: thing}", "{1: thing}", None, "without gaps"),
        ("{0: background, 1: thing}", "{0: thing, 1: thing}", None, "a name of its own"),
        ("{0: background, 1: thing}", "{0: a, 1: b}\n  ignore: 1", None, "not one of the labels"),
        ("{0: background, 1: thing}", "{0: a, 1: b}\n  encoding: {255: 2}", None, "`encoding`"),
        ("{0: background, 1: thing}", "{0: a, 1: b}\n  nan: drop", "tiny.nan", None),
        ("[grey]", "[a, b]", None, "one channel"),
        ("colour: grey", "colour: rgb", None, "three channels"),
        ("tiny/{id}.png", "tiny/x.png", "tiny.files", "pattern with {id}"),
        ("tiny/{id}.png", "tiny/{}.png", "tiny.files", "with a name"),
        ("tiny/labels/{id}.png", "tiny/labels/{name}.png", "tiny.files", "placeholders of `image`"),
        ("tiny/{id}.png", "tiny/*{id}.png", "tiny.files", "no *"),
        ("{training:", "{msd: x, training:", "tiny.files", "exactly one"),
        ("  unit: px", "  unit: px\n  split: {unit: case, group: '('}", "tiny.split.group", "regular expression"),
        ("  unit: px", "  unit: px\n  split: {unit: slice}", "tiny.split.unit", None),
        ("  unit: px", "  unit: px\n  download: {url: 'http://x', sha256: ab, bytes: 1}", "tiny.download", "https"),
    ],
)
def test_wrong_facts_are_told(folder, old, new, field, expected):
    change(folder, old, new, "datasets.yaml")
    found = problems_of(lambda: load_dataset("tiny"))
    assert any((p.field or "").startswith(field or "") and (expected or "") in str(p.expected) for p in found), [
        str(p) for p in found
    ]
    assert all((p.file or "").startswith("datasets.yaml") for p in found)


@pytest.mark.parametrize("name", config.dataset_names(file=config.resource_folder() / "datasets.yaml"))
def test_every_data_set_of_medseg_reads_and_goes_round(name):
    spec = load_dataset(name)
    assert DatasetSpec.from_dict(spec.to_dict()) == spec
    again = parse_yaml(config.to_yaml(spec)).value[name]
    assert DatasetSpec.from_dict({"name": name, **again}) == spec
    assert spec.out_channels == len(spec.labels)
    assert spec.licence != "unknown"


@pytest.mark.parametrize("path", sorted((config.resource_folder() / "pipelines").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_pipeline_of_medseg_is_sound(path):
    pipeline = load_pipeline(path)
    assert Pipeline.from_dict(pipeline.to_dict()) == pipeline
    assert pipeline.title
    text = path.read_text(encoding="utf-8")
    assert f"medseg train {path.stem}" in text.splitlines()[1]


@pytest.mark.parametrize("name", ["voc2012", "camvid"])
def test_finding_nothing_is_no_good_score_where_a_class_is_in_few_pictures(name):
    from medseg.metrics.scoring import measure_case, pool_scores

    pipeline = load_pipeline(name)
    labels, metrics = config.load_dataset(pipeline.dataset).labels, list(pipeline.metrics)
    nothing = np.zeros((8, 8), np.uint8)
    results = [measure_case(nothing, nothing + index, labels=labels, metrics=metrics) for index in labels if index]
    scores = [*pool_scores(results, metrics), *(score for result in results for score in result.scores)]
    assert [score.value for score in scores if score.metric == pipeline.best] == [0] * (len(labels) - 1)


@pytest.mark.parametrize("name", ["drive", "cell", "hippocampus", "liver", "em", "hela", "liver_slices"])
def test_attention_siblings_differ_in_the_network_alone_and_are_as_large(name):
    from medseg.networks import build_network

    plain, attention = load_pipeline(name), load_pipeline(f"{name}_attention")
    own = {"name", "title", "network"}
    assert {k: v for k, v in plain.to_dict().items() if k not in own} == {
        k: v for k, v in attention.to_dict().items() if k not in own
    }
    spec = config.load_dataset(plain.dataset)
    sizes = []
    for pipeline in (plain, attention):
        arguments = dict(pipeline.network.arguments)
        facts = {"spatial_dims": spec.dims, "in_channels": spec.in_channels, "out_channels": spec.out_channels}
        network = build_network(pipeline.network.name, **facts, **arguments)
        sizes.append(sum(parameter.numel() for parameter in network.parameters()))
    assert sizes[1] / sizes[0] == pytest.approx(1, abs=0.02)


def test_every_data_set_of_medseg_has_a_pipeline():
    served = {load_pipeline(p, check=False).dataset for p in (config.resource_folder() / "pipelines").glob("*.yaml")}
    assert set(config.dataset_names(file=config.resource_folder() / "datasets.yaml")) == served


def test_a_protocol_that_does_not_exist(folder):
    change(folder, "  unit: px", "  unit: px\n  protocol: driver", "datasets.yaml")
    (problem,) = problems_of(lambda: load_pipeline("tiny"))
    assert (problem.fix, problem.field) == ("did you mean `drive`?", "dataset")


@pytest.mark.parametrize("argument", ["tolerance: 0.5", "tolerance: -1", "tol: 1"])
def test_a_protocol_with_an_argument(folder, argument):
    change(folder, "  unit: px", f"  unit: px\n  protocol: {{msd: {{{argument}}}}}", "datasets.yaml")
    if argument == "tolerance: 0.5":
        load_pipeline("tiny")
    else:
        (problem,) = problems_of(lambda: load_pipeline("tiny"))
        assert (problem.code, problem.field) == ("E116", "dataset")


def test_a_checkpoints_pipeline_is_checked_too():
    with pytest.raises(ConfigError) as caught:
        Pipeline.from_dict({"dataset": "x", "surprise": 1})
    assert len(caught.value.problems) > 3
    with pytest.raises(UsageError):
        DatasetSpec.from_dict({"name": "x"})


@pytest.mark.parametrize("step", ["Threshold", "CellsFromMembranes", "InstancesFromProbability"])
@pytest.mark.parametrize(("kinds", "objects"), [(1, False), (2, False), (2, True)])
def test_a_step_for_one_structure_is_refused_for_several_before_training(folder, step, kinds, objects):
    labels = "{0: background, 1: thing" + (", 2: other}" if kinds == 2 else "}")
    entry = DATASETS.replace("{0: background, 1: thing}", labels)
    (folder / "datasets.yaml").write_text(entry + ("  instances: components\n" if objects else ""), encoding="utf-8")
    steps = f"postprocess=[{{RemoveSmallObjects: {{min_size: 20}}}}, {step}]"
    if kinds == 1 or objects:
        assert [part.name for part in load_pipeline("tiny", overrides=[steps]).postprocess][1] == step
        return
    with pytest.raises(ConfigError) as caught:
        load_pipeline("tiny", overrides=[steps])
    assert (caught.value.code, caught.value.found) == ("E118", "thing, other")
    (fix,) = [word for word in (caught.value.fix or "").split("'") if word.startswith("postprocess=")]
    left = load_pipeline("tiny", overrides=[fix])
    assert [part.name for part in left.postprocess] == ["RemoveSmallObjects"]


def test_a_borrowed_pipeline_says_whose_choices_it_has(folder):
    """Its head tells of its own data set, and would stand over the report of another."""
    (folder / "datasets.yaml").write_text(DATASETS + DATASETS.replace("tiny:", "mine:", 1), encoding="utf-8")
    assert load_pipeline("tiny").title == "A title for the list."
    borrowed = load_pipeline("tiny", overrides=["dataset=mine"])
    assert borrowed.title == "mine, with the choices of tiny"
    assert (borrowed.name, load_pipeline("tiny").name) == ("mine", "tiny")  # its runs lie below runs/mine
    assert config.to_yaml(borrowed).startswith("# mine, with the choices of tiny\n")


@pytest.mark.parametrize("option", ["foreach", "differentiable"])
def test_options_of_an_optimizer_that_exclude_its_fused_form_are_refused(folder, option):
    """torch raises RuntimeError, which only ended the program when the network was built."""
    with pytest.raises(ConfigError, match=f"AdamW refuses its arguments.*{option}") as caught:
        load_pipeline("tiny", overrides=[f"optimizer.AdamW.{option}=true"])
    assert caught.value.code == "E116"


def test_a_file_of_weights_that_cannot_be_used_is_named_with_its_field(folder):
    """Only the pipeline's own place was told, and not which file was looked for."""
    network = "network={{ResUNet: {{channels: [4, 4, 6, 8], blocks: [1, 1, 1, 1], weights: {}}}}}"
    (folder / "broken.pt").write_bytes(b"no weights at all")
    for name, message in (("none.pt", "no such file of weights"), ("broken.pt", "the file of weights cannot be read")):
        with pytest.raises(ConfigError, match=message) as caught:
            load_pipeline("tiny", overrides=[network.format(name)])
        found = (caught.value.code, caught.value.field, caught.value.file)
        assert found == ("E116", "network.ResUNet.weights", name)


def test_a_score_of_one_structure_names_a_label(folder):
    pipeline = load_pipeline("tiny", overrides=["metrics=[{Dice: {region: thing}}]"])
    assert pipeline.metrics[0].arguments == {"region": "thing"}
    for metric, field in (("{Dice: {region: think}}", "region"), ("{ShareError: {part: x, whole: thing}}", "part")):
        with pytest.raises(ConfigError) as caught:
            load_pipeline("tiny", overrides=[f"metrics=[Dice, {metric}]"])
        assert (caught.value.code, caught.value.expected) == ("E118", "thing")
        assert caught.value.field.endswith(field)
    with pytest.raises(ConfigError, match="no argument `region`"):  # of objects, not of a structure
        load_pipeline("tiny", overrides=["metrics=[Dice, {PQ: {region: thing}}]"])


def test_a_transform_that_is_not_random_is_refused_in_augment(folder):
    """It would be done in training and not in prediction: a network that sees other images than it has learnt."""
    with pytest.raises(ConfigError, match="draws no random numbers") as caught:
        load_pipeline("tiny", overrides=["augment=[RandFlipd, ScaleIntensityd]"])
    assert (caught.value.code, caught.value.fix) == ("E118", "move it to `preprocess`")
    load_pipeline("tiny", overrides=["augment=[RandFlipd, BoundaryWeightMapd]"])  # of the label, which prediction lacks


def test_a_loss_with_weights_of_other_classes_than_the_data_sets_is_refused(folder):
    """It was told by the first iteration, after every case had been prepared."""
    weights = "loss={DistanceWeightedCELoss: {class_weights: [1, 2, 3]}}"
    with pytest.raises(ConfigError, match="one weight for each class") as caught:
        load_pipeline("tiny", overrides=[weights])
    assert (caught.value.code, caught.value.field) == ("E118", "loss.DistanceWeightedCELoss.class_weights")
    assert load_pipeline("tiny", overrides=[weights.replace(", 3", "")]).loss.arguments == {"class_weights": [1, 2]}
    with pytest.raises(ConfigError, match="preprocess"):  # what cannot be read is told beside it
        load_pipeline("tiny", overrides=[weights, "preprocess=5"])
    # interior and border are two classes of one label
    border = [weights, "preprocess=[InteriorBorderLabeld]"]
    load_pipeline("tiny", overrides=[*border, "postprocess=[InstancesFromProbability]"])


def test_interior_and_border_without_what_brings_them_together_are_refused(folder):
    """The mask would hold 1 and 2, which scores of objects take for the numbers of two objects."""
    with pytest.raises(ConfigError, match="as two objects") as caught:
        load_pipeline("tiny", overrides=["preprocess=[InteriorBorderLabeld]", "postprocess=[FillHoles]"])
    assert (caught.value.code, caught.value.field, caught.value.found) == ("E118", "postprocess", "FillHoles")


def test_a_file_is_parsed_once_for_all_that_is_read_from_it(tmp_path, monkeypatch):
    parsed = []
    plain = config_yaml.parse_yaml
    monkeypatch.setattr(
        config_yaml, "parse_yaml", lambda text, source: parsed.append(source) or plain(text, source=source)
    )
    file = tmp_path / "datasets.yaml"
    text = config.to_yaml(config.load_dataset("shapes"))
    file.write_text(text)
    for _ in range(3):
        assert config.dataset_names(file=file) == ["shapes"]
        config.load_dataset("shapes", file=file)
    assert parsed.count(str(file)) == 1
    read_yaml(file).value["shapes"]["title"] = "changed by who read it"
    assert read_yaml(file).value["shapes"]["title"] != "changed by who read it"
    file.write_text(text.replace("shapes:", "others:", 1))  # as long as before, at the same moment
    assert config.dataset_names(file=file) == ["others"]
