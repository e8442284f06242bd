"The book as its readers meet it: one shape for all chapters, links that lead somewhere, figures that say what they show, pages that a publisher can read."
import json
import re
import shutil
import subprocess

import pandas as pd
import pytest
from test_house import NOTEBOOKS, ROOT, name, read

import franken
from franken import tables
from franken.book import FAMILY, catalogue, found, machine, made_by, opened, skeleton
from franken.errors import UserError
from franken.report import callout
from franken.study import STUDIES

BOOK = [p for p in NOTEBOOKS if p.parent.name == "book"]
CHAPTERS = [p for p in BOOK if int(p.stem[:2]) <= 10]
prose = lambda notebook: "\n\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")


@pytest.mark.parametrize("path", CHAPTERS, ids=name)
def test_a_chapter_opens_on_colab(path):
    badge, install = read(path).cells[1:3] if "colab-badge" in read(path).cells[1].source else read(path).cells[2:4]
    assert f'/blob/v{franken.__version__}/{name(path)}"' in badge.source
    assert install.cell_type == "code" and f"git+https://github.com/franken-vlm/franken@v{franken.__version__}" in install.source and '"google.colab" in sys.modules' in install.source
    first = next(c for c in read(path).cells if c.cell_type == "code")
    assert first.source == install.source  # before anything of the package is imported


@pytest.mark.parametrize("path", [p for p in BOOK if int(p.stem[:2]) <= 8], ids=name)
def test_a_chapter_has_the_shape_of_a_chapter(path):
    notebook = read(path)
    text = prose(notebook)
    said = text + "\n".join(o.get("data", {}).get("text/markdown", "") for c in notebook.cells if c.cell_type == "code" for o in c.outputs)
    places = [said.find(mark) for mark in ("## The paper says", "## We measured")]
    assert min(places) > 0 and "**In a line.**" in said
    assert notebook.cells[0].source.split("\n\n")[1].startswith("> ") and notebook.cells[0].source.rstrip().endswith("?")
    headings = re.findall(r"^## (.*)$", text, re.M)
    assert any(h.startswith("How") for h in headings) and headings[-2:] == ["Limits", "Try it"], headings


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_figures_say_what_they_show(path):
    for cell in read(path).cells:
        drawn = cell.cell_type == "code" and any("image/png" in o.get("data", {}) for o in cell.outputs)
        assert not any("<Figure size" in "".join(o.get("data", {}).get("text/plain", "")) and "image/png" not in o["data"] for o in cell.get("outputs", ())), "a figure that is only named"
        if drawn and re.search(r"\bplot\.\w+\(", cell.source) and "book" in path.parts: assert re.search(r"^#\| *fig-alt: *\S.{20}", cell.source, re.M), cell.source[:200]
        labels = re.findall(r"^#\| *label: *(fig-\S+)", cell.source, re.M)
        for what in ("alt", "cap") if labels else (): assert re.search(rf"^#\| *fig-{what}: *\S.{{20}}", cell.source, re.M), (labels, what)
    labels = re.findall(r"^#\| *label: *(\S+)", "\n".join(c.source for c in read(path).cells), re.M)
    assert len(labels) == len(set(labels))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_links_lead_somewhere(path):
    shown = "\n".join(o.get("data", {}).get("text/markdown", "") for c in read(path).cells if c.cell_type == "code" for o in c.outputs)
    for link in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)(?:#[^)]*)?\)", prose(read(path)) + shown):
        assert (path.parent / link).exists() or path.stem == "index" and (ROOT / link).exists(), link
    for figure in re.findall(r"(?<![\w.])@(fig-[\w-]+)", prose(read(path))): assert f"label: {figure}" in "\n".join(c.source for c in read(path).cells), figure


def test_every_table_is_explained():
    page, shown = catalogue(), {t for p in tables.results().rglob("*.parquet") for t in [p.stem] if t in tables.COLUMNS}
    assert set(re.findall(r"^## `(\S+)`$", page, re.M)) == shown and not re.findall(r"\|  \|", page)  # no column without a meaning
    assert page in ["".join(o["data"].get("text/markdown", "")) for c in read(ROOT / "nbs/book/12_the_tables.ipynb").cells if c.cell_type == "code" for o in c.outputs], "stored before a table was: run it again"
    linked = {t for p in BOOK for t in re.findall(r"12_the_tables\.ipynb#([\w.]+)", p.read_text(encoding="utf-8"))}
    assert {"graft", "freeze", "study.claims"} <= linked <= shown, linked - shown
    for file in re.findall(r"/franken/data/results/(\S+?)\)", page): assert (tables.results() / file).is_file()
    assert "``" not in page and all(f"`franken study {name}`" in made_by("study.claims") or f"`{name}`" in made_by("study.claims") for name in STUDIES)
    with pytest.raises(UserError, match="no such table"): made_by("grafst")


def test_figures_are_named_where_they_are_spoken_of():
    named = {path.stem[:2]: re.findall(r"(?<![\w.])@(fig-[\w-]+)", prose(read(path))) for path in BOOK}
    assert sum(map(len, named.values())) >= 10 and all(re.search(r"\bfigure (?:above|below)\b", prose(read(path)), re.I) is None for path in BOOK)


def test_what_is_cited_is_in_the_bibliography():
    known = set(re.findall(r"^@\w+\{([\w-]+),", (ROOT / "nbs/references.bib").read_text(encoding="utf-8"), re.M))
    cited = {key for path in NOTEBOOKS for group in re.findall(r"\[(@[^\]]+)\]", prose(read(path))) for key in re.findall(r"@([\w-]+)", group)}
    assert {"frankenstein", "grpo", "dapo"} <= cited <= known, cited - known


@pytest.mark.skipif(not shutil.which("pandoc"), reason="pandoc is not there")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_pandoc_reads_it(path, tmp_path):
    page = json.loads(path.read_text(encoding="utf-8"))
    for output in (o for c in page["cells"] for o in c.get("outputs", ())): output |= {"execution_count": 1} if output["output_type"] == "execute_result" else {}  # counts are cleaned away here, and pandoc wants one
    made = subprocess.run(["pandoc", "--from", "ipynb", "--to", "json", "--extract-media", tmp_path], input=json.dumps(page).encode(), check=True, capture_output=True, timeout=120)
    assert len(json.loads(made.stdout)["blocks"]) == len(page["cells"])


def test_the_first_page_says_what_the_chapters_say():
    shown = "\n".join(o.get("data", {}).get("text/markdown", "") for c in read(ROOT / "nbs/index.ipynb").cells if c.cell_type == "code" for o in c.outputs)
    answers = found(ROOT / "nbs/book")
    assert {f"{i:02}" for i in range(1, 10)} == {file[:2] for file, *_ in answers}
    for file, title, question, answer in answers: assert f"- [{title}](book/{file}). *{question}* {answer}" in shown, file


def words(text: str) -> set[str]:
    "The words of a page, without code, links and citations."
    for other in (r"(?s)```.*?```", r"`[^`]*`", r"\]\([^)]*\)", r"\[@[^\]]*\]|@fig-[\w-]+|https?://\S+|<[^>]+>", r"\S*[_/\\=]\S*"): text = re.sub(other, " ", text)
    return set(re.findall(r"(?<![\w'])[A-Za-z][a-z']*[a-z](?![\w])", text))


@pytest.mark.skipif(not shutil.which("aspell"), reason="aspell is not there")
def test_spelling():
    said = [(ROOT / file).read_text(encoding="utf-8") for file in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    for path in NOTEBOOKS:
        code = [c for c in read(path).cells if c.cell_type == "code"]
        said += [prose(read(path)), *(o.get("data", {}).get("text/markdown", "") for c in code for o in c.outputs), *(text for c in code for text in re.findall(r"^#\| *fig-(?:alt|cap): *(.*)", c.source, re.M))]
    known = set((ROOT / "tests/words.txt").read_text(encoding="utf-8").split())
    unknown = {word for word in set.union(*map(words, said)) if word.lower() not in known}
    assert "colour" in unknown and len(unknown) > 1000  # so far nobody has looked
    unknown = set(subprocess.run(["aspell", "-l", "en_GB-ize", "list"], input="\n".join(sorted(unknown)), text=True, check=True, capture_output=True).stdout.split())
    assert not unknown, sorted(unknown)


def test_chapters_can_be_about_another_trio(tmp_path):
    for table in ("graft", "graft.outcomes"):
        for end in ("parquet", "json"): shutil.copy(tables.results() / "organism-0" / f"{table}.{end}", tmp_path / f"{table}.{end}")
    mine, theirs = opened("graft", str(tmp_path)), opened("graft", "organism-0")
    assert list(mine.stored) == [str(tmp_path)] and mine.results["graft"].equals(theirs.results["graft"]) and list(mine.ruling.claim) == ["C6"]
    said = [callout(o.chapter, o.results, o.ruling, o.made) for o in (mine, theirs)]
    assert "Made again" not in said[0] and "`franken graft organism-0" in said[1]
    with pytest.raises(UserError, match="no table 'attend'"): opened("attend", str(tmp_path))
    with pytest.raises(UserError, match="franken dissect openmmreasoner"): opened("graft", "openmmreasoner")
    with pytest.raises(UserError, match="no stored results and no folder"): opened("graft", str(tmp_path / "nowhere"))


def test_what_fits_is_counted():
    shown = machine()
    assert {"organism", "openmmreasoner"} <= set(shown.index) and bool(shown.fits["organism"]) and shown["one model, GB"]["openmmreasoner"] == pytest.approx(16.6, abs=.1)
    counts = pd.Series({size: sum(p.numel() for p in skeleton(size).parameters()) / 1e9 for size in FAMILY})
    assert counts.round(1).to_dict() == {"3B": 3.8, "7B": 8.3, "32B": 33.5, "72B": 73.4}  # as their model cards have them
