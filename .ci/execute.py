"Run notebooks from top to bottom and store their outputs. Cells marked `#| eval: false` or `#| gpu` keep the outputs that they have; slow ones run."
import os
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

os.environ |= dict(TQDM_DISABLE="1", PYTHONWARNINGS="ignore:IProgress not found")  # no progress bars, no paths of this machine in the outputs


class Client(NotebookClient):
    "Runs the cells that a reader without a GPU could run."
    async def async_execute_cell(self, cell, *args, **kwargs):
        if re.search(r"^#\| *(eval: *false|gpu)\b", cell.source, re.M): return cell
        return await super().async_execute_cell(cell, *args, **kwargs)


for path in map(Path, sys.argv[1:]):
    print(path)
    notebook = nbformat.read(path, as_version=4)
    Client(notebook, timeout=None, kernel_name="python3", resources=dict(metadata=dict(path=path.parent))).execute()
    nbformat.write(notebook, path)
