"One page, whole, from whatever tables there are."
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from invented import invent, store
from matplotlib.figure import Figure

from franken import plot, report, scenes, tables
from franken.errors import UserError
from franken.verdicts import verdicts

VOID = {"meta", "img", "source", "br"}

class Page(HTMLParser):
    "Checks that tags close, and gathers headings, images, ids and links."
    def __init__(self, text):
        super().__init__()
        self.open, self.headings, self.images, self.ids, self.links, self.th = [], [], [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag not in VOID: self.open.append(tag)
        if re.fullmatch("h[1-6]", tag): self.headings.append(int(tag[1]))
        if tag == "img": self.images.append(attrs)
        if tag == "th": self.th.append(attrs)
        if "id" in attrs: self.ids.append(attrs["id"])
        for name in ("href", "src", "srcset"):
            if name in attrs: self.links.append(attrs[name])

    def handle_endtag(self, tag): assert self.open.pop() == tag

@pytest.fixture(scope="module")
def full(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    store(out)
    rows = []
    for who, model in (("00aa", "base"), ("11bb", "in"), ("22cc", "rl")):
        for family in ("vision", "vision_to_reasoning"):
            for i, q in enumerate(scenes.questions(family, 4, 0)):
                said = q.answer if family == "vision" else scenes.completion(*scenes.trace(q)) if model == "rl" and i else "<script>alert(1)</script>"
                rows.append(dict(key=tables.key(w=who, f=family, i=i), who=who, id=f"{family}-0-{i}", ability=family, condition="image", said=said, right=scenes.correct(q, said)))
    tables.Samples(out / "abilities.samples.jsonl").add(rows)
    return report.report(out).read_text()

def test_it_is_one_file(full):
    page = Page(full)
    assert all(link.startswith(("data:", "#")) for link in page.links) and "<script" not in full and "@import" not in full
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids) and len(set(page.ids)) == len(page.ids)

def test_it_is_accessible(full):
    page = Page(full)
    assert page.headings[0] == 1 and page.headings.count(1) == 1 and all(b <= a + 1 for a, b in zip(page.headings, page.headings[1:]))
    assert all(i.get("alt") for i in page.images) and all(h.get("scope") in ("col", "row") for h in page.th)
    assert 'lang="en"' in full and "prefers-color-scheme: dark" in full

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
def test_it_fits_on_a_phone_and_on_a_desk(full, tmp_path):
    "In a browser, in frames of three widths: nothing wider than the frame, no error, all pictures there."
    frames = "".join(f'<iframe style="width:{width}px;height:900px" srcdoc="{html.escape(full, quote=True)}"></iframe>' for width in (360, 768, 1280))
    look = """addEventListener("error", e => document.body.dataset.error = e.message);
    addEventListener("load", () => document.body.dataset.found = JSON.stringify([...document.querySelectorAll("iframe")].map(f => { const d = f.contentDocument, r = d.documentElement;
    return [r.scrollWidth, r.clientWidth, d.images.length, [...d.images].filter(i => i.naturalWidth).length] })))"""
    (tmp_path / "frames.html").write_text(f"<!DOCTYPE html><html><body><script>{look}</script>{frames}</body></html>", encoding="utf-8")
    dom = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run", f"--user-data-dir={tmp_path / 'profile'}",
                          "--virtual-time-budget=20000", "--dump-dom", (tmp_path / "frames.html").as_uri()], capture_output=True, text=True, timeout=180, check=True).stdout
    found = json.loads(html.unescape(re.search(r'data-found="([^"]*)"', dom).group(1)))
    assert "data-error" not in dom.split("<script>")[0] and len(found) == 3
    for width, (wide, room, images, seen) in zip((360, 768, 1280), found): assert wide <= room and room > width - 40 and images == seen > 5, (width, wide, room, images, seen)

def test_it_shows_what_was_measured(full):
    v = verdicts(invent())
    assert all(statement.replace("'", "&#39;") in full for statement in v.statement)
    assert full.count("The paper says") == full.count("We measured") == 6 and "Nothing yet" not in full
    assert report.tally(v) in full.replace("&#39;", "'")

def test_it_shows_people_questions(full):
    assert full.count('class="exhibit"') == 3 and "&lt;script&gt;" in full and "not faithful" not in full

@pytest.mark.parametrize("name", [n for n in tables.SCHEMA if n not in ("verdicts", "compare")])
def test_it_says_what_is_missing(tmp_path, name):
    tables.write_table(invent()[name], tmp_path, name)
    text = report.report(tmp_path).read_text()
    Page(text)
    assert text.count("Nothing yet") == 5 and "nan" not in re.sub(r'"data:[^"]*"', "", text).lower().replace("nanoseconds", "")

def test_it_names_the_trio(tmp_path):
    tables.write_table(invent()["graft"], tmp_path, "graft", fingerprints=dict(base="00aa", rl="22cc"))
    assert "<strong>the trio</strong>" in (text := report.report(tmp_path).read_text()) and "22cc" in text
    (tmp_path / "trio.json").write_text(json.dumps(dict(name="organism", members=dict(rl=dict(where="a/folder", fingerprint="33dd")))))
    assert "<strong>organism</strong>" in (text := report.report(tmp_path).read_text()) and "a/folder" in text and "33dd" in text and "22cc" not in text

def test_a_folder_without_tables_is_the_users_error(tmp_path):
    with pytest.raises(UserError, match="no tables"): report.report(tmp_path)
    with pytest.raises(UserError, match="no such folder"): report.report(tmp_path / "absent")

FIGURES = dict(abilities=plot.abilities, attend=plot.attend, localize=plot.localize, graft=plot.graft, freeze=plot.freeze, compare=plot.compare)

@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_for_each_table_without_touching_it(name):
    df = invent()[name]
    before = df.copy(deep=True)
    assert isinstance(FIGURES[name](df), Figure)
    pd.testing.assert_frame_equal(df, before)
    with pytest.raises(UserError, match="empty"): FIGURES[name](df.head(0)) if name != "localize" else plot.skip(df.head(0))

def test_what_is_missing_is_not_drawn():
    df = invent()["abilities"]
    df.loc[df.model == "rl", ["score", "low", "high"]] = None
    drawn = [line for line in plot.abilities(df).axes[0].lines if line.get_marker() == "^"]
    assert all(len(line.get_xdata()) == 0 for line in drawn)

def test_a_deep_model_and_the_papers_cut():
    t = invent(layers=28, cuts="paper")
    for name in ("attend", "localize"): FIGURES[name](t[name])

def test_numbers_say_what_they_are():
    assert [report.fixed(x, 2) for x in (.505, -.505, -.004, 0., 1., float("nan"))] == ["0.51", "−0.51", "0.00", "0.00", "1.00", "–"]
    assert report.percent(.645) == "65%" and report.shown(pd.DataFrame(dict(x=[.645])), 2).x[0] == "0.65"  # one rounding for sentences and tables
    verdict = lambda *x: report.estimated(pd.Series(dict(zip(("estimate", "low", "high"), x))))
    assert verdict(-.0002, -.0009, .0003) == "−0.0002 [−0.0009, 0.0003]" and verdict(.35, .2, .5) == "0.350 [0.200, 0.500]"
    assert report.chance(.0496) != report.chance(.0504) and report.chance(2e-5) == "2e-05"


def test_sentences_do_without_columns_that_may_be_missing():
    t = tables.stored()
    assert any("show their steps" in s for s in report.say_abilities(t)) and not any("show their steps" in s for s in report.say_abilities(t | dict(abilities=t["abilities"].drop(columns="accuracy"))))
    close = lambda a, b: [x.split("[")[0] for x in a.split(" in ")] == [x.split("[")[0] for x in b.split(" in ")]
    with_, without = report.say_attend(t), report.say_attend({k: v for k, v in t.items() if k != "attend.outcomes"})
    assert len(with_) == len(without) == 2 and all(map(close, with_, without))  # the same rises, by the answers or by the layers
    assert not {"heads", "over_in_heads_low"} & set(report.readable("attend", t["attend"]))


def test_many_heads_are_dotted_not_written():
    rng = np.random.default_rng(0)
    wide = pd.DataFrame([dict(model="rl", trace="shared", layer=l, region="early", n_both=9, over_in_heads=(g := rng.normal(size=28)).tolist(), over_in_heads_low=(g - 1).tolist(), over_in_heads_high=(g + 1).tolist()) for l in range(28)])
    ax = plot.heads(wide).axes[0]
    apart = sum(abs(x) > 1 for row in wide.over_in_heads for x in row)
    assert len(ax.lines) == apart > 0 and not [t for t in ax.texts if t.get_text()[0] in "+-"]


def test_spectra_of_one_step_and_of_three():
    df = tables.stored()["compare"]
    one = df[df.step == "RL-IN"]
    for steps, found in ((1, one), (3, pd.concat([df, one.assign(step="RL2-IN")]))):
        fig = plot.spectra(found)
        assert sum(ax.get_title(loc="left").endswith("log(s$_i$ / s$_1$)") and ": " in ax.get_title(loc="left") for ax in fig.axes) == steps
        assert ("C5" in fig._supxlabel.get_text()) == (steps > 1)


def test_looks_leave_no_trace():
    before = dict(plot.look)
    with pytest.raises(ZeroDivisionError), plot.dark(): 1 / 0
    assert plot.look == before
