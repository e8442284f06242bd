"The package, described by settings.ini."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="], interpolation=None)
config.read(here / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]
words = lambda key: settings.get(key, "").split()
extras = {name: words(f"{name}_requirements") for name in ("train", "eval", "vllm", "dev", "docs")}
extras["dev"] = extras["docs"] + extras["dev"]  # who works on the package works on its notebooks

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8") if (here / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    author=settings["author"],
    author_email=settings["author_email"],
    url=settings["git_url"],
    license="MIT",
    keywords=settings["keywords"],
    packages=find_packages(include=["franken", "franken.*"]),
    package_data={"franken": ["py.typed", "data/**/*"]},
    include_package_data=True,
    python_requires=f">={settings['min_python']}",
    install_requires=words("requirements"),
    extras_require=extras,
    entry_points={"console_scripts": words("console_scripts")},
    classifiers=["Development Status :: 3 - Alpha", "Intended Audience :: Science/Research", "Programming Language :: Python :: 3",
                 "Topic :: Scientific/Engineering :: Artificial Intelligence"],
)
