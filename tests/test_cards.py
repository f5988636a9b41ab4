"""The card and the digests beside a written checkpoint."""

import subprocess
import sys

import pytest

import deltalab.save as save
from deltalab import cards


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("cards") / "out"
    save.save(["edit=dare", "edit.p=0.25", "seed=3", f"out={out}"])
    return out


def test_the_card_says_what_was_made_of_what(written):
    text = (written / "README.md").read_text("utf-8")
    for told in ("base_model:", '- "pre.safetensors"', '- "mnist.safetensors"', "dare p=0.25 k=0",
                 "| seed | 3 |", "deltalab-apply edit=dare edit.p=0.25", "finetune"):  # fmt: skip
        assert told in text, told


def test_digests_are_what_other_tools_compute(written):
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=written, capture_output=True)
    assert done.returncode == 0, done
    assert len(done.stdout.splitlines()) == 3


def test_whatever_differs_is_named(written, tmp_path):
    import shutil

    place = tmp_path / "copy"
    shutil.copytree(written, place)
    assert cards.verify(place) == 3
    (place / "more.bin").write_bytes(b"x")
    weights = place / "mnist.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    (place / "deltalab.json").unlink()
    with pytest.raises(ValueError, match=r"deltalab.json: missing; more.bin: not in the list") as e:
        cards.verify(place)
    assert "mnist.safetensors: changed" in str(e.value)
    (place / "SHA256SUMS").write_text("nothing\n")
    with pytest.raises(ValueError, match="not a list of digests"):
        cards.verify(place)


def test_verify_is_a_command(written, tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "deltalab.save", "verify", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True)

    assert "whole, 3 files" in run(written).stdout
    assert run(tmp_path).returncode == 2
    assert "nothing to verify by" in run(tmp_path).stderr
    assert run().returncode == 2


def test_a_licence_is_kept_and_a_merge_told(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    made = cards.card({"merge": {"name": "ties", "keep": 0.2}}, ["org/a", str(tmp_path)], [])
    assert 'license: "apache-2.0"' in made
    assert 'base_model_relation: "merge"' in made
    assert "| merge | ties keep=0.2 |" in made
    assert cards.license_of("org/a") is None
