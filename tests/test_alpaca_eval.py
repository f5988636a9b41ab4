import email.utils
import gzip
import http.server
import importlib.metadata
import importlib.util
import json
import logging
import math
import sys
import threading
import time
import types
from dataclasses import replace

import numpy as np
import pytest
import torch

from deltalab.data.text import Encoder
from deltalab.judging import (
    annotations,
    comparisons,
    decoding,
    difficulties,
    endpoint,
    generation,
    judges,
    kept,
    references,
)
from deltalab.judging.alpaca_eval import AlpacaEval
from deltalab.judging.annotations import length_controlled, win_rate
from deltalab.judging.comparisons import Asking, Comparison
from deltalab.judging.decoding import Decoding
from deltalab.judging.difficulties import Difficulty
from deltalab.judging.judges import Endpoint, Likelihood, LocalJudge
from deltalab.judging.prompts import Prompts
from deltalab.weights.mapping import ModelPair, loaded

SECRET = "sk-very-secret-0123456789"
CHAT = (
    "{% for m in messages %}<s>{{m['role']}}\n{{m['content']}}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    for name in ("DELTALAB_JUDGE_URL", "OPENAI_BASE_URL", "DELTALAB_JUDGE_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture(scope="module")
def tokenizer():
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tok = Tokenizer(models.BPE(unk_token=None))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=260,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(["a"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def llama(tokenizer, seed):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def pair(tokenizer):
    post = llama(tokenizer, 0)
    weights = {name: tensor.clone() for name, tensor in post.state_dict().items()}
    pre = {name: tensor.clone() for name, tensor in llama(tokenizer, 1).state_dict().items()}
    return ModelPair(pre, weights, post, Encoder(tokenizer, 128))


ROWS = [
    {
        "dataset": "test",
        "instruction": f"Say {'ab' * (n % 5)} {n}",
        "output": f"Answer {'x' * n}",
        "generator": "reference",
    }
    for n in range(12)
]


@pytest.fixture
def reference(tmp_path):
    path = tmp_path / "reference.json"
    path.write_text(json.dumps(ROWS))
    return str(path)


class Fake:
    """A scripted endpoint: `behave(number, body)` gives status, headers and body."""

    def __init__(self, behave):
        self.behave, self.bodies, self.keys, self.times = behave, [], [], []
        self.lock, self.now, self.most = threading.Lock(), 0, 0
        fake = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with fake.lock:
                    number = len(fake.bodies)
                    fake.bodies.append(body)
                    fake.keys.append(self.headers.get("Authorization"))
                    fake.times.append(time.monotonic())
                    fake.now += 1
                    fake.most = max(fake.most, fake.now)
                try:
                    status, headers, answer = fake.behave(number, body)
                finally:
                    with fake.lock:
                        fake.now -= 1
                if status is None:
                    self.close_connection = True
                    return
                text = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                if "Content-Length" not in headers:
                    self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *args):
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def said(first, token="m"):
    """A completion that gives the first output this probability."""
    tops = [
        {"token": "m", "logprob": math.log(first)},
        {"token": "M", "logprob": math.log1p(-first)},
    ]
    choice = {
        "message": {"content": token},
        "logprobs": {"content": [{"token": token, "top_logprobs": tops}]},
    }
    return 200, {}, {"choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": 1}}


def nonsense(text="Both are good"):
    return 200, {}, {"choices": [{"message": {"content": text}}]}


def shown_first(body):
    return body["messages"][-1]["content"].split('"m"')[1].split("----------")[1].strip()


PAIRS = [Comparison(f"do {n}", f"mine {n}", f"theirs {n}") for n in range(20)]


def ask(spec, tmp_path, pairs=PAIRS):
    return spec.open(None, Prompts(), tmp_path)(None, pairs)


def spec_of(fake, **settings):
    quick = {"backoff": 0.01, "timeout": 5.0, "retries": 3, "concurrency": 4}
    return Endpoint("judge", url=fake.url, **{**quick, **settings})


# --- win rates


def test_win_rate_is_the_mean_of_what_was_judged():
    values = np.array([1.0, 0.0, 0.25, np.nan, 0.75])
    assert win_rate(values) == pytest.approx((0.5, math.sqrt((0.5 + 0.125) / 3 / 4)), abs=1e-15)
    assert all(math.isnan(x) for x in win_rate(np.array([np.nan])))


def test_equal_lengths_leave_the_raw_win_rate():
    """Without any length effect the model is its constant, and sigmoid(c) is the mean."""
    preferences = np.random.default_rng(0).random(400)
    lengths = np.full(400, 7.0)
    value, error, spread = length_controlled(preferences, lengths, lengths)
    assert value == pytest.approx(
        preferences.mean(), abs=1e-3
    )  # the L1 penalty, at C = 1e4 or less
    assert error == pytest.approx(win_rate(preferences)[1], rel=0.1)
    assert spread == pytest.approx(0, abs=1e-12)


def test_length_control_takes_out_the_length_effect():
    """Of preferences made by sigmoid(2 tanh(d) + g - 0.5), the controlled rate is that at d = 0."""
    rng = np.random.default_rng(1)
    count = 4000
    ours, theirs = rng.integers(500, 3000, count), rng.integers(5, 1500, count)
    d = (theirs - ours) / (theirs - ours).std(ddof=1)
    hard = rng.normal(0, 1, count)
    chance = 1 / (1 + np.exp(-(-2 * np.tanh(d) + hard - 0.5)))
    wins = (rng.random(count) < chance).astype(float)
    difficulty = Difficulty(dict(enumerate(hard)), np.zeros((0, 4)))
    value, error, spread = length_controlled(wins, ours * 1.0, theirs * 1.0, difficulty)
    truth = (1 / (1 + np.exp(-(hard - 0.5)))).mean()
    assert abs(value - truth) < 3 * error < 0.06
    assert wins.mean() > truth + 0.2
    assert spread < error


def test_error_of_the_length_controlled_rate_is_that_of_a_bootstrap(monkeypatch):
    monkeypatch.setattr(annotations, "STRENGTHS", (1e4,))  # no penalty to speak of, and quick
    rng = np.random.default_rng(2)
    count = 300
    ours, theirs = rng.integers(5, 3000, count) * 1.0, rng.integers(5, 2000, count) * 1.0
    hard = rng.normal(0, 1, count)
    chance = 1 / (1 + np.exp(-(np.tanh((ours - theirs) / 900) + hard)))
    wins = (rng.random(count) < chance).astype(float)
    _, error, _ = length_controlled(
        wins, ours, theirs, Difficulty(dict(enumerate(hard)), np.zeros((0, 4)))
    )
    monkeypatch.setattr(annotations, "GROUPS", 2)  # the draws' own errors do not matter
    draws = []
    for _ in range(60):
        pick = rng.integers(0, count, count)
        again = Difficulty(dict(enumerate(hard[pick])), np.zeros((0, 4)))
        draws.append(length_controlled(wins[pick], ours[pick], theirs[pick], again)[0])
    assert np.std(draws, ddof=1) == pytest.approx(error, rel=0.3)  # 60 draws: 9 % by themselves


def test_the_error_holds_the_choice_of_instructions():
    """Where the model fits without a residual, only the instructions vary: both errors are one."""
    rng = np.random.default_rng(4)
    hard = rng.normal(0, 1, 400)
    ours, theirs = rng.integers(5, 900, 400) * 1.0, rng.integers(5, 900, 400) * 1.0
    sure = 1 / (1 + np.exp(-(1.5 * hard - 0.5)))
    difficulty = Difficulty(dict(enumerate(hard)), np.zeros((0, 4)))
    value, error, spread = length_controlled(sure, ours, theirs, difficulty)
    assert value == pytest.approx(sure.mean(), abs=2e-3)
    assert error == pytest.approx(spread, rel=0.25)  # fifty groups: 10 % by themselves
    assert spread == pytest.approx(win_rate(sure)[1], rel=0.02)


def the_package(monkeypatch):
    """Return alpaca-eval, or skip; importing it needs a module that setuptools no longer has."""
    if importlib.util.find_spec("alpaca_eval") is None:
        pytest.skip("needs alpaca-eval")
    level = logging.getLogger().level
    stand_in = types.ModuleType("pkg_resources")
    stand_in.get_distribution = importlib.metadata.distribution
    monkeypatch.setitem(sys.modules, "pkg_resources", stand_in)
    import alpaca_eval

    # the module keeps the name that it was first imported with
    monkeypatch.setattr(alpaca_eval.utils, "pkg_resources", stand_in)

    logging.getLogger().setLevel(level)  # importing it sets the root logger to INFO
    return alpaca_eval


@pytest.mark.parametrize(("wins", "most"), [(0, 0.002), (1, 0.1)])
def test_who_always_loses_has_lost(wins, most):
    """The solver behind the model does not know a label that never occurs."""
    rng = np.random.default_rng(0)
    preferences = np.zeros(60)
    preferences[:wins] = 1
    ours, theirs = rng.integers(5, 900, 60) * 1.0, rng.integers(5, 900, 60) * 1.0
    value, error, _ = length_controlled(preferences, ours, theirs)
    assert value < most
    assert error < 0.1
    assert length_controlled(1 - preferences, ours, theirs)[0] > 1 - most


@pytest.mark.parametrize("mode", ["length_controlled_minimal", "length_controlled_noreg",
                                  "length_controlled_v1"])  # fmt: skip
@pytest.mark.parametrize("weighted", [True, False])
def test_win_rates_agree_with_the_package(mode, weighted, tmp_path, monkeypatch):
    the_package(monkeypatch)
    pandas = pytest.importorskip("pandas")
    from alpaca_eval.metrics import glm_winrate

    rng = np.random.default_rng(3)
    count = 300
    ours, theirs = rng.integers(5, 3000, count), rng.integers(5, 2000, count)
    hard = rng.normal(0, 1, count)
    chance = 1 / (1 + np.exp(-(np.tanh((ours - theirs) / 900) + 0.5 * hard)))
    values = chance if weighted else (rng.random(count) < chance).astype(float)
    if weighted:
        values[::17] = np.nan
    file = tmp_path / "df_gamed.csv"
    pandas.DataFrame(
        {
            "model": np.repeat(["concise", "verbose"], count),
            "index": np.tile(np.arange(count), 2),
            "preference": rng.random(2 * count),
            "std_delta_len": rng.normal(0, 1, 2 * count),
            "instruction_difficulty": np.tile(hard, 2),
            "not_gamed_baseline": False,
        }
    ).to_csv(file, index=False)
    monkeypatch.setattr(glm_winrate, "hf_hub_download", lambda **_: str(file))
    frame = pandas.DataFrame(
        {
            "preference": values + 1,
            "output_1": ["x" * n for n in theirs],
            "output_2": ["x" * n for n in ours],
            "generator_1": "reference",
            "generator_2": "model",
        }
    )
    import sklearn

    with sklearn.config_context():
        theirs_found = glm_winrate.get_length_controlled_winrate(
            frame, glm_name=mode, save_weights_dir=None
        )
    difficulty = None
    if mode != "length_controlled_minimal":
        difficulty = difficulties.read(file, "x")
        assert len(difficulty.gamed) == 2 * count
    if mode == "length_controlled_noreg":
        difficulty = Difficulty(difficulty.of, difficulty.gamed[:0])
    found = length_controlled(values, ours * 1.0, theirs * 1.0, difficulty)
    expected = [theirs_found[k] / 100 for k in ("length_controlled_winrate", "lc_standard_error")]
    assert [found[0], found[2]] == pytest.approx(expected, abs=1e-9)
    expected = [theirs_found[k] / 100 for k in ("win_rate", "standard_error")]
    assert win_rate(values) == pytest.approx(expected, abs=1e-12)


def test_the_package_reads_what_is_exported_and_counts_the_same_wins(
    pair, reference, tmp_path, monkeypatch
):
    """The longer output wins: once judged here, once by the package on the exported file."""
    package = the_package(monkeypatch)

    def longer(texts):
        return len(texts[0]) > len(texts[1])

    class Longer:
        def open(self, pair, prompts, directory):
            def answer(asked):
                return [float(longer(m[0]["content"].split("|||")[1:])) for m in asked]

            ask = Asking("{instruction}|||{output_1}|||{output_2}")
            return lambda module, pairs: ask.preferences(pairs, answer)

    spec = AlpacaEval(reference, Likelihood(), str(tmp_path / "cache"), max_new_tokens=12)
    object.__setattr__(spec, "judge", Longer())
    found = spec.open(pair)(pair.module)
    (exported,) = (tmp_path / "cache" / "outputs").iterdir()
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "prompt.txt").write_text("{instruction}|||{output_1}|||{output_2}")
    (tmp_path / "judge" / "configs.yaml").write_text(
        "judge: {prompt_template: judge/prompt.txt, completions_kwargs: {}, batch_size: 1,"
        " fn_completion_parser: ranking_parser}"
    )

    def completions(prompts, **_):
        ranks = [1 if longer(p.split("|||")[1:]) else 2 for p in prompts]
        said = [
            str([{"model": "model_1", "rank": r}, {"model": "x", "rank": 3 - r}]) for r in ranks
        ]
        zeros = [0.0] * len(prompts)
        return {"completions": said, "price_per_example": zeros, "time_per_example": zeros}

    board, _ = package.evaluate(
        model_outputs=json.loads(exported.read_text()),
        reference_outputs=ROWS,
        annotators_config=str(tmp_path / "judge"),
        fn_completions=completions,
        output_path=None,
        precomputed_leaderboard=None,
        is_return_instead_of_print=True,
        caching_path=None,
        fn_metric="get_winrate",
        sort_by="win_rate",
    )
    (row,) = board.to_dict("records")
    assert 0 < row["win_rate"] < 100
    assert found.metrics["alpaca_eval/win_rate"] == pytest.approx(row["win_rate"] / 100)
    error = found.metrics["alpaca_eval/win_rate_error"]
    assert error == pytest.approx(row["standard_error"] / 100)
    assert round(found.metrics["alpaca_eval/mean_length"]) == pytest.approx(
        row["avg_length"], abs=1
    )


def test_difficulty_files(tmp_path):
    plain = tmp_path / "plain.csv"
    plain.write_text(",instruction_difficulty\n0,0.5\n1,-1\n")
    assert difficulties.read(plain, "x").of == {0: 0.5, 1: -1.0}
    with pytest.raises(ValueError, match="no difficulty for instruction 2"):
        difficulties.check(difficulties.read(plain, "x"), range(4), "x=y")
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="instruction_difficulty"):
        difficulties.read(wrong, "evaluator.instruction_difficulty")
    wrong.write_text("index,instruction_difficulty\n0,nan\n")
    with pytest.raises(ValueError, match="not numbers"):
        difficulties.read(wrong, "x")


# --- what is asked, and what an answer says


def test_orders_average_to_the_preference_and_hash_from_the_seed():
    def biased(prompts):  # 0.2 for the first place, whatever is there
        firsts = [shown_first({"messages": p}) for p in prompts]
        return [0.7 + 0.2 if text.startswith("mine") else 0.3 + 0.2 for text in firsts]

    both = Asking(order="both").preferences(PAIRS, biased)
    assert both == pytest.approx(0.7)
    once = Asking(seed=0).preferences(PAIRS, biased)
    assert {round(float(x), 6) for x in once} == {0.9, 0.5}
    assert (once == Asking(seed=0).preferences(PAIRS[::-1], biased)[::-1]).all()
    assert (once != Asking(seed=1).preferences(PAIRS, biased)).any()


def test_equal_outputs_are_a_tie_and_no_verdict_is_none():
    pairs = [Comparison("a", "same", "same"), Comparison("b", "x", "y")]
    asked = []

    def answer(prompts):
        asked.extend(prompts)
        return [None] * len(prompts)

    found = Asking(order="both").preferences(pairs, answer)
    assert found[0] == 0.5
    assert math.isnan(found[1])
    assert len(asked) == 2


def test_braces_in_outputs_are_left_alone():
    made = Asking().messages(Comparison("say {output_2}", "{instruction}", "{x}"), False)
    assert [m["role"] for m in made] == ["system", "user"]
    assert "say {output_2}" in made[1]["content"]
    assert "{instruction}" in made[1]["content"]
    assert "{x}" in made[1]["content"]


def test_a_template_without_sections_is_the_users(tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("{instruction}: {output_1} or {output_2}?")
    made = comparisons.how_to_ask(str(file), "both", 0).messages(Comparison("i", "o", "r"), True)
    assert made == [{"role": "user", "content": "i: o or r?"}]
    file.write_text("{instruction}")
    with pytest.raises(ValueError, match=r"lacks \{output_1\}"):
        comparisons.how_to_ask(str(file), "both", 0)
    with pytest.raises(ValueError, match="order=once"):
        comparisons.how_to_ask(None, "once", 0)
    with pytest.raises(FileNotFoundError, match="template=nowhere"):
        comparisons.how_to_ask("nowhere", "random", 0)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (said(0.25)[2]["choices"][0], 0.25),
        ({"message": {"content": " M.\n"}}, 0.0),
        ({"message": {"content": "`m`"}, "logprobs": None}, 1.0),
        ({"message": {"content": "Both"}}, None),
        ({"message": {"content": None}}, None),
        ({"message": "m"}, None),
        ({}, None),
        ({"message": {"content": "m"}, "logprobs": {"content": [{"token": "m"}]}}, 1.0),
        (
            {
                "message": {"content": "Both"},
                "logprobs": {
                    "content": [
                        {"token": "Both", "top_logprobs": [{"token": "M", "logprob": -3.0}]}
                    ]
                },
            },
            0.0,
        ),
    ],
)
def test_verdicts(choice, expected):
    found = comparisons.verdict(choice)
    assert found == (None if expected is None else pytest.approx(expected))


# --- the endpoint


def test_verdicts_are_weighted_and_kept(tmp_path):
    def judge(number, body):
        return said(0.8 if shown_first(body).startswith("mine") else 0.2)

    with Fake(judge) as fake:
        found = ask(spec_of(fake), tmp_path)
        assert found == pytest.approx(0.8)
        assert len(fake.bodies) == len(PAIRS)
        assert fake.bodies[0]["top_logprobs"] == 5
        assert fake.keys == [None] * len(PAIRS)
        ask(spec_of(fake), tmp_path)
        assert len(fake.bodies) == len(PAIRS)
        ask(spec_of(fake), tmp_path, [*PAIRS, Comparison("new", "mine", "theirs")])
        assert len(fake.bodies) == len(PAIRS) + 1
        ask(spec_of(fake, options={"seed": 7, "temperature": None}), tmp_path)
        assert len(fake.bodies) == 2 * len(PAIRS) + 1
        assert fake.bodies[-1]["seed"] == 7
        assert "temperature" not in fake.bodies[-1]


def test_concurrency_is_bounded_and_used(tmp_path):
    def slow(number, body):
        time.sleep(0.02)
        return said(0.5)

    with Fake(slow) as fake:
        ask(spec_of(fake, concurrency=3), tmp_path)
        assert fake.most == 3


def test_what_fails_for_a_while_is_tried_again(tmp_path):
    """Every kind of failure once, each on another request; nothing is lost, nothing asked twice."""
    troubles = [
        (500, {}, b"oops"),
        (503, {}, {"error": {"message": "overloaded"}}),
        (429, {"Retry-After": "0.05"}, {"error": "slow down"}),
        (429, {"Retry-After": email.utils.formatdate(time.time() - 5)}, b""),
        (None, {}, b""),  # the connection ends without an answer
        (200, {}, b"<html>a proxy's page</html>"),
        (200, {}, {"choices": []}),
        (200, {"Content-Length": "500"}, b'{"choices": ['),  # half an answer
    ]
    seen, lock = {}, threading.Lock()

    def flaky(number, body):
        key = json.dumps(body["messages"])
        with lock:
            seen[key] = seen.get(key, 0) + 1
            if seen[key] == 1 and troubles and number:
                return troubles.pop()
        return said(0.5)

    with Fake(flaky) as fake:
        found = ask(spec_of(fake), tmp_path)
        assert found == pytest.approx(0.5)
        assert not troubles
        assert len(fake.bodies) == len(PAIRS) + 8


def test_a_stalling_endpoint_is_given_up_and_the_run_goes_on_later(tmp_path):
    gate = threading.Event()

    def stall(number, body):
        if number == 3 and not gate.is_set():
            time.sleep(0.6)
        return said(0.5)

    with Fake(stall) as fake:
        found = ask(spec_of(fake, timeout=0.3), tmp_path)
        assert found == pytest.approx(0.5)
        assert len(fake.bodies) == len(PAIRS) + 1

    def dribble(number, body):
        return 200, {"Content-Length": "100000"}, b"{"

    with Fake(dribble) as fake, pytest.raises(OSError, match="no answer after"):
        ask(spec_of(fake, timeout=0.2, retries=1), tmp_path / "other", PAIRS[:1])


def test_threads_wait_together_as_long_as_the_endpoint_asks(tmp_path):
    full, sent = threading.Event(), []

    def limited(number, body):
        if number == 3:
            full.set()
        full.wait(5)
        if number == 0:  # refused while three others are under way, which take longer
            sent.append(time.monotonic())
            return 429, {"Retry-After": "0.8"}, b""
        time.sleep(0.4 if number < 4 else 0)
        return said(0.5)

    with Fake(limited) as fake:
        ask(spec_of(fake, concurrency=4), tmp_path)
        assert len(fake.bodies) == len(PAIRS) + 1
        assert min(fake.times[4:]) - sent[0] >= 0.79  # though only one request was refused
    with Fake(lambda n, b: (429, {"Retry-After": "7200"}, b"")) as fake:
        start = time.monotonic()
        with pytest.raises(OSError, match="asks to wait 7200 s"):
            ask(spec_of(fake), tmp_path / "other")
        assert time.monotonic() - start < 2


def test_an_endpoint_that_dies_half_way_loses_nothing(tmp_path):
    def dying(number, body):
        return said(0.5) if number < 8 else (503, {}, b"gone")

    with Fake(dying) as fake, pytest.raises(OSError, match="503"):
        ask(spec_of(fake, retries=1), tmp_path)
    assert len(list(tmp_path.rglob("*.json"))) == 8
    with Fake(lambda n, b: said(0.5)) as fake:
        assert ask(spec_of(fake), tmp_path) == pytest.approx(0.5)
        assert len(fake.bodies) == len(PAIRS) - 8


def test_an_unreachable_endpoint_is_one_line(tmp_path):
    with Fake(lambda n, b: said(0.5)) as fake:
        spec = spec_of(fake)
    with pytest.raises(OSError, match=r"judge at http://127.0.0.1:\d+/v1: no answer after 3 tries"):
        ask(spec, tmp_path)


def test_nonsense_is_asked_again_then_missing_and_never_a_tie(tmp_path):
    def foolish(number, body):
        return nonsense() if "do 3\n" in body["messages"][-1]["content"] else said(0.5)

    with Fake(foolish) as fake:
        found = ask(spec_of(fake, attempts=3), tmp_path)
        assert [n for n, x in enumerate(found) if math.isnan(x)] == [3]
        assert len(fake.bodies) == len(PAIRS) + 2
        ask(spec_of(fake), tmp_path)
        assert len(fake.bodies) == len(PAIRS) + 2
        ask(spec_of(fake, ask_again=True, attempts=1), tmp_path)
        assert len(fake.bodies) == len(PAIRS) + 3
    with Fake(lambda n, b: nonsense()) as fake, pytest.raises(ValueError, match="nonsense"):
        ask(spec_of(fake, attempts=1), tmp_path / "other")


def test_a_refused_prompt_is_missing_and_a_refused_request_an_error(tmp_path):
    refusal = (400, {}, {"error": {"message": "context length exceeded"}})

    def picky(number, body):
        return refusal if "do 3\n" in body["messages"][-1]["content"] else said(0.5)

    with Fake(picky) as fake:
        found = ask(spec_of(fake), tmp_path)
        assert [n for n, x in enumerate(found) if math.isnan(x)] == [3]
        assert len(fake.bodies) == len(PAIRS)
    with Fake(lambda n, b: refusal) as fake:
        with pytest.raises(ValueError, match="context length exceeded"):
            ask(spec_of(fake, concurrency=1), tmp_path / "other")
        assert len(fake.bodies) == 5


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (401, {"error": {"message": f"wrong key {SECRET}"}}, "DELTALAB_JUDGE_KEY"),
        (404, {"error": {"message": "no such model"}}, "no such model; are evaluator.judge.url"),
        (302, b"", "HTTP 302"),
        (429, {"error": {"message": "pay", "code": "insufficient_quota"}}, "429 pay"),
    ],
)
def test_what_will_not_pass_is_not_tried_again(status, body, message, tmp_path, monkeypatch):
    monkeypatch.setenv("DELTALAB_JUDGE_KEY", SECRET)
    headers = {"Location": "http://127.0.0.1:9/"} if status == 302 else {}
    with Fake(lambda n, b: (status, headers, body)) as fake:
        monkeypatch.setenv("DELTALAB_JUDGE_URL", fake.url)
        with pytest.raises(ValueError, match=message) as caught:
            ask(spec_of(fake, concurrency=1), tmp_path)
        assert SECRET not in str(caught.value)
        assert len(fake.bodies) == 1


def test_the_key_is_sent_and_is_nowhere_else(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("DELTALAB_JUDGE_KEY", SECRET)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-openai-0123456789")

    def telling(number, body):
        return nonsense(f"your key is {SECRET}") if number == 0 else said(0.5)

    with Fake(telling) as fake:
        monkeypatch.setenv("DELTALAB_JUDGE_URL", fake.url)
        spec = spec_of(fake, attempts=1, concurrency=1)
        ask(spec, tmp_path)
        assert set(fake.keys) == {f"Bearer {SECRET}"}
    held = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert b"your key is ***" in held
    for place in (held.decode(), caplog.text, repr(spec)):
        assert SECRET not in place


def test_a_short_key_is_blotted_out_too():
    client = endpoint.Client("http://x", "k3y", 1, 1, 1, 1)
    assert client.clean("a k3y") == "a ***"


def test_a_key_goes_to_the_address_that_the_environment_names_for_it(tmp_path, monkeypatch, caplog):
    """On the code before, DELTALAB_JUDGE_KEY went to any address that a config named."""
    ours, openai = "our-key-0123456789", "sk-of-openai-0123456789"
    keys = {"DELTALAB_JUDGE_KEY": ours, "OPENAI_API_KEY": openai}
    with Fake(lambda n, b: said(0.5)) as fake, Fake(lambda n, b: said(0.5)) as other:

        def sent(url, **environment):
            for name in ("DELTALAB_JUDGE_URL", "OPENAI_BASE_URL", *keys):
                monkeypatch.delenv(name, raising=False)
            for name, value in {**keys, **environment}.items():
                if value:
                    monkeypatch.setenv(name, value)
            fake.keys.clear()
            folder = tmp_path / str(len(list(tmp_path.iterdir())))
            ask(replace(spec_of(fake), url=url), folder, PAIRS[:1])
            return fake.keys[0]

        assert sent(fake.url) is None
        assert "DELTALAB_JUDGE_KEY is not sent to an address that only a config" in caplog.text
        assert sent(fake.url, DELTALAB_JUDGE_URL=other.url) is None
        assert sent(fake.url + "/", DELTALAB_JUDGE_URL=fake.url) == f"Bearer {ours}"
        assert sent(None, DELTALAB_JUDGE_URL=fake.url) == f"Bearer {ours}"
        assert sent(None, DELTALAB_JUDGE_URL=fake.url, DELTALAB_JUDGE_KEY="") is None
        assert sent(None, OPENAI_BASE_URL=fake.url, DELTALAB_JUDGE_KEY="") == f"Bearer {openai}"
        assert sent(None, OPENAI_BASE_URL=fake.url) == f"Bearer {ours}"
        assert sent(fake.url, OPENAI_BASE_URL=fake.url, DELTALAB_JUDGE_URL=other.url) == (
            f"Bearer {openai}"
        )
        assert not other.bodies


@pytest.mark.parametrize(
    "settings",
    [{"model": SECRET}, {"options": {"user": f"me {SECRET}"}}, {"options": {"a": {SECRET: [1]}}}],
    ids=["model", "value", "name"],
)
def test_no_secret_leaves_in_a_body(settings, tmp_path, monkeypatch):
    """On the code before, evaluator.judge.model=${oc.env:OPENAI_API_KEY} sent it."""
    monkeypatch.setenv("SOME_TOKEN", SECRET)
    with Fake(lambda n, b: said(0.5)) as fake:
        with pytest.raises(ValueError, match="would hold what SOME_TOKEN holds; not s") as caught:
            ask(replace(spec_of(fake), **settings), tmp_path)
        with pytest.raises(ValueError, match="must not hold what SOME_TOKEN holds"):
            Endpoint("judge", url=f"http://evil/{SECRET}")
        assert SECRET not in str(caught.value)
        assert not fake.bodies


def test_a_prompt_with_a_secret_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", PAIRS[3].reference)
    with Fake(lambda n, b: said(0.5)) as fake:
        found = ask(spec_of(fake), tmp_path)
        assert [n for n, x in enumerate(found) if math.isnan(x)] == [3]
        assert len(fake.bodies) == len(PAIRS) - 1


def test_a_budget_is_kept(tmp_path, caplog):
    prices = {"price_in": 10.0, "price_out": 30.0}
    with Fake(lambda n, b: said(0.5)) as fake:
        with pytest.raises(ValueError, match=r"max_cost=0.001: 20 verdicts would cost about \$0.0"):
            ask(spec_of(fake, max_cost=0.001, **prices), tmp_path)
        assert not fake.bodies
        ask(spec_of(fake, **prices), tmp_path)
    assert "asking for 20 of 20 verdicts" in caplog.text
    assert "2,000 tokens in, 20 out, $0.02" in caplog.text

    def costly(number, body):
        status, headers, answer = said(0.5)
        return status, headers, {**answer, "usage": {"prompt_tokens": 10_000}}

    with Fake(costly) as fake, pytest.raises(ValueError, match=r"used up, \$0.20 spent"):
        ask(spec_of(fake, max_cost=0.15, concurrency=1, **prices), tmp_path / "other")
    assert len(list((tmp_path / "other").rglob("*.json"))) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"concurrency": 0}, "concurrency=0: must be at least 1"),
        ({"timeout": 0.0}, "timeout=0.0: must be above 0"),
        ({"url": "localhost:8000"}, "must be an address as https://host/v1"),
        ({"url": "http://me:pw@host/v1"}, "must not hold a user or password"),
        ({"max_cost": 1.0}, "needs price_in and price_out"),
        ({"order": "once"}, "must be random or both"),
        ({"model": ""}, "name the judge"),
    ],
)
def test_wrong_settings_of_an_endpoint(settings, message):
    with pytest.raises(ValueError, match=message):
        Endpoint(**{"model": "judge", **settings})


def test_openai_without_a_key_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="set OPENAI_API_KEY"):
        Endpoint("gpt").open(None, Prompts(), tmp_path)


def test_retry_after():
    when = email.utils.formatdate(time.time() + 60, usegmt=True)
    assert endpoint._retry_after({"Retry-After": when}) == pytest.approx(60, abs=2)
    assert endpoint._retry_after({"Retry-After": "1.5"}) == 1.5
    for odd in ("soon", "nan", ""):
        assert endpoint._retry_after({"Retry-After": odd}) is None


# --- generation


def generate(pair, tmp_path, prompts, batch_size=4, **settings):
    settings = {"max_new_tokens": 8, **settings}
    return generation.outputs(
        pair.module, pair.transform, prompts, Decoding(**settings), batch_size, tmp_path,
        generation.digest(pair.module),
    )  # fmt: skip


def ids_of(pair, texts):
    return [Prompts().ids(pair.transform, text) for text in texts]


TEXTS = [row["instruction"] for row in ROWS]


def test_greedy_outputs_are_the_models_own(pair, tmp_path):
    prompts = ids_of(pair, TEXTS)
    found = generate(pair, tmp_path, prompts)
    for ids, output in zip(prompts, found, strict=True):
        tokens = list(ids)
        for _ in range(8):
            with torch.inference_mode():
                tokens.append(int(pair.module(torch.tensor([tokens])).logits[0, -1].argmax()))
            if tokens[-1] == pair.transform.tokenizer.eos_token_id:
                break
        ended = tokens[-1] == pair.transform.tokenizer.eos_token_id
        text = pair.transform.tokenizer.decode(tokens[len(ids) :], skip_special_tokens=True)
        assert output == generation.Output(text.strip(), len(tokens) - len(ids) - ended, ended)


def test_sampled_outputs_depend_on_neither_batch_nor_resume(pair, tmp_path, monkeypatch):
    prompts = ids_of(pair, TEXTS)
    how = {"temperature": 1.0, "top_p": 0.9, "max_new_tokens": 5}
    whole = generate(pair, tmp_path / "a", prompts, **how)
    assert whole == generate(pair, tmp_path / "b", prompts, batch_size=1, **how)
    assert whole[::-1] == generate(pair, tmp_path / "c", prompts[::-1], batch_size=5, **how)
    assert whole != generate(pair, tmp_path / "d", prompts, seed=1, **how)
    assert len({output.text for output in whole}) > 10

    calls, real = [], type(pair.module).generate

    def killed(self, *args, **kwargs):
        calls.append(len(args[0]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(type(pair.module), "generate", killed)
    with pytest.raises(KeyboardInterrupt):
        generate(pair, tmp_path / "e", prompts, **how)
    file = next((tmp_path / "e").iterdir())
    with open(file, "a") as handle:
        handle.write('{"prompt": "torn')  # a line half written when the process died
    assert whole == generate(pair, tmp_path / "e", prompts, **how)
    assert calls == [4, 4, 4, 4]
    assert whole == generate(pair, tmp_path / "e", prompts, **how)
    assert len(calls) == 4


def test_two_models_never_share_outputs(pair, tmp_path):
    prompts = ids_of(pair, TEXTS)
    post = generate(pair, tmp_path, prompts)
    edited = {"lm_head.weight": pair.post["lm_head.weight"].clone()}
    edited["lm_head.weight"][5, 3] += 1e-6
    before = generation.digest(pair.module)
    with loaded(pair.module, edited, restore=pair.post):
        assert generation.digest(pair.module) != before
    with loaded(pair.module, pair.pre, restore=pair.post):
        assert generate(pair, tmp_path, prompts) != post
    assert generation.digest(pair.module) == before
    assert len(list(tmp_path.iterdir())) == 2


def test_draws_follow_the_softmax():
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    names = [f"prompt {n}" for n in range(4000)]
    (draw,) = decoding.sampler(Decoding(temperature=2.0, top_p=0.95), names, 3)
    tokens = draw(torch.zeros(4000, 5), logits.expand(4000, -1)).argmax(-1)
    expected = (logits / 2).exp() / (logits / 2).exp().sum()
    shares = torch.bincount(tokens, minlength=4) / 4000
    assert (shares - expected).abs().max() < 4 * 0.5 / math.sqrt(4000)
    later = draw(torch.zeros(4000, 6), logits.expand(4000, -1)).argmax(-1)
    same = float((tokens == later).double().mean())  # independent from one position to the next
    assert abs(same - float((expected**2).sum())) < 4 * 0.5 / math.sqrt(4000)
    (draw,) = decoding.sampler(Decoding(temperature=1.0, top_p=0.5), names, 3)
    assert draw(torch.zeros(4000, 5), logits.expand(4000, -1)).argmax(-1).max() == 0


def test_a_checkpoints_own_decoding_does_not_join_in(pair, tmp_path):
    prompts = ids_of(pair, TEXTS)
    plain = generate(pair, tmp_path / "a", prompts)
    own = pair.module.generation_config
    try:
        own.repetition_penalty, own.do_sample, own.max_length = 5.0, True, 14
        assert generate(pair, tmp_path / "b", prompts) == plain
        assert pair.module.generation_config is own
        own.eos_token_id = [pair.transform.tokenizer.eos_token_id, 40]
        assert generation.end_tokens(pair.module, pair.transform)[1:] == [40]
    finally:
        own.repetition_penalty, own.do_sample, own.max_length = None, False, None
        own.eos_token_id = pair.transform.tokenizer.eos_token_id


def test_long_prompts_get_what_is_left_of_the_context(pair, tmp_path):
    prompts = ids_of(pair, ["a" * 50, "b" * 126, "c" * 120])
    found = generate(pair, tmp_path, prompts, max_new_tokens=12)
    assert found[1].tokens <= 2
    assert found[2].tokens <= 8
    with pytest.raises(ValueError, match="instruction 1 has 128 tokens, the model's context 128"):
        generate(pair, tmp_path, ids_of(pair, ["a", "b" * 128]))


def test_prompts(tokenizer):
    plain = Encoder(tokenizer, 64)
    ids = Prompts("Q: {instruction}\nA:").ids(plain, "1+1")
    assert tokenizer.decode(ids) == "Q: 1+1\nA:"
    with pytest.raises(ValueError, match="must contain"):
        Prompts("Q:")
    with pytest.raises(ValueError, match="no chat template"):
        Prompts(chat=True).check(plain)
    with pytest.raises(ValueError, match="no chat template"):
        Prompts().check(Encoder(tokenizer, 64, chat=True))
    tokenizer.chat_template = CHAT
    try:
        ids = Prompts(chat=True).ids(plain, "1+1")
        assert tokenizer.decode(ids) == "<s>user\n1+1</s>\n<s>assistant\n"
    finally:
        tokenizer.chat_template = None


@pytest.mark.parametrize("settings", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}])
def test_wrong_decoding(settings):
    with pytest.raises(ValueError, match=f"evaluator.{next(iter(settings))}="):
        Decoding(**settings)


# --- judges on this machine


def log_p(module, ids, answer):
    with torch.inference_mode():
        chances = module(torch.tensor([ids + answer])).logits[0].double().log_softmax(-1)
    return sum(float(chances[len(ids) - 1 + n, token]) for n, token in enumerate(answer))


@pytest.mark.parametrize("per_token", [True, False])
def test_likelihood_is_the_pairs_implicit_reward(pair, tmp_path, per_token):
    pairs = [Comparison("say a", "aaa", "b"), Comparison("say bb", "x", "yyyy y")]
    spec = Likelihood(scale=0.5, per_token=per_token, batch_size=3)
    judge = spec.open(pair, Prompts(), tmp_path)
    edited = {name: tensor * 1.01 for name, tensor in pair.post.items()}
    with loaded(pair.module, edited, restore=pair.post):
        found = judge(pair.module, pairs)
        for name, tensor in pair.module.state_dict().items():
            assert torch.equal(tensor, edited[name]), name
    tokenizer = pair.transform.tokenizer
    for comparison, preference in zip(pairs, found, strict=True):
        ids = tokenizer(comparison.instruction)["input_ids"]
        reward = 0.0
        for text, sign in ((comparison.output, 1), (comparison.reference, -1)):
            answer = [*tokenizer(f" {text}")["input_ids"], tokenizer.eos_token_id]
            share = sign / (len(answer) if per_token else 1)
            reward += share * log_p(pair.module, ids, answer)
            with loaded(pair.module, pair.pre, restore=pair.post):
                reward -= share * log_p(pair.module, ids, answer)
        assert preference == pytest.approx(1 / (1 + math.exp(-0.5 * reward)), abs=1e-5)


def test_local_judges(pair, tokenizer, tmp_path):
    directory = tmp_path / "judge"
    model = llama(tokenizer, 7)
    model.config.max_position_embeddings = 4096  # deltalab's prompt is longer than the pair's
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    pairs = [*PAIRS[:5], Comparison("long", "x" * 4000, "y" * 100)]
    settings = {"device": "cpu", "dtype": "float32"}
    spec = LocalJudge(str(directory), batch_size=2, **settings)
    found = ask(spec, tmp_path, pairs)
    assert math.isnan(found[5])
    for comparison, preference in zip(pairs[:5], found, strict=False):
        (swapped,) = Asking()._orders(comparison.instruction)
        text = "\n\n".join(m["content"] for m in Asking().messages(comparison, swapped)) + "\n"
        with torch.inference_mode():
            logits = model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1].double()
        chances = logits.softmax(-1)
        m, capital = (float(chances[tokenizer.convert_tokens_to_ids(x)]) for x in "mM")
        first = m / (m + capital)
        assert preference == pytest.approx(first if swapped else 1 - first, abs=1e-5)
    held = len(list((tmp_path / "verdicts").rglob("*.json")))
    assert held == 5
    named = Likelihood(path=str(directory), **settings).open(pair, Prompts(), tmp_path)
    assert ((named(pair.module, pairs[:2]) > 0) & (named(pair.module, pairs[:2]) < 1)).all()
    with pytest.raises(ValueError, match="judge.path=nowhere-at-all: cannot be opened"):
        LocalJudge("nowhere-at-all").open(pair, Prompts(), tmp_path)


# --- files and the evaluator


def test_reference_files(tmp_path):
    packed = tmp_path / "rows.json.gz"
    packed.write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    assert [row.instruction for row in references.read(packed)] == TEXTS
    file = tmp_path / "rows.json"
    for content, message in [
        ("[]", "holds no instructions"),
        ("{}", "holds no instructions"),
        ("nonsense", "not a JSON file"),
        ('[{"output": "x"}]', "row 0 has no text 'instruction'"),
        ('[{"instruction": "x", "output": 3}]', "row 0 has no text 'output'"),
        ('[{"instruction": " ", "output": "a"}]', "instruction of row 0 is empty"),
        ('[{"instruction": "x", "output": "a"}, 3]', "row 1 is not a mapping"),
        (json.dumps([ROWS[0], ROWS[1], ROWS[0]]), "rows 0 and 2 have one instruction"),
    ]:
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            references.read(file)
    packed.write_bytes(b"no gzip")
    with pytest.raises(OSError, match="cannot be read"):
        references.read(packed)
    with pytest.raises(FileNotFoundError, match="evaluator.reference=nowhere"):
        references.read("nowhere")


def test_lines_by_several_writers(tmp_path):
    file = tmp_path / "sub" / "lines.jsonl"
    writers = [
        threading.Thread(
            target=lambda n=n: [kept.add_lines(file, [{"n": n, "k": k}]) for k in range(20)]
        )
        for n in range(4)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    found = [(row["n"], row["k"]) for row in kept.lines(file)]
    assert sorted(found) == [(n, k) for n in range(4) for k in range(20)]


def test_the_evaluator_generates_exports_and_judges(pair, reference, tmp_path):
    spec = AlpacaEval(
        reference, Likelihood(), str(tmp_path / "cache"), limit=8, batch_size=4, max_new_tokens=6
    )
    assert hash(spec) == hash(replace(spec))
    score = spec.open(pair)
    post = score(pair.module)
    with loaded(pair.module, pair.pre, restore=pair.post):
        pre = score(pair.module)
    metrics, values = post.metrics, post.documents["alpaca_eval/preference"]
    assert values.shape == (8,)
    assert metrics["alpaca_eval/win_rate"] == pytest.approx(float(values.mean()))
    error = float(values.std() / math.sqrt(8))
    assert metrics["alpaca_eval/win_rate_error"] == pytest.approx(error)
    assert metrics["alpaca_eval/judged"] == 8
    assert metrics["alpaca_eval/missing"] == 0
    assert 0 < metrics["alpaca_eval/length_controlled_win_rate"] < 1
    # the pair's own reward prefers what post says to what pre says
    assert metrics["alpaca_eval/win_rate"] > pre.metrics["alpaca_eval/win_rate"]
    exported = [json.loads(p.read_text()) for p in (tmp_path / "cache" / "outputs").iterdir()]
    assert len(exported) == 2
    assert set(exported[0][0]) == {"dataset", "instruction", "output", "generator"}
    assert [row["instruction"] for row in exported[0]] == TEXTS[:8]
    mean = np.mean([len(row["output"]) for row in exported[0]])
    assert mean in (metrics["alpaca_eval/mean_length"], pre.metrics["alpaca_eval/mean_length"])
    annotated = [json.loads(p.read_text()) for p in (tmp_path / "cache" / "annotations").iterdir()]
    rates = sorted(np.mean([row["preference"] for row in rows]) - 1 for rows in annotated)
    known = sorted(s.metrics["alpaca_eval/win_rate"] for s in (pre, post))
    assert rates == pytest.approx(known)


def test_a_point_whose_judge_fails_keeps_its_outputs(pair, reference, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    with Fake(lambda n, b: said(0.5) if n < 5 else (500, {}, b"")) as fake:
        spec = AlpacaEval(reference, spec_of(fake, retries=0), str(cache), max_new_tokens=9)
        with pytest.raises(OSError, match="judge at"):
            spec.open(pair)(pair.module)

    def never(*args, **kwargs):
        raise AssertionError("generated again")

    monkeypatch.setattr(generation, "_generate", never)
    with Fake(lambda n, b: nonsense() if n == 2 else said(0.75)) as fake:
        spec = replace(spec, judge=spec_of(fake, attempts=1))
        found = spec.open(pair)(pair.module)
        assert len(fake.bodies) == len(ROWS) - 5
    assert found.metrics["alpaca_eval/missing"] == 1
    assert found.metrics["alpaca_eval/judged"] == len(ROWS) - 1
    assert int(found.documents["alpaca_eval/preference"].isnan().sum()) == 1


def test_what_does_not_serve_is_refused_on_opening(pair, reference, tmp_path):
    spec = AlpacaEval(reference, Likelihood(), str(tmp_path))
    with pytest.raises(ValueError, match="needs a language model"):
        spec.open(ModelPair(pair.pre, pair.post, pair.module))
    with pytest.raises(ValueError, match="no chat template"):
        replace(spec, chat=True).open(pair)
    with pytest.raises(ValueError, match="limit=0"):
        replace(spec, limit=0)
    with pytest.raises(ValueError, match="evaluator/judge=endpoint, local"):
        replace(spec, judge=Prompts())
    file = tmp_path / "hard.csv"
    file.write_text("index,instruction_difficulty\n0,1.0\n")
    with pytest.raises(ValueError, match="no difficulty for instruction 1"):
        replace(spec, instruction_difficulty=str(file)).open(pair)
    assert replace(spec, instruction_difficulty=str(file), limit=1).open(pair)


@pytest.mark.parametrize("judge", ["endpoint", "local", "likelihood"])
def test_configs_compose(judge, monkeypatch):
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from deltalab import settings
    from deltalab.run import building

    monkeypatch.setenv("DELTALAB_JUDGE_MODEL", "my-judge")
    with initialize_config_dir(str(settings.conf_dir()), version_base="1.3"):
        config = compose(
            "config",
            [
                "evaluator=alpaca_eval",
                "evaluator.reference=x.json",
                f"evaluator/judge={judge}",
                *(["evaluator.judge.path=x"] if judge == "local" else []),
            ],
        )
    node = OmegaConf.to_container(config.evaluator, resolve=True)
    spec = building.build(node, "evaluator")
    assert isinstance(spec, AlpacaEval)
    assert spec.cache_dir == "results/alpaca_eval"
    kinds = {"endpoint": Endpoint, "local": LocalJudge, "likelihood": Likelihood}
    assert isinstance(spec.judge, kinds[judge])
    assert hash(spec) is not None
    if judge == "endpoint":
        assert spec.judge.model == "my-judge"
        node["judge"]["options"] = {"seed": 3}
        assert building.build(node, "evaluator").judge.options == '{"seed": 3}'


def test_judges_name_openais_address():
    assert endpoint.address(judges.OPENAI, "x") == judges.OPENAI
