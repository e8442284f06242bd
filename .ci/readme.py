"Write README.md from nbs/index.ipynb as it is stored: its prose, its code, and its figures as files in nbs/images. Nothing is run, no Quarto is needed."
import base64
import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK, README, IMAGES = ROOT / "nbs/index.ipynb", ROOT / "README.md", ROOT / "nbs/images"


def directives(source: str) -> set[str]:
    "The cell's `#|` lines, without values: {'hide', 'echo: false', 'label: headline'}."
    return {line[2:].strip() for line in source.splitlines() if line.startswith("#|")}


def figure(png: str, marks: set[str]) -> tuple[str, Path, bytes]:
    "A stored picture: its line in the README, its file (named by the cell's `#| label:`), its bytes. `#| fig-alt:` says what it shows."
    values = dict(mark.split(": ", 1) for mark in marks if ": " in mark)
    path = IMAGES / f"{values['label']}.png"
    return f"![{values['fig-alt']}]({path.relative_to(ROOT).as_posix()})", path, base64.b64decode(png)


def parts(notebook):
    "(text, file or None, bytes or None) for each piece of the page."
    for cell in notebook.cells:
        marks = directives(cell.source)
        if cell.cell_type == "markdown": yield cell.source, None, None
        if cell.cell_type != "code" or "hide" in marks: continue
        if "echo: false" not in marks: yield "```python\n" + re.sub(r"^#\|.*\n", "", cell.source, flags=re.M) + "\n```", None, None
        for output in cell.outputs:
            data = output.get("data", {})
            if "image/png" in data: yield figure(data["image/png"], marks)
            elif "text/markdown" in data: yield data["text/markdown"], None, None
            elif "text/plain" in data: yield "\n".join("    " + line for line in data["text/plain"].splitlines()), None, None


def render() -> tuple[str, dict[Path, bytes]]:
    "README.md's text, and the pictures that it shows."
    pieces = list(parts(nbformat.read(NOTEBOOK, as_version=4)))
    link = lambda text: re.sub(r"\]\((book|library)/", r"](nbs/\1/", text)  # the page lies beside nbs/, not in it
    text = "<!-- Made from nbs/index.ipynb by `make readme`: edit that. -->\n\n" + "\n\n".join(link(text).strip("\n") for text, _, _ in pieces) + "\n"
    return text, {path: content for _, path, content in pieces if path}


if __name__ == "__main__":
    text, pictures = render()
    README.write_text(text, encoding="utf-8")
    for path, content in pictures.items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
