import math

from deltalab.data.text import Problems
from deltalab.judging.alpaca_eval import AlpacaEval
from deltalab.judging.judges import Endpoint
from deltalab.keys import determining
from deltalab.report.comparison import compare


def settings(path, **judge):
    return {
        "_target_": "deltalab.judging.alpaca_eval.AlpacaEval",
        "reference": str(path),
        "cache_dir": "anywhere",
        "judge": {
            "_target_": "deltalab.judging.judges.Endpoint",
            "model": "m",
            "retries": 3,
            **judge,
        },
    }


def built(path):
    return AlpacaEval(str(path), Endpoint(model="m"), "anywhere")


def test_a_key_follows_the_content_of_a_file(tmp_path):
    file = tmp_path / "a.jsonl"
    node = {"_target_": "deltalab.data.text.Problems", "path": str(file)}
    keys = []
    for text in ("one", "two", "one"):
        file.write_text(text)
        keys.append(determining({"data": node}, type("", (), {"data": Problems(str(file))})))
    assert keys[0] == keys[2] != keys[1]


def test_what_has_no_file_is_known_by_its_name():
    node = {"_target_": "deltalab.data.text.Problems", "path": "openai/gsm8k"}
    assert determining(node, Problems("openai/gsm8k")) == node


def test_a_cache_and_a_services_patience_decide_nothing(tmp_path):
    file = tmp_path / "reference.json"
    file.write_text("[]")
    one = determining(settings(file), built(file))
    two = determining({**settings(file, retries=9), "cache_dir": "elsewhere"}, built(file))
    assert one == two
    assert one != determining(settings(file, order="both"), built(file))


def test_documents_without_a_score_are_left_out_of_comparisons():
    found = compare({"m": [1.0, math.nan, 0.0]}, {"m": [0.0, 1.0, math.nan]})[0]
    assert (found.documents, found.first, found.second) == (1, 1.0, 0.0)
