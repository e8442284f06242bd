"What holds of the repository as a whole: one notebook a module, clean outputs, a README that is the index notebook, a wheel with everything in it."
import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path

import nbformat
import pytest

import franken

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = sorted((ROOT / "nbs/library").glob("*.ipynb"))
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if not any(part.startswith(".") for part in p.relative_to(ROOT).parts))
name = lambda path: path.relative_to(ROOT).as_posix()

if not (ROOT / ".git").exists(): pytest.skip("not a checkout: these are tests of the repository", allow_module_level=True)


@cache
def tracked() -> list[Path]:
    "Every file that git has, or would have: `git add -A`."
    said = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True).stdout
    return [path for part in said.decode().split("\0") if part and (path := ROOT / part).is_file()]


def texts():
    "(name, text) of the files that are text."
    for path in tracked():
        try: yield name(path), path.read_text(encoding="utf-8")
        except UnicodeDecodeError: pass


@cache
def read(path: Path): return nbformat.read(path, as_version=4)


def test_the_other_project_is_never_installed():
    other = re.compile(r"""\binstall\b[^\n`;&|]*?[ \t"']franken(\[[^]\n]*\])?(?![-\w./:])""")
    installs = "pip install {}".format
    for bad in ("franken", "-q franken[train]", "'franken>=1'", "torch franken"): assert other.search(installs(bad)), bad
    for good in ("franken-vlm", "'franken-vlm[train]'", "franken_vlm-*.whl", "-e ."): assert not other.search(installs(good)), good
    assert not [(file, found.group()) for file, text in texts() if (found := other.search(text))]


def test_no_path_of_a_machine():
    own = re.compile(r"(?<![\w.~}/-])/(work|root|home|tmp|Users|var/folders|opt)/[\w.]")
    notebooks = [(name(path), found.group()) for path in NOTEBOOKS if (found := own.search(path.read_text(encoding="utf-8")))]
    others = [(file, found.group()) for file, text in texts() if not file.endswith(".ipynb") and not file.startswith("tests/") and (found := own.search(text))]
    assert not notebooks + others


def test_one_notebook_per_module():
    exported = {path.name: [m for cell in read(path).cells for m in re.findall(r"^#\| *default_exp (\S+)", cell.source, re.M)] for path in LIBRARY}
    assert all(modules == [Path(file).stem] for file, modules in exported.items()), exported
    modules = {p.stem for p in (ROOT / "franken").glob("*.py")} - {"__init__", "_modidx"}
    assert modules == {path.stem for path in LIBRARY}
    assert not [name(p) for p in NOTEBOOKS if p not in LIBRARY and any("default_exp" in c.source for c in read(p).cells)]


def test_every_room_can_be_named():
    assert {path.stem for path in LIBRARY} == set(franken._ROOMS)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [path.stem for path in LIBRARY if f"`{path.stem}`" not in readme]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_notebook_is_complete(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) <= {"kernelspec", "jupytext"}
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert outputs or not any(cell.cell_type == "code" for cell in notebook.cells), "stored without outputs: run it"
    assert not [o.evalue for o in outputs if o.output_type == "error"]
    assert not [o.text for o in outputs if o.get("name") == "stderr"], "warnings in the stored outputs"


def test_sidebar_has_every_notebook():
    listed = re.findall(r"^ *- ([\w/]+\.ipynb)$", (ROOT / "nbs/sidebar.yml").read_text(encoding="utf-8"), re.M)
    assert sorted(listed) == sorted(path.relative_to(ROOT / "nbs").as_posix() for path in NOTEBOOKS)


def test_sidebar_is_the_map_of_the_house():
    "The library's notebooks stand in the sidebar under the rows of the first page's map, in its order."
    page = "\n".join(c.source for c in read(ROOT / "nbs/index.ipynb").cells)
    rows = re.findall(r"^\| ?([\w, ]*?) ?\| ((?:\[`\w+`\]\(library/\w+\.ipynb\)(?:, )?)+) \|", page[page.index("## The map of the house"):], re.M)
    mapped = [[]]
    for row, rooms in rows:
        if row: mapped.append([])
        mapped[-1] += re.findall(r"`(\w+)`", rooms)
    sections = (ROOT / "nbs/sidebar.yml").read_text(encoding="utf-8").split("- section: Library")[1].split("- section: ")[1:]
    assert mapped[1:] == [re.findall(r"library/(\w+)\.ipynb", section) for section in sections]


def test_site_can_be_made(tmp_path):
    "All that nbdev does before Quarto, with a `quarto` that does nothing."
    for path in tracked():
        if name(path).startswith("nbs/") or path.suffix == ".py" or path.name in ("settings.ini", "_quarto.yml"):
            (to := tmp_path / name(path)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, to)
    (tmp_path / "quarto").write_text("#!/bin/sh\n")
    (tmp_path / "quarto").chmod(0o755)
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    subprocess.run(["nbdev_proc_nbs", "--n_workers", "1"], cwd=tmp_path, env={**os.environ, "PATH": path}, check=True, capture_output=True)
    assert not [name(p) for p in NOTEBOOKS if not (tmp_path / "_proc" / p.relative_to(ROOT / "nbs")).is_file()]
    for file in ("styles.css", "references.bib", "images/headline.png"): assert (tmp_path / "_proc" / file).is_file(), file
    for file in ("nbs/nbdev.yml", "nbs/sidebar.yml"): assert (tmp_path / file).read_text() == (ROOT / file).read_text(), file


def test_every_public_name_says_what_it_is():
    for path in sorted((ROOT / "franken").glob("*.py")):
        public = [n for n in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_")]
        assert not [n.name for n in public if not ast.get_docstring(n)], path.name


def test_import_is_light():
    loaded = "import sys, franken; print(*sorted({'torch', 'transformers', 'nnsight', 'trl', 'pandas', 'numpy'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True).stdout.split() == []


def test_functions_are_functions():
    for function, room in franken._FUNCTIONS.items():
        importlib.import_module(f"franken.{room}")
        assert callable(getattr(franken, function)), function
    with pytest.raises(AttributeError, match="lokalize"): franken.lokalize


@cache
def readme():
    spec = importlib.util.spec_from_file_location("readme", ROOT / ".ci/readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_is_the_index():
    text, pictures = readme().render()
    assert (ROOT / "README.md").read_text(encoding="utf-8") == text
    assert pictures, "no headline figure"
    for path, content in pictures.items(): assert path.read_bytes() == content, name(path)
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)", text): assert (ROOT / link).exists(), link


def test_tools_agree_on_the_version():
    settings = (ROOT / "settings.ini").read_text(encoding="utf-8")
    assert f"version = {franken.__version__}\n" in settings
    assert f"version: {franken.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## {franken.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_constraints_cover_the_requirements():
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert all(line.startswith("#") or re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in (ROOT / "constraints.txt").read_text().splitlines())
    settings = (ROOT / "settings.ini").read_text(encoding="utf-8")
    wanted = {re.split(r"[<>=\[]", word)[0].lower().replace("_", "-") for key in ("requirements", "train_requirements", "dev_requirements", "docs_requirements", "eval_requirements")
              for word in re.search(rf"^{key} = (.*)$", settings, re.M).group(1).split()}
    assert wanted <= pinned, wanted - pinned


def test_wheel(tmp_path):
    source = tmp_path / "source"
    for path in tracked():
        if name(path).split("/")[0] in ("franken", "settings.ini", "setup.py", "README.md", "LICENSE"):
            (to := source / name(path)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, to)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, source], check=True, capture_output=True)
    wheel, = tmp_path.glob("franken_vlm-*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    package = {name(path) for path in tracked() if name(path).startswith("franken/")}
    assert "franken/py.typed" in inside and package <= inside, package - inside
    assert not [file for file in inside if not file.startswith(("franken/", "franken_vlm-"))]
    assert wheel.stat().st_size < 40e6
