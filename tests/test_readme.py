"""The README says what is so: its table is the committed one, its tree and commands exist."""

import re
import subprocess
from pathlib import Path

from experiments.readme import with_table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def pages():
    """The demo's page as it lies here, and as committed: `make demo` rewrites it with its times."""
    yield (ROOT / "results" / "demo.md").read_text()
    show = ["git", "show", "HEAD:results/demo.md"]
    yield subprocess.run(show, cwd=ROOT, capture_output=True, text=True).stdout


def test_the_demo_table_is_the_committed_one():
    assert any(with_table(README, page) == README for page in pages() if page)
    assert README.count("| mnist_vit |") > 10


def test_every_path_of_the_tree_exists():
    tree = README.split("## Where things are")[1].split("```")[1]
    names = re.findall(r"^( *)([\w/.]+)", tree, flags=re.MULTILINE)
    assert len(names) > 20
    for indent, name in names:
        assert (ROOT / ("deltalab/" if indent else "") / name).exists(), name


def test_every_picture_and_link_exists():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_every_make_target_of_the_readme_exists():
    makefile = (ROOT / "Makefile").read_text()
    artefacts = " ".join(
        re.findall(r"^(?:PAPER|STUDIES|APART|GATHERED)\s*:= (.*)", makefile, flags=re.MULTILINE)
    )
    for target in re.findall(r"(?:^|`)make (\w+)", README, flags=re.MULTILINE):
        listed = target in artefacts.split()
        assert listed or re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_the_citation_is_of_this_version():
    from omegaconf import OmegaConf

    import deltalab
    from deltalab.settings import conf_dir

    told = OmegaConf.load(conf_dir().parent / "CITATION.cff")
    assert told["version"] == deltalab.__version__
    assert told["cff-version"] == "1.2.0"
