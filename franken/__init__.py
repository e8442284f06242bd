"What does reinforcement learning actually change inside a vision-language model?"

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_FUNCTIONS = {"load_trio": "trio", "dissect": "dissection", "abilities": "ability", "attend": "attention", "localize": "localization",
              "compare": "comparison", "graft": "grafting", "train": "training"}
_ROOMS = ("errors", "weights", "trio", "regions", "vlm", "engine", "scenes", "organism", "pairs", "questions", "captions", "grading", "interventions", "sweep", "localization", "attention",
          "ability", "spectra", "comparison", "plans", "grafting", "credit", "teaching", "freezing", "recipes", "practice", "packing", "reinforcement", "imitation", "coevolution", "upbringing", "training", "study", "stats", "tables", "plot", "paper", "verdicts", "report", "book", "dissection", "cli")
__all__ = [*_FUNCTIONS, *_ROOMS]

if TYPE_CHECKING:
    from .ability import abilities
    from .attention import attend
    from .comparison import compare
    from .dissection import dissect
    from .grafting import graft
    from .localization import localize
    from .training import train
    from .trio import load_trio


def __getattr__(name):
    "A name's module is imported when the name is first used (PEP 562): `import franken` alone loads no torch."
    if name in _FUNCTIONS: value = getattr(import_module(f"{__name__}.{_FUNCTIONS[name]}"), name)
    elif name in _ROOMS: value = import_module(f"{__name__}.{name}")
    else: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__(): return sorted([*globals(), *__all__])
