"""score_case, METRICS and the protocols: names, units, honesty, regions, fields of view, pooled scores."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from medseg.component import Component
from medseg.errors import GeometryError, LabelError, UsageError
from medseg.evaluation_pairs import Reading
from medseg.evaluation_probabilities import calibration_counts
from medseg.metrics import (
    METRICS,
    PROTOCOLS,
    get_protocol,
    measure_case,
    parse_metrics,
    pool_scores,
    score_case,
)

LABELS = {0: "background", 1: "liver", 2: "tumour"}
SHARE = {"part": "tumour", "whole": "liver"}
EVERYTHING = [{name: SHARE} if name.startswith("Share") else name for name in METRICS]


def case(seed=0, shape=(20, 24, 16)):
    """A reference with both labels, a prediction that is roughly right, and probabilities that agree with it."""
    rng = np.random.default_rng(seed)
    field = gaussian_filter(rng.standard_normal(shape), 2)
    reference = (field > 0.0).astype(np.uint8) + (field > 0.08)
    noisy = field + 0.03 * gaussian_filter(rng.standard_normal(shape), 1)
    prediction = (noisy > 0.0).astype(np.uint8) + (noisy > 0.08)
    probabilities = np.stack([prediction == k for k in range(3)]) * 0.7 + 0.1
    return prediction, reference.astype(np.uint8), probabilities.astype(np.float32)


def value_of(scores, metric, label="liver"):
    (found,) = [s.value for s in scores if s.metric == metric and s.label == label]
    return found


def test_catalogue_is_complete_and_documented():
    expected = {
        *(
            "Dice",
            "IoU",
            "Sensitivity",
            "Specificity",
            "Precision",
            "HD",
            "HD95",
            "ASSD",
            "MASD",
            "RMSD",
            "SurfaceDice",
        ),
        *(
            "VolumeError",
            "AbsoluteVolumeError",
            "VOE",
            "RVD",
            "MCC",
            "clDice",
            "AUC",
            "Accuracy",
            "AP50",
            "AP75",
            "mAP",
        ),
        *("PQ", "AJI", "CountError", "SEG", "V_rand", "V_info", "LesionPrecision", "LesionRecall", "LesionF1"),
        "PooledDice",
    }
    assert expected <= set(METRICS)
    for name, metric in METRICS.items():
        assert metric.name == name
        assert metric.better in ("higher", "lower", "none")
        assert metric.level in ("label", "case", "pooled")
        assert metric.needs in ("label", "instances", "probabilities")
        assert len(metric.definition) > 10
        assert not metric.definition.endswith(".")
        assert "doi:" in metric.source
        assert metric.bounds[0] < metric.bounds[1]


def test_every_score_is_documented():
    text = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text(encoding="utf-8")
    for name, metric in METRICS.items():
        assert f"| `{name}` |" in text, name
        assert metric.definition.replace("|", "\\|") in text, name
    for name, protocol in PROTOCOLS.items():
        assert f"### `{name}`" in text, name
        assert protocol.notes in text, name


@pytest.mark.parametrize("kind", ["scored", "missed", "false_alarm", "both_empty"])
@pytest.mark.parametrize("dims", [2, 3])
def test_nothing_is_ever_nan(kind, dims):
    prediction, reference, probabilities = (a[..., 8] if dims == 2 else a for a in case())
    empty = np.zeros_like(reference)
    a = empty if kind in ("missed", "both_empty") else prediction
    b = empty if kind in ("false_alarm", "both_empty") else reference
    result = measure_case(
        a, b, labels=LABELS, metrics=EVERYTHING, spacing=(0.7,) * dims, probabilities=probabilities, case="x"
    )
    pooled = pool_scores([result], EVERYTHING, dims=dims)
    for score in (*result.scores, *pooled):
        metric = METRICS[score.metric.split("@")[0].split("(")[0].strip()]
        assert math.isfinite(score.value), score
        assert metric.bounds[0] <= score.value <= metric.bounds[1], score
        if score in result.scores:
            assert score.status == kind, score
    # label scores for two labels, case scores once, pooled scores not among the cases
    assert len(result.scores) == sum({"label": 2, "case": 1, "pooled": 0}[METRICS[n].level] for n in METRICS)
    assert {s.case for s in pooled} == {"all cases"}
    pickle.loads(pickle.dumps(result))


def test_a_missed_structure_makes_every_mean_worse():
    """Five perfect cases plus five missed ones: worse than the perfect ones, for every score that has a direction."""
    _, reference, _ = case()
    probabilities = np.stack([reference == k for k in range(3)]).astype(np.float32)
    blank = np.zeros_like(probabilities)
    blank[0] = 1
    options = {"labels": LABELS, "metrics": EVERYTHING, "spacing": (1, 1, 2)}
    perfect = [measure_case(reference, reference, probabilities=probabilities, **options) for _ in range(5)]
    missed = [measure_case(reference * 0, reference, probabilities=blank, **options) for _ in range(5)]
    assert all(s.status == "missed" for result in missed for s in result.scores)

    def means(results):
        values = {}
        for result in results:
            for s in result.scores:
                values.setdefault((s.label, s.metric, s.better), []).append(s.value)
        for s in pool_scores(results, EVERYTHING):
            values[s.label, s.metric, s.better] = [s.value]
        return {key: np.mean(column) for key, column in values.items()}

    with_missed, without = means(perfect + missed), means(perfect)
    for (label, metric, better), mean in with_missed.items():
        before = without[label, metric, better]
        if metric in ("PooledSpecificity", "PooledPrecision", "PooledLesionPrecision"):
            assert mean == before == 1.0  # by definition: nothing was called the structure that is not
        elif metric.startswith("DetectedLesion"):
            assert mean == before  # by definition: of the detected ones only; the recall beside it tells
        elif better == "higher":
            assert mean < before, (label, metric)
        elif better == "lower":
            assert mean > before, (label, metric)


def test_what_missed_cases_may_improve_says_so():
    """With faulty cases pooled specificity and accuracy rise by definition where a small structure is missed."""
    reference = np.zeros((40, 40), np.uint8)
    reference[10:14, 10:14] = 1
    faulty = np.roll(reference, 2, axis=0) | (np.arange(40) > 20)
    names = [name for name, metric in METRICS.items() if metric.level == "pooled" and metric.over == "label"]
    names = [name for name in names if METRICS[name].better != "none" and METRICS[name].needs == "label"]
    options = {"labels": {0: "background", 1: "cell"}, "metrics": names}
    faulty_case = measure_case(faulty, reference, **options)
    missed_case = measure_case(reference * 0, reference, **options)
    without = {s.metric: s.value for s in pool_scores([faulty_case], names)}
    rising = []
    for s in pool_scores([faulty_case, missed_case], names):
        gain = (s.value - without[s.metric]) * (1 if s.better == "higher" else -1)
        assert gain < 0 or "says nothing of" in s.definition, s.metric
        rising += [s.metric] * (gain > 0)
    assert rising == ["PooledSpecificity", "PooledAccuracy"]


def test_pixel_accuracy_is_that_of_the_paper_on_fully_convolutional_networks():
    """sum_i n_ii / sum_i t_i, n_ij pixels of class i called j, over all pictures; void and outside left out."""
    random = np.random.default_rng(3)
    cases, table = [], np.zeros((4, 4), int)
    for shape in ((12, 20), (7, 9)):
        reference, prediction = random.integers(0, 4, shape), random.integers(0, 4, shape)
        void, inside = random.random(shape) < 0.2, random.random(shape) < 0.7
        for i, j in zip(reference[inside & ~void], prediction[inside & ~void], strict=True):
            table[i, j] += 1
        marked = np.where(void, 255, reference)
        options = {"labels": {1: "a", 2: "b", 3: "c"}, "fov": inside, "ignore": 255}
        cases.append(measure_case(prediction, marked, metrics=["PixelAccuracy"], **options))
    (score,) = pool_scores(cases, ["PixelAccuracy"])
    assert (score.case, score.label, score.value) == ("all cases", "all", pytest.approx(np.trace(table) / table.sum()))
    nothing = measure_case(prediction, np.full(shape, 255), metrics=["PixelAccuracy"], **options)
    assert pool_scores([nothing], ["PixelAccuracy"])[0].value == 1.0


def test_specificity_of_a_missed_structure_is_no_reward():
    reference = np.zeros((10, 10), np.uint8)
    reference[0, 0] = 1
    options = {"labels": {1: "x"}, "metrics": ["Specificity", "Accuracy"]}
    for score in score_case(reference * 0, reference, **options):
        assert score.value == 0.0
    assert value_of(score_case(1 - reference, reference, **options), "Specificity", "x") == 0.0
    assert value_of(score_case(reference, reference, **options), "Specificity", "x") == 1.0


def test_volumes_are_in_millilitres():
    reference = np.zeros((20, 20, 20), np.uint8)
    reference[:10, :10, :10] = 1  # 1000 voxels of 1 x 1 x 2 mm = 2 mL
    prediction = np.zeros_like(reference)
    prediction[:5, :10, :10] = 1
    options = {
        "labels": {1: "x"},
        "metrics": ["VolumeError", "AbsoluteVolumeError", "RVD", "VOE"],
        "spacing": (1, 1, 2),
    }
    values = {s.metric: (s.value, s.unit) for s in score_case(prediction, reference, **options)}
    assert values["VolumeError"] == (pytest.approx(-1.0), "mL")
    assert values["AbsoluteVolumeError"] == (pytest.approx(1.0), "mL")
    assert values["RVD"] == (pytest.approx(-0.5), "1")
    assert values["VOE"] == (pytest.approx(0.5), "1")
    flat = score_case(prediction[..., 0], reference[..., 0], labels={1: "x"}, metrics=["VolumeError", "HD"], unit="px")
    assert [(s.value, s.unit) for s in flat] == [(-50.0, "px"), (5.0, "px")]


def test_names_show_the_arguments():
    prediction, reference, _ = case()
    metrics = [
        "HD95",
        {"HD95": {"definition": "pooled"}},
        {"SurfaceDice": {"tolerance": 2}},
        ("LesionF1", {"iou": 0.5}),
    ]
    scores = score_case(prediction, reference, labels=LABELS, metrics=metrics)
    assert [s.metric for s in scores[:4]] == ["HD95", "HD95 (pooled)", "SurfaceDice@2mm", "LesionF1@0.5"]


def test_a_structure_that_two_entries_ask_for_has_one_line():
    reference = np.zeros((6, 6), np.uint8)
    reference[1:3, 1:3], reference[4, 4] = 1, 2
    for name in ("Dice", "PooledDice"):
        metrics = [{name: {"region": "tumour"}}, name]
        result = measure_case(reference, reference, labels=LABELS, metrics=metrics)
        found = [*result.scores, *pool_scores([result], metrics)]
        assert sorted(score.label for score in found) == sorted(set(LABELS.values()) - {"background"})


def test_scores_of_detected_lesions_at_two_overlaps_have_two_names():
    """Lesions at IoU 1 and 1/3: the mean Dice of those above 0.5 is 1, of those above 0.2 it is (1 + 1/2) / 2."""
    reference = np.array([[1, 1, 0, 1, 1, 0]], np.uint8)
    prediction = np.array([[1, 1, 0, 0, 1, 1]], np.uint8)
    metrics = [{"DetectedLesionDice": {"iou": 0.2}}, {"DetectedLesionDice": {"iou": 0.5}}]
    result = measure_case(prediction, reference, labels={0: "background", 1: "spot"}, metrics=metrics)
    found = {score.metric: score.value for score in pool_scores([result], metrics)}
    assert found == {"DetectedLesionDice@0.2": 0.75, "DetectedLesionDice": 1.0}


def test_regions_are_unions_of_labels():
    prediction, reference, _ = case()
    regions = {"liver": (1, 2), "tumour": (2,)}
    scores = score_case(
        prediction, reference, labels=LABELS, regions=regions,
        metrics=["Dice", {"LesionRecall": {"region": "tumour"}}, {"ShareError": SHARE}],
    )  # fmt: skip
    union = score_case(prediction > 0, reference > 0, labels={1: "liver"}, metrics=["Dice"])
    assert value_of(scores, "Dice") == value_of(union, "Dice")
    assert [s.label for s in scores if s.metric == "LesionRecall"] == ["tumour"]
    burden = [(a == 2).sum() / (a > 0).sum() for a in (prediction, reference)]
    assert value_of(scores, "ShareError(tumour/liver)", "all") == pytest.approx(abs(burden[0] - burden[1]))


def test_field_of_view_and_void_are_left_out():
    prediction, reference, probabilities = case()
    fov = np.zeros(reference.shape, np.uint8)
    fov[:, 4:20] = 1
    box = np.s_[:, 4:20]
    metrics = ["Dice", "Specificity", "HD95", "AUC", "clDice", "AP50"]
    inside = score_case(prediction, reference, labels=LABELS, metrics=metrics, fov=fov, probabilities=probabilities)
    alone = score_case(
        prediction[box], reference[box], labels=LABELS, metrics=metrics, probabilities=probabilities[:, :, 4:20]
    )
    assert [s.value for s in inside] == pytest.approx([s.value for s in alone])
    void = reference.copy()
    void[:, :4] = void[:, 20:] = 255
    ignored = score_case(prediction, void, labels=LABELS, metrics=metrics, ignore=255, probabilities=probabilities)
    assert [s.value for s in ignored] == pytest.approx([s.value for s in inside])


def test_pooled_dice_is_that_of_all_voxels():
    cases = [case(seed) for seed in range(3)]
    results = [
        measure_case(p, r, labels=LABELS, metrics=["PooledDice", "PooledAUC"], probabilities=q) for p, r, q in cases
    ]
    p, r, q = (np.concatenate(arrays, axis=-1) for arrays in zip(*cases, strict=True))
    together = score_case(p, r, labels=LABELS, metrics=["Dice", "AUC"], probabilities=q)
    pooled = pool_scores(results, ["PooledDice", "PooledAUC"])
    for label in ("liver", "tumour"):
        assert value_of(pooled, "PooledDice", label) == pytest.approx(value_of(together, "Dice", label))
        assert value_of(pooled, "PooledAUC", label) == pytest.approx(value_of(together, "AUC", label))


def test_dice_of_patients_puts_their_slices_together():
    """Patient a: slices 2*2/(4+4) and 0/(0+4) together 4/12; patient b: 2*3/(3+5); a case of no known patient: 1."""
    reference = np.zeros((4, 4), np.uint8)
    reference[0] = 1
    half, empty, other, five = (np.zeros_like(reference) for _ in range(4))
    half[0, :2] = half[3, :2] = 1
    other[0, :3] = 1
    five[0] = five[1, 0] = 1
    given = [(half, reference, "1", "a"), (empty, reference, "2", "a"), (other, five, "3", "b"), (five, five, "", "")]
    results = [
        measure_case(p, r, labels={0: "background", 1: "liver"}, metrics=["PatientDice"], case=case, patient=patient)
        for p, r, case, patient in given
    ]
    assert value_of(pool_scores(results, ["PatientDice"]), "PatientDice", "liver") == pytest.approx(
        (4 / 12 + 6 / 8 + 1) / 3
    )
    own = [
        measure_case(p, r, labels={0: "background", 1: "liver"}, metrics=["PatientDice"], case=c)
        for p, r, c, _ in given
    ]
    assert value_of(pool_scores(own, ["PatientDice"]), "PatientDice", "liver") == pytest.approx(
        (1 / 2 + 0 + 6 / 8 + 1) / 4
    )


def test_lesions_by_hand():
    """Real lesions of 8, 4 and 2 voxels; the first found at IoU 6/8, the second at 3/6, the third missed, one false."""
    reference = np.array([[1, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 0, 0, 1, 1, 0, 0, 0]], np.uint8)
    prediction = np.array([[0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 1, 1]], np.uint8)
    # the second prediction reaches the third lesion's neighbour voxel but does not overlap it
    names = ("LesionPrecision", "LesionRecall", "LesionF1")
    metrics = [*names, *({n: {"iou": 0.5}} for n in names), "DetectedLesionDice", {"PooledLesionRecall": {"iou": 0.5}}]
    result = measure_case(prediction, reference, labels={1: "lesion"}, metrics=metrics)
    assert [s.value for s in result.scores] == pytest.approx([2 / 3] * 3 + [1 / 3] * 3)
    pooled = pool_scores([result, result], metrics)
    assert value_of(pooled, "PooledLesionRecall@0.5", "lesion") == pytest.approx(1 / 3)
    assert value_of(pooled, "DetectedLesionDice", "lesion") == pytest.approx(2 * 6 / 14)


def test_the_volume_difference_of_detected_lesions_is_worst_when_none_was_detected():
    """A case where all lesions were missed (-1) and one without any (0), which is no reason for a perfect score."""
    lesion = np.zeros((16, 16), np.uint8)
    lesion[3:9, 3:9] = 1
    metrics = ["DetectedLesionRVD", "DetectedLesionVOE", "DetectedLesionDice"]
    missed, empty = (measure_case(lesion * 0, r, labels={1: "lesion"}, metrics=metrics) for r in (lesion, lesion * 0))
    assert [s.value for s in pool_scores([missed, empty], metrics)] == [-1.0, 1.0, 0.0]
    assert [s.value for s in pool_scores([empty, empty], metrics)] == [0.0, 0.0, 1.0]


def test_lits_merges_lesions_that_overlaps_connect():
    """A prediction of 9 voxels over two lesions of 4: IoU 8/9 together, 4/9 each. Pieces of 3 and 2 voxels in one
    of 6: 5/6 together, 3/6 and 2/6 each. A lesion of 4 found by 1 voxel: 1/4. A false lesion alone."""
    reference = np.array([[1] * 4 + [0] + [1] * 4 + [0, 0] + [1] * 6 + [0, 0] + [1] * 4 + [0, 0, 0]], np.uint8)
    prediction = np.array([[1] * 9 + [0, 0] + [1, 1, 1, 0, 1, 1] + [0, 0] + [1, 0, 0, 0] + [0, 1, 1]], np.uint8)
    names = ("Precision", "Recall", "F1")
    metrics = [
        *({f"Lesion{n}": {"iou": 0.5, "merge": merge}} for merge in (True, False) for n in names),
        *({f"PooledLesion{n}": {"merge": True}} for n in names),
        {"DetectedLesionDice": {"merge": True}}, {"DetectedLesionHD": {"merge": True}},
    ]  # fmt: skip
    result = measure_case(prediction, reference, labels={1: "lesion"}, metrics=metrics, unit="px")
    # merged: 3 real lesions, 4 predicted ones, 2 detected; as they are: 4 real ones, none above one half
    merged = [2 / 4, 2 / 3, 2 * 2 / 7]
    assert [s.value for s in result.scores] == pytest.approx([*merged, 0, 0, 0])
    assert result.scores[0].metric == "LesionPrecision@0.5 (merged)"
    pooled = {s.metric: s.value for s in pool_scores([result], metrics, unit="px", dims=2)}
    assert pooled["PooledLesionF1 (merged)"] == pytest.approx(2 * 3 / 7)  # any overlap is enough: all three
    assert pooled["DetectedLesionDice (merged)"] == pytest.approx((2 * 8 / 17 + 2 * 5 / 11) / 2)
    assert pooled["DetectedLesionHD (merged)"] == pytest.approx((1 + 1) / 2)
    assert {"iou": 0.5, "region": "tumour", "merge": True} in [
        dict(arguments)
        for metric, arguments in parse_metrics(get_protocol("lits").metrics)
        if metric.name == "LesionF1"
    ]


def test_pooled_seg_weighs_objects_not_frames():
    one, three = np.array([[1, 1, 0, 0, 0, 0]]), np.array([[1, 0, 1, 0, 1, 0]])
    options = {"labels": {1: "cell"}, "metrics": ["SEG", "PooledSEG"]}
    frames = [measure_case(one, one, **options), measure_case(three * 0, three, **options)]
    assert [value_of(f.scores, "SEG", "all") for f in frames] == [1.0, 0.0]
    assert value_of(pool_scores(frames, ["PooledSEG"]), "PooledSEG", "all") == pytest.approx(1 / 4)


def test_given_instances_are_used():
    reference = np.array([[1, 1, 2, 2]])  # touching: components would merge them
    options = {"labels": {1: "cell"}, "metrics": ["AP50", "CountError"]}
    mask = (reference > 0).astype(np.uint8)
    merged = score_case(mask, mask, instances=(None, reference), **options)
    assert [s.value for s in merged] == [0.0, 1.0]
    right = score_case(mask, mask, instances=(reference, reference), **options)
    assert [s.value for s in right] == [1.0, 0.0]


@pytest.mark.parametrize("name", sorted(PROTOCOLS))
def test_protocols_run(name):
    protocol = PROTOCOLS[name]
    prediction, reference, probabilities = (a[..., 8] for a in case())
    labels = LABELS if name == "lits" else {0: "background", 1: "structure"}
    if name != "lits":
        prediction, reference = (prediction > 0).astype(np.uint8), (reference > 0).astype(np.uint8)
        probabilities = np.stack([probabilities[0], 1 - probabilities[0]])
    options = {"labels": labels, "metrics": protocol.metrics, "regions": protocol.regions}
    result = measure_case(prediction, reference, probabilities=probabilities, **options)
    assert result.scores
    assert not result.skipped
    human = measure_case(prediction, reference, skip=True, **options)  # masks only, as of a second observer
    assert set(human.skipped) == set(protocol.optional)
    by_metric = {(s.label, s.metric): s.value for s in result.scores}
    for score in human.scores:
        if not score.metric.startswith("V_"):  # V_rand and V_info choose a threshold where there are probabilities
            assert score.value == by_metric[score.label, score.metric]
    pool_scores([result, result], protocol.metrics)


def test_lits_without_tumours_in_the_labels():
    _, reference, _ = case()
    protocol = PROTOCOLS["lits"]
    reference = (reference > 0).astype(np.uint8)
    options = {"labels": {0: "background", 1: "liver"}, "metrics": protocol.metrics, "regions": protocol.regions}
    assert {s.label for s in measure_case(reference, reference, **options).scores} == {"liver"}


def test_protocol_arguments():
    assert {"SurfaceDice": {"tolerance": 7}} in get_protocol("msd", tolerance=7).metrics
    assert get_protocol("msd").metrics == get_protocol("msd", tolerance=[1, 2]).metrics
    assert get_protocol({"msd": {"tolerance": 7}}) == get_protocol("msd", tolerance=7)
    for wrong in ("kits", {"lits": {"tolerance": 1}}, {"msd": {"tolerance": -1}}, {"msd": 7}, {"msd": None}, ["msd"]):
        with pytest.raises(UsageError):
            get_protocol(wrong)


def test_bad_requests_are_refused():
    with pytest.raises(UsageError, match="Dise") as error:
        parse_metrics(["Dise"])
    assert "Dice" in str(error.value)
    for wrong in (
        [], [{"Dice": {"tolerance": 1}}], [{"SurfaceDice": {"tolerance": -1}}], [{"SurfaceDice": {"tolerance": "2"}}],
        [{"HD95": {"definition": "mean"}}], [{"LesionF1": {"iou": 1}}], ["ShareError"], [3],
        [{"AP50": {"region": "x"}}],
    ):  # fmt: skip
        with pytest.raises(UsageError):
            parse_metrics(wrong)
    prediction, reference, probabilities = case()
    with pytest.raises(GeometryError):
        score_case(prediction[1:], reference, labels=LABELS)
    with pytest.raises(LabelError, match="no labels") as error:
        score_case(prediction, reference, labels={0: "background", 1: "liver"}, case="liver_7")
    assert error.value.case == "liver_7"
    assert f"2 ({(prediction == 2).sum()} voxels)" in str(error.value)
    with pytest.raises(UsageError, match="probabilities"):
        score_case(prediction, reference, labels=LABELS, metrics=["AUC"])
    with pytest.raises(UsageError):
        score_case(prediction, reference, labels=LABELS, probabilities=probabilities[:, 1:])
    with pytest.raises(UsageError):
        score_case(prediction, reference, labels=LABELS, metrics=[{"Dice": {"region": "spleen"}}])
    with pytest.raises(UsageError):
        score_case(prediction, reference, labels=LABELS, spacing=(1, 1))


def test_scores_of_membranes_can_be_taken_of_the_written_mask():
    """With `mask: true` probabilities change nothing: the value is that of the labels alone."""
    reference = np.ones((20, 20), np.uint8)
    reference[:, 9:11] = 0
    joined = np.ones_like(reference)  # the mask has no membrane; the probabilities have one at every threshold
    shares = np.stack([reference == 0, reference != 0]).astype(np.float32)
    names = [("V_rand", {"mask": True}), ("V_rand", {}), ("PooledV_rand", {"mask": True}), ("PooledV_rand", {})]
    options = {"labels": {0: "membrane", 1: "cell"}, "metrics": [Component(n, a) for n, a in names]}
    both = measure_case(joined, reference, probabilities=shares, case="a", **options)
    alone = measure_case(joined, reference, case="b", **options)
    found = {score.metric: score.value for score in both.scores}
    # one segment over two equal cells: (1/4 + 1/4) / (1/2 + 1/4)
    assert found == {"V_rand (mask)": pytest.approx(2 / 3), "V_rand": 1.0}
    assert [score.value for score in alone.scores] == [pytest.approx(2 / 3)] * 2
    pooled = pool_scores([both], options["metrics"], dims=2)
    assert [(s.metric, s.value) for s in pooled] == [
        ("PooledV_rand (mask)", pytest.approx(2 / 3)), ("PooledV_rand", 1.0),
    ]  # fmt: skip


def test_interior_and_border_are_one_structure_in_its_probability():
    # a network with three classes for one label: the structure's probability is that of not being background
    reference, interior = np.zeros((20, 20), np.uint8), np.zeros((20, 20), bool)
    reference[4:16, 4:16], interior[6:14, 6:14] = 1, True
    inside = np.where(reference, 0.98, 0.1)
    shares = np.stack([1 - inside, np.where(interior, 0.9, 0.04), inside - np.where(interior, 0.9, 0.04)])
    labels = {0: "background", 1: "cell"}
    scores = score_case(reference, reference, labels=labels, metrics=["AUC"], probabilities=shares)
    assert [score.value for score in scores] == [1.0]
    counts = calibration_counts(shares, reference, Reading({1: "cell"}), None)[1]
    assert counts[:, 9].tolist() == pytest.approx([144, 0.98 * 144, 144])
