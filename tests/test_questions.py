"Items and benchmarks: every adapter on invented rows of the benchmark's real schema, in each form in which images and files come."
import json
import sys
from io import BytesIO
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, Image as Picture, List, Value
from PIL import Image, ImageDraw

from franken import questions, scenes
from franken.errors import UserError
from franken.grading import Grade, Truth
from franken.questions import SOURCES, Misread, paper_items, picture, read
from franken.trio import BARE, TAGS, load_trio

text, whole = Value("string"), Value("int64")
META = dict(category=text, context=text, grade=text, img_height=whole, img_width=whole, language=text, skills=List(text), source=text, split=text, task=text)
VISTA = Features(pid=text, question=text, image=text, decoded_image=Picture(), choices=List(text), unit=text, precision=Value("float64"), answer=text, question_type=text, answer_type=text, metadata=META, query=text)
VERSE = Features(sample_index=text, problem_index=text, problem_version=text, question=text, image=Picture(), answer=text, question_type=text,
                 metadata=dict(split=text, source=text, subject=text, subfield=text), query_wo=text, query_cot=text, question_for_eval=text)
VISION = Features(id=text, question=text, options=List(text), image=text, decoded_image=Picture(), answer=text, solution=text, level=whole, subject=text)
LOGIC = Features(image=Picture(), question=text, answer=text, reasoning=text, skill=text, broad_capability=text, specific_capability=text, imagesource=text, sourcelink=text, liscenced=text, id=text)
MATH = Features(problem=text, solution=text, answer=text, subject=text, level=whole, unique_id=text)
GSM = Features(question=text, answer=text)

def drawn(mode="RGB", size=(40, 30)):
    image = Image.new(mode, size)
    ImageDraw.Draw(image).rectangle([5, 5, 20, 20], fill=(200, 30, 30) if mode == "RGB" else 200)
    return image

def vista(pid, category, answer, query, **more):
    base = dict(pid=pid, question=query, image=f"images/{pid}.jpg", decoded_image=drawn(), choices=None, unit=None, precision=None, answer=answer, question_type="free_form", answer_type="integer", query=query,
                metadata=dict(category=category, context="table", grade="daily life", img_height=30, img_width=40, language="english", skills=["arithmetic reasoning"], source="invented", split="testmini", task="figure question answering"))
    return base | more

def verse(i, answer, kind, question, **more):
    return dict(sample_index=str(i), problem_index=str(i), problem_version="Text Dominant", question=question, image=drawn(), answer=answer, question_type=kind, metadata=dict(split="testmini", source="invented", subject="Plane Geometry", subfield="Angle"),
                query_wo=f"Please directly answer the question.\nQuestion: {question}", query_cot=f"Please first conduct reasoning.\nQuestion: {question}", question_for_eval=question) | more

def vision(id, question, options, answer): return dict(id=id, question=question, options=options, image=f"images/{id}.jpg", decoded_image=drawn("L"), answer=answer, solution=None, level=1, subject="counting")

def logic(id, question, answer): return dict(image=drawn(), question=question, answer=answer, reasoning="Since.", skill="inductive", broad_capability="diagram", specific_capability="diagram", imagesource="invented", sourcelink="", liscenced="no", id=id)

HINT = "Hint: Please answer the question requiring a floating-point number with two decimal places and provide the final value, e.g., 1.23, 1.34, 1.45, at the end.\nQuestion: How much is it? (Unit: $)"
ROWS = {
    "mathvista": (VISTA, [
        vista("1", "general-vqa", "two", "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.\nQuestion: How many?\nChoices:\n(A) one\n(B) two", choices=["one", "two"], question_type="multi_choice", answer_type="text"),
        vista("2", "math-targeted-vqa", "7", "Hint: Please answer the question requiring an integer answer and provide the final value, e.g., 1, 2, 3, at the end.\nQuestion: Which number?"),
        vista("3", "general-vqa", "1.45", HINT, answer_type="float", precision=2., unit="$"),
        vista("4", "general-vqa", "[2007, 2008]", "Hint: a Python list.\nQuestion: Between which years?", answer_type="list")]),
    "mathverse": (VERSE, [
        verse(1, "D", "multi-choice", "Angle CED is ()\nChoices:\nA:40°\nB:60°\nC:120°\nD:140°"),
        verse(2, "2\\sqrt{3}", "free-form", "Find L."),
        verse(3, "B", "multi-choice", "", problem_version="Vision Only", query_cot="According to the question shown in the image, please first conduct reasoning.", question_for_eval="Find x.\nChoices:\nA:1cm\nB:2cm")]),
    "mathvision": (VISION, [
        vision("4", "How many digits?\n<image1>", [], "6"), vision("27", "In which order?\n<image1>", ["$\\Delta, \\square$", "$\\square, \\Delta$"], "B"),
        vision("59", "Which side?\n<image1>", [], "C"), vision("6", "Which picture?", list("ABCDE"), "D")]),
    "logicvista": (LOGIC, [
        logic("v1_0", "What choice (A, B, C, or D) fits?", "C"), logic("v1_1", "Which choices (A-D) are green?", "C, A"), logic("v1_20", "Which is correct? Select from 1-5", "3")]),
    "math500": (MATH, [dict(problem="What is $\\frac12+\\frac14$?", solution="Add.", answer="\\frac{3}{4}", subject="Prealgebra", level=1, unique_id="test/prealgebra/1.json")]),
    "gsm8k": (GSM, [dict(question="How many in all?", answer="He has 40+2=<<40+2=42>>42.\n#### 42"), dict(question="What does it cost?", answer="Dear.\n#### 1,042")]),
}
TRUE = {
    "mathvista-general": [("1", Truth("B", "choice", ("one", "two"))), ("3", Truth("1.45", "number", decimals=2)), ("4", Truth("[2007, 2008]", "math"))],
    "mathvista-math": [("2", Truth("7", "number"))],
    "mathverse": [("1", Truth("D", "choice", ("40°", "60°", "120°", "140°"))), ("2", Truth("2\\sqrt{3}", "math")), ("3", Truth("B", "choice", ("1cm", "2cm")))],
    "mathvision": [("4", Truth("6", "math")), ("27", Truth("B", "choice", ("$\\Delta, \\square$", "$\\square, \\Delta$"))), ("59", Truth("C", "choice")), ("6", Truth("D", "choice", tuple("ABCDE")))],
    "logicvista": [("v1_0", Truth("C", "choice")), ("v1_1", Truth("A, C", "text")), ("v1_20", Truth("3", "number"))],
    "math500": [("test/prealgebra/1.json", Truth("\\frac{3}{4}", "math"))],
    "gsm8k": [("0", Truth("42", "number")), ("1", Truth("1042", "number"))],
}

def made(source): return (lambda features, rows: Dataset.from_list(rows, features=features))(*ROWS[source.partition("-")[0]])

def saved(data, source, how, folder):
    "The path of a copy of a data set, as it may lie on a disk."
    s = SOURCES[source]
    if how == "saved": data.save_to_disk(folder / "x"); return folder / "x"
    if how == "splits": DatasetDict({s.split: data, "train": data.select([0])}).save_to_disk(folder / "x"); return folder / "x"
    if how == "file": data.to_parquet(folder / "any.parquet"); return folder / "any.parquet"
    if how == "folder":  # as the hub has it, other splits and configs beside it
        (folder / "data" / (s.config or "")).mkdir(parents=True)
        data.to_parquet(folder / "data" / (s.config or "") / f"{s.split}-00000-of-00001.parquet")
        (folder / "other").mkdir()
        data.select([0]).to_parquet(folder / "other" / "train-00000-of-00001.parquet")
        (folder / "other" / f"{s.split}_text_only.parquet").write_bytes(b"not read")
        return folder
    rows = data.to_list() if "decoded_image" not in data.features and "image" not in data.features else [row for row in data]
    (folder / "images").mkdir()
    for i, row in enumerate(rows):
        for name in ("image", "decoded_image"):
            if isinstance(row.get(name), Image.Image): row[name].save(folder / f"images/{i}.png"); row[name] = f"images/{i}.png"
    (folder / f"{s.split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder

@pytest.mark.parametrize("how", ["saved", "splits", "file", "folder", "jsonl"])
@pytest.mark.parametrize("source", SOURCES)
def test_every_schema_is_read_in_every_form(source, how, tmp_path):
    path = saved(made(source), source, how, tmp_path)
    found = read(source, path=path)
    assert [(i.id, i.truth) for i in found] == [(f"{source}/{id}", truth) for id, truth in TRUE[source]]
    assert {i.ability for i in found} == {SOURCES[source].ability} and all(i.origin.startswith(path.name) and i.text for i in found)
    for i in found:
        if i.ability == "reasoning": assert i.image is None
        else: assert i.image.mode == "RGB" and i.image.size == (40, 30) and np.any(i.image)

def test_the_query_is_the_benchmarks_own(tmp_path):
    text_of = {i.id: i.text for source in ("mathvista-general", "mathverse", "mathvision", "math500") for i in read(source, path=saved(made(source), source, "file", tmp_path))}
    assert text_of["mathvista-general/3"] == HINT
    assert text_of["mathverse/2"] == "Please first conduct reasoning.\nQuestion: Find L." and text_of["mathverse/3"].startswith("According to the question shown in the image")
    assert text_of["mathvision/27"] == "In which order?\n<image1>\nChoices:\n(A) $\\Delta, \\square$\n(B) $\\square, \\Delta$" and text_of["mathvision/4"] == "How many digits?\n<image1>"

@pytest.mark.parametrize("source", SOURCES)
def test_the_right_answer_is_right(source, tmp_path):
    found = read(source, path=saved(made(source), source, "file", tmp_path))
    if any(i.truth.kind == "math" for i in found): pytest.importorskip("math_verify", reason="the grader of mathematics is an extra")
    for i in found:
        assert i.grade(f"<think> so </think><answer>{i.truth.answer}</answer>", TAGS).right is True, i
        assert i.grade("<think> so </think><answer>nonsense</answer>", TAGS).right is False, i

def test_a_choice_that_reads_like_the_letter_of_another():
    sides = questions.mathvision(vision("9", "Which side is longest?", ["c", "a", "b"], "A"))[2]
    assert sides == Truth("A", "choice") and questions.mark("B", sides).right is False and questions.mark("(A)", sides).right
    assert questions.clear(list("abc")) == tuple("abc") and questions.clear(["x", "AB", ""]) == ("x", "AB", "")

@pytest.mark.parametrize("said,right", [("A, C", True), ("C and A", True), ("<answer>AC</answer>", True), ("The green ones are A and C.", True), ("A", False), ("A, B, C", False), ("B, D", False), ("none of them", False), ("", False)])
def test_several_letters(said, right): assert questions.mark(said, Truth("A, C", "text"), TAGS if "<" in said else BARE).right is right

def test_a_judge_is_handed_on(tmp_path, monkeypatch):
    monkeypatch.setattr(questions, "grade", lambda said, truth, style, judge: Grade(None, said, judge))
    assert read("gsm8k", path=saved(made("gsm8k"), "gsm8k", "file", tmp_path), judge="asked")[0].grade("42", BARE).by == "asked"

def test_images_in_every_form(tmp_path):
    image, file = drawn(), BytesIO()
    image.save(file, "PNG"), image.save(tmp_path / "x.png")
    forms = [dict(image=image), dict(image=dict(bytes=file.getvalue(), path=None)), dict(image=file.getvalue()), dict(image="x.png"), dict(image=dict(bytes=None, path="x.png")), dict(image="images/gone.jpg", decoded_image=image)]
    assert all(np.array_equal(picture(row, tmp_path), image) for row in forms)
    big = picture(dict(image=drawn(size=(3000, 1000))))
    assert big.size == (int(3000 * (questions.LARGEST / 3e6) ** .5), int(1000 * (questions.LARGEST / 3e6) ** .5))
    for mode in ("L", "P", "RGBA", "CMYK"): assert picture(dict(image=Image.new(mode, (4, 4)))).mode == "RGB"
    for bad in ({}, dict(image=None), dict(image=b"no"), dict(image="gone.png"), dict(image=dict(bytes=None, path=None)), dict(image=7)):
        with pytest.raises(Misread): picture(bad, tmp_path)

BROKEN = {
    "mathvista-general": [("answer", dict(answer="three")), ("question_type", dict(question_type="essay")), ("query", dict(query=None)), ("decoded_image", dict(decoded_image=dict(bytes=b"no", path=None))), ("choices", dict(choices=None)), ("category", dict(metadata={}))],
    "mathverse": [("answer", dict(answer="Z")), ("question_type", dict(question_type="multi_choice")), ("query_cot", dict(query_cot="")), ("image", dict(image=None)), ("sample_index", dict(sample_index=None))],
    "mathvision": [("answer", dict(options=["1", "2"], answer="C")), ("question", dict(question=None)), ("answer", dict(answer=""))],
    "logicvista": [("answer", dict(answer=None)), ("id", dict(id=None))],
    "math500": [("problem", dict(problem=None)), ("answer", dict(answer=""))],
    "gsm8k": [("answer", dict(answer="42")), ("answer", dict(answer="so\n####")), ("answer", dict(answer="so\n#### many")), ("question", dict(question=None))],
}

@pytest.mark.parametrize("source,field,change", [(s, f, c) for s, cases in BROKEN.items() for f, c in cases])
def test_a_row_that_cannot_be_read_is_named(source, field, change, tmp_path):
    row = made(source).with_format("arrow")[:].to_pylist()[0] | change
    (tmp_path / f"{SOURCES[source].split}.jsonl").write_text(json.dumps({k: None if isinstance(v, dict) and "bytes" in v else v for k, v in row.items()} | {k: "x.png" for k in ("image", "decoded_image") if k in row and k not in change}) + "\n")
    drawn().save(tmp_path / "x.png")
    if field == "decoded_image": (tmp_path / "testmini.jsonl").write_text((tmp_path / "testmini.jsonl").read_text().replace('"decoded_image": null', '"decoded_image": "gone.png"'))
    with pytest.raises(UserError, match=rf"{SOURCES[source].hub}(, row 0)?, field {field}"): read(source, path=tmp_path)

def test_numbers_that_want_decimals_say_how_many():
    row = vista("3", "general-vqa", "1.45", HINT, answer_type="float")
    with pytest.raises(Misread) as e: questions.mathvista(row)
    assert e.value.args[0] == "precision"

def test_the_same_questions_for_every_model(tmp_path):
    rows = [dict(question=f"{i}?", answer=f"#### {i}") for i in range(300)]
    path = saved(Dataset.from_list(rows), "gsm8k", "file", tmp_path)
    hundred = [i.id for i in read("gsm8k", path=path)]
    assert hundred == [i.id for i in read("gsm8k", path=path)] and len(set(hundred)) == 100
    assert hundred != [i.id for i in read("gsm8k", seed=1, path=path)]
    assert len(read("gsm8k", n=None, path=path)) == len(read("gsm8k", n=1000, path=path)) == 300
    released = sorted(np.random.RandomState(123).choice(np.arange(300), size=100, replace=False).tolist())  # as the paper's released script draws
    assert hundred == [f"gsm8k/{i}" for i in released]

def test_the_paper_asks_three_abilities(tmp_path):
    for name in ("mathvista", "math500"): (tmp_path / name).mkdir()
    vista_at, math_at = saved(made("mathvista"), "mathvista-math", "file", tmp_path / "mathvista"), saved(made("math500"), "math500", "file", tmp_path / "math500")
    found = paper_items(paths={"mathvista-general": vista_at, "mathvista-math": vista_at, "math500": math_at})
    assert [i.ability for i in found] == ["vision"] * 3 + ["vision_to_reasoning", "reasoning"] and len({i.id for i in found}) == 5

def test_the_hub_is_asked_for_the_pinned_commit(monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda hub, config, split, revision: asked.append((hub, config, split, revision)) or made("gsm8k" if "gsm8k" in hub else "logicvista"))
    monkeypatch.setattr(questions, "HfApi", lambda: SimpleNamespace(dataset_info=lambda hub: SimpleNamespace(sha="f" * 40)))
    assert read("gsm8k")[0].origin == f"openai/gsm8k@{SOURCES['gsm8k'].revision}"
    assert read("logicvista")[0].origin == "lscpku/LogicVista@" + "f" * 40  # no commit is pinned: the one that the hub had is recorded
    assert asked == [("openai/gsm8k", "main", "test", SOURCES["gsm8k"].revision), ("lscpku/LogicVista", None, "test", "f" * 40)]
    assert all(s.revision is None or len(s.revision) == 40 for s in SOURCES.values())

def test_without_hub_or_datasets_the_message_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: (_ for _ in ()).throw(ConnectionError("no route")))
    with pytest.raises(UserError, match="mathverse.*the hub did not give AI4Math/MathVerse.*path="): read("mathverse")
    monkeypatch.setattr(questions, "HfApi", lambda: SimpleNamespace(dataset_info=lambda hub: (_ for _ in ()).throw(OSError("offline"))))
    with pytest.raises(UserError, match="logicvista.*path="): read("logicvista")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"franken-vlm\[eval\]"): read("gsm8k")

def test_a_bad_copy_is_the_users_error(tmp_path):
    with pytest.raises(UserError, match="one of mathvista-general"): read("mathvista")
    with pytest.raises(UserError, match="no such file"): read("gsm8k", path=tmp_path / "gone")
    with pytest.raises(UserError, match="no file of the split"): read("gsm8k", path=tmp_path)
    (tmp_path / "test.jsonl").write_text('{"question": ')
    with pytest.raises(UserError, match="test.jsonl: not readable"): read("gsm8k", path=tmp_path)
    (tmp_path / "test.jsonl").write_text("")
    with pytest.raises(UserError, match="no rows"): read("gsm8k", path=tmp_path)
    (tmp_path / "x.parquet").write_bytes(b"PAR1 or so")
    with pytest.raises(UserError, match="x.parquet: not readable"): read("gsm8k", path=tmp_path / "x.parquet")
    other = saved(Dataset.from_list([vista("2", "math-targeted-vqa", "7", "Which?")], features=VISTA), "mathvista-math", "file", tmp_path)
    with pytest.raises(UserError, match="none of 1 rows has metadata.category = general-vqa"): read("mathvista-general", path=other)
    DatasetDict(train=made("gsm8k")).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match="the split test"): read("gsm8k", path=tmp_path / "saved")

def test_the_organisms_items():
    found = questions.items(5, seed=3)
    assert [i.ability for i in found] == [a for a in scenes.FAMILIES for _ in range(5)] and len({i.id for i in found}) == 15
    assert [i.text for i in found] == [i.text for i in questions.items(5, seed=3)] != [i.text for i in questions.items(5, seed=4)]
    for i in found:
        said = f"<think> {i.truth.answer} </think> <answer> {i.truth.answer} </answer>"
        assert i.grade(said, BARE) == Grade(True, i.truth.answer, "exact") and i.grade("no such thing", TAGS).right is False
        if i.image: assert i.described.endswith(f" ; {i.text}") and i.check("red") is None

def test_what_is_shown_under_each_condition():
    i = questions.items(1, seed=3, abilities=["vision"])[0]
    plain, styled = i.prompt("image"), i.prompt("image", TAGS)
    assert plain.text == i.text and not plain.system and styled.system == TAGS.system and styled.text == TAGS.ask(i.text)
    black, described = i.prompt("black"), i.prompt("described", TAGS)
    assert black.text == i.text and black.image.size == i.image.size and not np.any(black.image) and not np.any(described.image) and described.text == TAGS.ask(i.described)
    assert i.prompt("text").image is None
    for condition in ("image", "black", "described"):
        with pytest.raises(UserError, match=f"no image.*{condition}"): questions.items(1, seed=3, abilities=["reasoning"])[0].prompt(condition)
    from dataclasses import replace
    with pytest.raises(UserError, match="no description.*describe"): replace(i, described=None).prompt("described")

def test_words_that_a_model_does_not_know():
    questions.check_words(load_trio("organism").base, "items_")
    with pytest.raises(UserError, match="items_.*does not know the words"): questions.check_words(SimpleNamespace(vocabulary={"hello": 0}), "items_")


def test_a_trio_is_asked_about_its_own_worlds():
    from franken import scenes
    assert questions.items(5, seed=3, worlds=questions.OWN["organism"]) == questions.items(5, seed=3)
    mixed = questions.items(5, seed=3, abilities=["vision_to_reasoning"], worlds=questions.OWN["organism-refine"])
    faint, large = (scenes.questions("vision_to_reasoning", 3, 3, world=w) for w in questions.OWN["organism-refine"])
    assert [i.text for i in mixed] == [q.text for q in (faint[0], large[0], faint[1], large[1], faint[2])] and len({i.id for i in mixed}) == 5
