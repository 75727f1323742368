"""Hooks of mkdocs.yml: the pages where they are, a navigation that finds new ones, the API."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
# What the site holds, under the same paths: links work here and there.
SHOWN = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "docs", "bench/results")
# A page of the API each, made of the docstrings of their public names.
PACKAGES = ("rlkern", "rlkern.quant", "rlkern.kv", "rlkern.rollout", "rlkern.rollout.strategies")


def public_names(package: str) -> list[str]:
    """What a package's __init__ imports for its users; subpackages have pages of their own."""
    source = ROOT.joinpath(*package.split("."), "__init__.py").read_text()
    names = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom):
            paths = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            names += [name for name, path in paths.items() if path not in PACKAGES]
    return sorted(names, key=str.lower)


def on_config(config):
    """Links the pages into one folder, and spells out the navigation's patterns."""
    pages = Path(config.docs_dir)
    for name in SHOWN:
        (pages / name).parent.mkdir(parents=True, exist_ok=True)
        (pages / name).unlink(missing_ok=True)
        (pages / name).symlink_to(ROOT / name)
    config.nav = _spelled(config.nav)
    config.watch = [str(ROOT / name) for name in (*SHOWN, "rlkern")]
    return config


def _spelled(items: list) -> list:
    found = []
    for item in items:
        if isinstance(item, dict):
            title, below = next(iter(item.items()))
            found.append({title: _spelled(below) if isinstance(below, list) else below})
        elif item == "docs/api/*.md":
            found += [{package: f"docs/api/{package}.md"} for package in PACKAGES]
        else:
            found += sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(item))
    return found


def on_files(files, config):
    """Adds the pages of the API; drops what is no page and no link's end."""
    from mkdocs.structure.files import File

    for file in list(files):
        if file.src_uri.endswith(".py") and "/examples/" not in file.src_uri:
            files.remove(file)
    for package in PACKAGES:
        text = [
            f"# {package}",
            f"::: {package}\n    options: {{members: false, show_root_heading: false}}",
        ]
        text += [f"::: {package}.{name}" for name in public_names(package)]
        page = File.generated(config, f"docs/api/{package}.md", content="\n\n".join(text) + "\n")
        files.append(page)
    return files
