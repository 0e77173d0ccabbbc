"""The report is one file that opens offline in a real browser, escapes every name, sorts, slides, draws the truth."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from browser import Browser, find_browser
from PIL import Image

from medseg.errors import DataError, FormatError, UsageError
from medseg.metrics import METRICS
from medseg.report import write_report
from medseg.report_facts import read_log, run_facts, training_curves
from medseg.report_figures import agreement_plot, curve_plot, reliability_plot, strip_plot
from medseg.report_pictures import ERROR_COLOURS, draw_planes, match_objects
from medseg.report_scores import score_sections
from medseg.report_svg import Axis, nice_ticks
from medseg.report_words import plain_words
from medseg.tables import SCHEMA, ScoreRow, write_cases, write_summary
from medseg.views import make_view, read_views, remove_views, write_view

EVIL = "<script>document.title='hacked'</script>"
NAMES = ["case_1", EVIL, 'ünï \'"q"\n{{ 7*7 }} %d', "=cmd()", "日本 語", "case_2"]
LABEL = "liver & <b>bold</b>"

needs_browser = pytest.mark.skipif(find_browser() is None, reason="no chromium here")


def rows() -> list[ScoreRow]:
    result = []
    for number, case in enumerate(NAMES):
        status = "missed" if number == 4 else "scored"
        dice = 0.0 if status == "missed" else 0.5 + 0.08 * number
        for metric, value, unit in (
            ("Dice", dice, ""), ("HD95", 300.0 if status == "missed" else 9.0 - number, "mm"),
            ("Volume", 100.0 + number, "mL"), ("VolumeError", 10.0 - number, "mL"),
        ):  # fmt: skip
            result.append(ScoreRow(case, LABEL, metric, value, unit, status, f"definition of {metric}"))
    return result


def entry(metric: str, unit: str, better: str) -> dict:
    return {
        "label": LABEL, "metric": metric, "unit": unit, "better": better, "definition": "x", "level": "case", "n": 6,
        "patients": 6, "mean": 0.51, "sd": 0.2, "median": 0.55, "q1": 0.4, "q3": 0.7, "low": 0.3, "high": 0.7,
        "scored": 5, "missed": 1, "false_alarm": 0, "both_empty": 0,
    }  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "r <1>"
    scores = folder / "validation"
    scores.mkdir(parents=True)
    write_cases(scores / "cases.csv", rows())
    summary = {
        "schema": SCHEMA, "dataset": "phantom", "created": "2026-11-21T10:00:00", "labels": {"1": LABEL, "2": "tumour"},
        "scores": [entry("Dice", "", "higher"), entry("HD95", "mm", "lower"), entry("Volume", "mL", "none"),
                   entry("VolumeError", "mL", "none")],
        "cases": {"missing": ["日本 語"], "extra": ["stray <i>"], "resampled": []},
        "volumes": [
            {"case": case, "label": LABEL, "prediction": 100.0 + n, "reference": 90.0 + 2 * n, "unit": "mL"}
            for n, case in enumerate(NAMES)
        ],
        "calibration": [{"label": LABEL, "error": 0.02, "bins": [{"probability": 0.1, "frequency": 0.2, "count": 5}]}],
    }  # fmt: skip
    write_summary(scores / "summary.json", summary)
    reference = np.zeros((30, 24, 12), np.uint8)
    reference[8:20, 6:18, 3:9] = 1
    prediction = np.roll(reference, 2, axis=0)
    image = np.random.default_rng(0).normal(size=reference.shape) + reference
    for number, (case, role) in enumerate(((NAMES[0], "best"), (EVIL, "worst"))):
        view = make_view(
            case, prediction=prediction, reference=reference, image=image, affine=np.diag([-1.0, -1, 3, 1]), role=role,
            score=0.5, metric="Dice", maps={"gate 1": reference * 0.5} if number else None,
        )  # fmt: skip
        write_view(scores / "views", view, number)
    (folder / "pipeline.yaml").write_text("# A phantom.\ndataset: phantom # </pre><script>\n")
    (folder / "split.json").write_text(
        json.dumps({"seed": 0, "folds": 5, "fold": 1, "training": ["a"], "validation": NAMES})
    )
    (folder / "provenance.json").write_text(
        json.dumps({"command": "medseg train x", "device": "cpu", "versions": {"torch": "2.13"}})
    )
    (folder / "status.json").write_text(json.dumps({"state": "done"}))
    (folder / "log.csv").write_text(
        "epoch,loss,val Dice,lr\n" + "".join(f"{e},{1 / (e + 1)},{e / 10},0.001\n" for e in range(9))
    )
    return folder


@pytest.fixture(scope="module")
def page(run):
    return write_report(run)


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_the_page_is_one_file_without_addresses_and_with_every_name_escaped(page):
    text = page.read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(text)
    assert EVIL not in text
    assert "{{ 7*7 }}" in reader.text
    assert sum(tag == "script" for tag, _ in reader.tags) == 1
    assert not [
        tag for tag, _ in reader.tags if tag in ("iframe", "object", "embed", "form", "base", "b") and tag != "b"
    ]
    for tag, attributes in reader.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
        for name in ("src", "href", "action", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes)
    assert not re.search(r"https?://", text)
    assert "@import" not in text
    assert "url(" not in text


def test_the_policy_names_the_hash_of_the_only_script_and_style(page):
    text = page.read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)[1]
    assert "default-src &#39;none&#39;" in policy or "default-src 'none'" in policy
    for tag in ("script", "style"):
        body = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[1]
        assert base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() in policy
    assert "unsafe" not in policy


def test_what_the_page_says(page):
    reader = Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    for said in (
        "A phantom.", "medseg train x", "fold 1: 1 cases trained on, 6 held out", "torch 2.13",
        "1 case without a prediction, counted as missed", "stray <i>", "0.510", "0.300 – 0.700",
        "twice the shared part", "definition of HD95", "not a medical device", "Do the volumes agree?",
        "attention: gate 1", "slice 7 of 12", "Expected calibration error 0.020",
    ):  # fmt: skip
        assert said in reader.text, said


def test_a_missed_case_is_counted_once_where_objects_are_scored_too():
    lines = (("nucleus", "Dice"), ("all", "AP50"))
    scored = [ScoreRow("a", label, metric, 0.0, "", "missed", "x") for label, metric in lines]
    cards = {card["name"]: card["value"] for card in score_sections(scored, {"scores": []})["cards"]}
    assert cards["structures missed"] == 1
    alone = {card["name"]: card["value"] for card in score_sections(scored[1:], {"scores": []})["cards"]}
    assert alone["structures missed"] == 1


@needs_browser
def test_a_real_browser_loads_sorts_and_slides_without_network_or_errors(page, tmp_path):
    with Browser() as browser:
        browser.open(page)
        assert browser.run("document.title") == "A phantom."
        assert browser.errors == []
        assert browser.requests == [page.resolve().as_uri()]
        head = "document.querySelectorAll('#table th button')"
        column = "[...document.querySelectorAll('#table tbody tr')].map(r => r.cells[3].textContent)"
        name = "[...document.querySelectorAll('#table th')][3].textContent"
        assert browser.run(name) == "Dice"
        before = browser.run(column)
        browser.run(f"{head}[3].click()")
        assert browser.run(column) == sorted(before, key=float)
        browser.run(f"{head}[3].click()")
        assert browser.run(column) == sorted(before, key=float, reverse=True)
        browser.run(f"{head}[0].click()")
        assert browser.run("document.querySelector('#table tbody tr').cells[0].textContent") != ""
        slider = "document.querySelector('input[type=range]')"
        place = "document.querySelector('.plane g.strip').getAttribute('transform')"
        start = browser.run(place)
        browser.run(f"{slider}.value = 0; {slider}.dispatchEvent(new Event('input')); 0")
        assert browser.run(place) != start
        assert browser.run(place) == "translate(0 0)"
        assert browser.run("document.querySelector('.plane output').textContent") == "slice 4 of 12"
        loaded = (
            "Promise.all([...document.querySelectorAll('image')].map(i => new Promise(r => { const p = new Image();"
            " p.onload = () => r(p.naturalWidth > 0); p.onerror = () => r(false); p.src = i.getAttribute('href'); })))"
        )
        assert set(browser.run(loaded)) == {True}
        assert browser.errors == []
        browser.resize(390, 844)
        browser.open(page)
        assert browser.run("document.documentElement.scrollWidth") <= 390
        browser.pdf(tmp_path / "print.pdf")
        assert (tmp_path / "print.pdf").read_bytes().startswith(b"%PDF")


def test_a_run_without_scores_and_scores_without_a_run(run, tmp_path):
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "log.csv").write_text("epoch,loss\n0,1.0\n1,nan\n")
    assert "no scores yet" in write_report(tmp_path / "young").read_text()
    write_cases(tmp_path / "cases.csv", [row for row in rows() if row.metric == "Dice"])
    assert "There is no summary.json" in write_report(tmp_path, tmp_path / "page.html").read_text()
    assert write_report(run, tmp_path) == tmp_path / "report.html"


def test_refused_folders(tmp_path):
    with pytest.raises(DataError, match="nothing to report"):
        write_report(tmp_path)
    with pytest.raises(DataError, match="nothing to report"):
        write_report(tmp_path / "absent")
    write_cases(tmp_path / "cases.csv", rows())
    (tmp_path / "summary.json").write_text("{broken")
    with pytest.raises(FormatError, match=r"summary\.json is broken"):
        write_report(tmp_path)


def test_a_broken_log_is_told_and_does_not_stop_the_report(tmp_path):
    write_cases(tmp_path / "cases.csv", [row for row in rows() if row.metric == "Dice"])
    (tmp_path / "status.json").write_text("[")
    (tmp_path / "provenance.json").write_text("[1]")
    assert "status.json cannot be read" in write_report(tmp_path).read_text()


def test_the_planes_of_a_volume_are_seen_as_a_radiologist_sees_them():
    # a marker at the patient's right, front, head; every other corner empty
    reference = np.zeros((20, 22, 10), np.uint8)
    reference[15:18, 17:20, 7:9] = 1  # RAS+: large x = right ... is left of the picture
    view = make_view("c", prediction=reference, reference=reference, image=reference * 1.0, affine=np.eye(4))
    assert view.part == "the whole image"
    planes = {plane.name: plane for plane in draw_planes(view, {1: "a"})}
    assert planes["axial"].edges == ("R", "L", "A", "P")
    for name, (row, column) in {"axial": (0, 0), "coronal": (0, 0), "sagittal": (0, 0)}.items():
        drawn = decode(planes[name].layers[1].strip)[: planes[name].height]
        rows_, columns = np.nonzero(drawn)
        centre = rows_.mean() / planes[name].height, columns.mean() / planes[name].width
        assert (round(centre[0]), round(centre[1])) == (row, column), name


def test_a_view_turns_every_orientation_to_the_same_picture():
    reference = np.zeros((12, 14, 8), np.uint8)
    reference[2:5, 3:9, 5:7] = 1
    straight = make_view("c", prediction=reference, reference=reference, affine=np.diag([1.0, 2, 3, 1]))
    turned = make_view(
        "c", prediction=reference[::-1].transpose(2, 0, 1), reference=reference[::-1].transpose(2, 0, 1),
        affine=np.array([[0, -1.0, 0, 11], [0, 0, 2, 0], [3, 0, 0, 0], [0, 0, 0, 1]]),
    )  # fmt: skip
    assert np.array_equal(straight.reference, turned.reference)
    assert straight.spacing == turned.spacing == (1.0, 2.0, 3.0)


def test_the_error_map_tells_missed_from_too_much_and_wrong_label():
    reference = np.zeros((4, 8), np.uint8)
    prediction = reference.copy()
    reference[:, 0:4] = 1
    prediction[:, 2:6] = 1
    prediction[:, 3] = 2
    view = make_view("c", prediction=prediction, reference=reference, unit="px")
    (plane,) = draw_planes(view, {1: "a", 2: "b"})
    drawn = decode(plane.layers[2].strip)
    centres = ((np.arange(8) + 0.5) * plane.width / 8).astype(int)
    assert drawn[plane.height // 2, centres].tolist() == [2, 2, 1, 4, 3, 3, 0, 0]
    # objects (values that are no labels), numbered otherwise: the first is the reference's, the second a piece too many
    view = make_view("c", prediction=prediction * 7, reference=reference, unit="px")
    (plane,) = draw_planes(view, {1: "a"})
    assert decode(plane.layers[2].strip)[plane.height // 2, centres].tolist() == [2, 2, 1, 4, 3, 3, 0, 0]


@pytest.mark.parametrize("volume", [False, True])
def test_the_picture_of_failures_shows_the_worst_cases_where_they_are_wrong(volume, tmp_path):
    reference = np.zeros((20, 30, 5) if volume else (20, 30), np.uint8)
    prediction = reference.copy()
    reference[4:10, 4:24] = 1
    prediction[4:10, 4:14] = 1  # a half is missed, in all slices
    if volume:
        prediction[12:16, 4:24, 3] = 1  # so that slice 3 is the worst
    run = tmp_path / "2026-11-20_090000_fold0"
    for number, role in enumerate(("best", "worst", "worst")):
        view = make_view(
            f"case {number}", role=role, score=0.5, metric="Dice", prediction=prediction, reference=reference,
            affine=np.eye(4) if volume else None, unit="mm" if volume else "px",
        )  # fmt: skip
        write_view(run / "validation" / "views", view, number)
    (run / "status.json").write_text("{}")
    (run / "validation" / "summary.json").write_text(json.dumps({"labels": {"1": "liver"}}))
    script = Path(__file__).parents[1] / "docs" / "draw_failures.py"
    command = [sys.executable, str(script), str(tmp_path), "-o", str(tmp_path / "f.png")]
    subprocess.run(command, check=True, capture_output=True)
    drawn = np.asarray(Image.open(tmp_path / "f.png").convert("RGB"))
    assert drawn.shape[1] == 2 * 3.6 * 75  # two cases: the best one is none of them
    top = drawn[: int(0.85 * len(drawn))]  # without the legend
    missed, too_much, agree = (
        (top == np.array([int(ERROR_COLOURS[name][k : k + 2], 16) for k in (1, 3, 5)])).all(axis=-1).sum()
        for name in ("missed", "too much", "agree")
    )
    assert missed > 500
    assert missed == pytest.approx(agree, rel=0.1)
    assert too_much == (pytest.approx(80 / 60 * missed, rel=0.1) if volume else 0)


def test_an_object_gets_the_colour_of_its_partner_and_a_number_of_its_own():
    reference = np.array([[1, 1, 1, 1, 0, 8, 8, 0, 0, 3]])
    prediction = np.array([[4, 4, 4, 9, 9, 2, 2, 0, 5, 6]])
    found = match_objects(prediction, reference)[0].tolist()
    # 4 and 9 lie on 1 (9 is the smaller piece), 2 on 8, 6 on 3, 5 on nothing; 6 colours: colour of n is (n - 1) % 6
    assert found[:3] == [1, 1, 1]
    assert found[3] == found[4] != 1
    assert (found[3] - 1) % 6 == 0
    assert (found[5], found[7], found[9]) == (8, 0, 3)
    assert found[8] not in {0, 1, 3, 8, found[3]}
    assert len(set(found)) == 6
    assert match_objects(np.zeros((2, 2), int), np.zeros((2, 2), int)).tolist() == [[0, 0], [0, 0]]
    assert match_objects(np.array([3]), np.array([0])).tolist() != [0]


def test_the_score_that_chose_the_weights_heads_the_page_and_few_cases_get_no_interval():
    def line(metric, label, n):
        return entry(metric, "", "higher") | {"label": label, "n": n}

    scores = [line("Dice", "cell", 6), line("SEG", "all", 6)]
    card, *_ = score_sections([], {"scores": scores})["cards"]
    assert (card["name"], card["note"]) == ("mean Dice, cell", "95 % interval 0.300 to 0.700")
    page = score_sections([], {"scores": scores, "main_score": "SEG"})
    assert page["cards"][0]["name"] == "mean SEG"
    assert page["sentences"][0].startswith("In 6 cases the mean SEG was 0.510; the true mean lies between 0.300 and")
    page = score_sections([], {"scores": [line("SEG", "all", 4)], "main_score": "SEG"})
    assert page["cards"][0]["note"] == ""


def decode(address: str) -> np.ndarray:
    import io

    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.split(",", 1)[1]))))


def test_views_come_back_and_bad_ones_are_refused(tmp_path):
    picture = np.zeros((40, 50), np.int32)
    picture[3:9, 4:30] = 70000
    colour = np.random.default_rng(0).integers(0, 255, (3, 40, 50))
    view = make_view("a/b:c", prediction=picture, reference=picture, image=colour, unit="px", maps={"m": picture > 0})
    assert view.image is not None
    assert view.image.shape == (40, 50, 3)
    write_view(tmp_path, view, 3)
    (back,) = read_views(tmp_path)
    assert (back.case, back.unit, back.spacing, back.maps.keys()) == ("a/b:c", "px", (1.0, 1.0), {"m"})
    assert np.array_equal(back.prediction, view.prediction)
    remove_views(tmp_path)
    assert read_views(tmp_path) == []
    assert read_views(tmp_path / "absent") == []
    (tmp_path / "00_x.npz").write_bytes(b"PK broken")
    with pytest.raises(FormatError, match="broken"):
        read_views(tmp_path)
    with pytest.raises(UsageError, match="one 2-D or 3-D shape"):
        make_view("c", prediction=picture, reference=picture[:5])
    with pytest.raises(UsageError, match="differ in shape"):
        make_view("c", prediction=picture, reference=picture, image=colour[:, :5])


def test_large_images_are_cropped_and_thinned_out():
    reference = np.zeros((700, 4, 1000), np.uint8)
    reference[100:600, 1:3, 0:1000] = 1
    view = make_view("c", prediction=reference, reference=reference, spacing=(1, 1, 1))
    assert max(view.prediction.shape) <= 320
    assert view.spacing[1] == 1.0
    assert "part around the structures" not in view.part or "x" in view.part


def test_figures_hold_what_was_measured():
    figure, facts = agreement_plot([("a", 11.0, 10.0), ("b", 9.0, 10.0), ("c", 13.0, 10.0)], "mL")
    # differences 1, -1, 3: mean 1, sd 2
    assert facts == {"bias": 1.0, "low": pytest.approx(1 - 3.92), "high": pytest.approx(4.92), "n": 3.0}
    assert "bias" in figure
    assert agreement_plot([("a", 1.0, 1.0)], "mL")[1] == {"bias": 0.0, "n": 1.0}
    assert "&lt;b&gt;" in curve_plot({"<b>": [(0, 1.0)]}, x_label="epoch", y_label="loss")
    strip = strip_plot({"a": rows()[:4:4]}, {}, "higher")
    assert strip.count("<circle") == 1
    # two cases with nothing found: the scale is that of the score, 0 to 1
    nothing = [ScoreRow(case, "a", "Dice", 0.0, "", "scored", "") for case in "ab"]
    assert ">1</text>" in strip_plot({"a": nothing}, {}, "higher")
    assert "NaN" not in reliability_plot([{"probability": 0.0, "frequency": 0.0, "count": 0}], "x")


def test_scores_of_labels_that_are_called_like_a_loss_are_scores():
    columns = {"lr": [(1, 0.1)], "loss": [(1, 1.0)], "score": [(1, 0.5)], "val Dice bone loss": [(1, 0.5)]}
    loss, scores, rate = training_curves(columns)
    assert [f">{name}<" in loss for name in columns] == [False, True, False, False]
    assert [f">{name}<" in scores for name in columns] == [False, False, True, True]
    assert "lr" in rate
    # what does not fit into a figure is not left out in silence
    many = training_curves({f"val Dice {n}": [(1, 0.5)] for n in range(9)})[0]
    assert "val Dice 5" in many
    assert "val Dice 6" not in many
    assert "6 of 9" in many


def test_a_run_without_scores_tells_its_threshold_and_how_many_cases_it_kept(tmp_path):
    (tmp_path / "pipeline.yaml").write_text("dataset: x\n")
    (tmp_path / "split.json").write_text(
        json.dumps({"seed": 0, "folds": 5, "fold": 0, "training": ["1"], "validation": ["22"]})
    )
    facts = {"value": 0.4321, "chosen_on": "training", "cases": 20, "rule": "highest pooled Dice"}
    (tmp_path / "threshold.json").write_text(json.dumps(facts))
    text = write_report(tmp_path).read_text()
    assert "<dt>Threshold</dt><dd>0.4321, chosen on the 20 training cases (highest pooled Dice)</dd>" in text
    assert "<dt>Validation cases</dt><dd>1: 22</dd>" in text  # not 22 of them


def test_ticks_and_axes():
    assert nice_ticks(0.0, 0.93) == [0.0, 0.2, 0.4, 0.6, 0.8]
    assert nice_ticks(5, 5) == [5]
    axis = Axis([2.0, 2.0], 0, 100)
    assert axis(2.0) == pytest.approx(50)
    assert Axis([], 0, 100)(0.5) == pytest.approx(50)


def test_facts_and_logs(tmp_path):
    (tmp_path / "log.csv").write_text("epoch,loss,note\n0,0.5,x\n1,,y\n2,inf,z\n3,0.1,\n")
    assert read_log(tmp_path / "log.csv", []) == {"loss": [(0.0, 0.5), (3.0, 0.1)]}
    words = ["medseg", "train", "my set", *("--set", "train.epochs=5") * 10]  # to be copied, so whole
    assert shlex.split(dict(run_facts([{"command": words}]))["Command"]) == words
    facts = dict(run_facts([{"a_b": 1.5, "nothing": None, "yes": True, "many": {str(i): i for i in range(30)}}]))
    assert facts == {"A b": "1.5", "Yes": "yes", "Many": "30 entries"}


@pytest.mark.parametrize("metric", ["SurfaceDice@2mm", "HD95 (pooled)", "ShareError(tumour/liver)", *METRICS])
def test_scores_have_plain_words(metric):
    assert plain_words(metric)


@pytest.mark.parametrize(
    ("metric", "said"), [("PooledDice", "all cases at once"), ("PatientDice", "mean over patients")]
)
def test_scores_over_all_cases_stand_in_a_table_of_their_own(metric, said):
    line = {"label": "liver", "metric": metric, "unit": "", "level": "pooled", "mean": 0.9, "status": "scored"}
    page = score_sections([], {"scores": [line]})
    assert page["scores"] == []
    assert [(s["name"], s["value"]["text"], s["over"]) for s in page["pooled"]] == [(metric, "0.900", said)]


def test_unknown_scores_have_none():
    assert plain_words("Frobnication") == ""
