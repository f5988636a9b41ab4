"""Task files from a directory of the user's: data, unless the Python in them is allowed."""

import contextlib
import json

import pytest

pytest.importorskip("lm_eval")

from deltalab.evaluators.lm import code as lm_code
from deltalab.evaluators.lm import requests
from deltalab.evaluators.lm import tasks as lm_tasks
from deltalab.evaluators.lm_eval import LmEval
from deltalab.store import latest

TASK = {
    "task": "mine",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "Question: {{question}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 2},
    "metric_list": [{"metric": "exact_match"}],
}


@pytest.fixture
def place(tmp_path):
    """A directory of task files with Python that leaves a trace; returns it and the trace."""
    canary = tmp_path / "canary"
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"question": "1+1=", "answer": "2"}) + "\n")
    directory = tmp_path / "tasks"
    (directory / "below").mkdir(parents=True)
    code = f"open({str(canary)!r}, 'w')\ndef d(doc):\n    return doc['question']\n"
    code += "class Own:\n    def __init__(self, config):\n        pass\n"
    for where in (directory, directory / "below", tmp_path):
        (where / "utils.py").write_text(code)
    latest.forget()
    yield directory, canary
    latest.forget()


def write(directory, name="mine", raw="", **changes):
    import yaml

    files = {"dataset_kwargs": {"data_files": {"test": str(directory.parent / "rows.jsonl")}}}
    text = yaml.safe_dump({**TASK, **files, **changes})
    file = directory / f"{name}.yaml"
    file.write_text(text.replace("'@", "").replace("@'", "") + raw)


def load(directory, *tasks, **settings):
    runs = lm_tasks.load(LmEval(tasks or ("mine",), include=(str(directory),), **settings))
    return [requests.prepare(run, None, True, 0) for run in runs]


FUNCTION = "@!function utils.d@"


def direct(directory):
    write(directory, doc_to_text=FUNCTION)


def chained(directory):
    write(directory.parent, "base", doc_to_text=FUNCTION)
    write(directory / "below", "middle", include="../../base.yaml")
    text = "include: below/middle.yaml\ntask: mine\ndoc_to_text: 'x'\n"
    (directory / "mine.yaml").write_text(text)


def nested(directory):
    write(directory, fewshot_config={"sampler": "first_n", "process_docs": FUNCTION})


def own_class(directory):
    write(directory, raw="class: !function utils.Own\n")


def of_a_group(directory):
    write(directory / "below", "leaf", task="leaf", process_docs=FUNCTION)
    (directory / "mine.yaml").write_text("group: mine\ntask: [leaf]\n")


def within_a_group(directory):
    (directory / "mine.yaml").write_text(
        "group: mine\ntask: [{task: leaf, process_docs: !function utils.d}]\n"
    )
    write(directory, "leaf", task="leaf")


def of_a_tag(directory):
    write(directory, "leaf", task="leaf", tag="mine", doc_to_target=FUNCTION)


def script_of_a_metric(directory):
    (directory / "evil.py").write_text((directory / "utils.py").read_text())
    write(directory, metric_list=[{"metric": str(directory / "evil.py")}])


def script_of_the_hub(directory):
    write(directory, metric_list=[{"metric": "exact_match", "hf_evaluate": True}])


def pickles(directory):
    write(directory, dataset_path="pandas")


WAYS = [direct, chained, nested, own_class, of_a_group, within_a_group, of_a_tag,
        script_of_a_metric, script_of_the_hub, pickles]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_python_of_task_files_is_refused_and_does_not_run(place, way):
    """On the code before, each of these ran Python of the directory without a word."""
    directory, canary = place
    way(directory)
    with pytest.raises(ValueError, match="run_task_code=false: .* would run Python") as caught:
        load(directory)
    assert not canary.exists()
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("evaluator.tasks.mine: ")


def test_python_of_task_files_runs_when_allowed(place):
    directory, canary = place
    direct(directory)
    (run,) = load(directory, run_task_code=True)
    assert canary.exists()
    assert run.requests["mine"][0].args[0] == "1+1="


def test_a_task_of_data_alone_needs_no_permission(place):
    directory, canary = place
    write(directory)
    (run,) = load(directory)
    assert run.requests["mine"][0].args[0] == "Question: 1+1="
    assert not canary.exists()


def test_functions_that_come_with_lm_eval_are_its_own(place):
    import lm_eval

    directory, _ = place
    stock = lm_eval.__path__[0] + "/tasks/hellaswag/hellaswag.yaml"  # names utils.process_docs
    write(directory, include=stock, training_split=None, validation_split=None)
    with pytest.raises(ValueError, match="KeyError: 'ctx_a'"):  # the function was reached
        load(directory)


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__.os.popen('touch CANARY').read() }}",
        "{{ question.__class__.__mro__[1].__subclasses__() }}",
        "{% set x = question.__init__.__globals__ %}{{ x }}",
        "{{ ''.join.__self__.__class__.__base__ }}{{ lipsum.__globals__['os'].system('true') }}",
    ],
)
@pytest.mark.parametrize("field", ["doc_to_text", "doc_to_target"])
def test_no_template_reaches_python(place, template, field):
    """lm-eval renders templates where they may call anything; here they run in a sandbox."""
    directory, canary = place
    write(directory, **{field: template.replace("CANARY", str(canary))})
    with pytest.raises(ValueError, match="template reaches for Python: __") as caught:
        load(directory)
    assert "\n" not in str(caught.value)
    assert not canary.exists()


def test_the_refusals_end_with_the_block():
    import datasets
    import lm_eval.api.task as api
    from lm_eval.tasks import _yaml_loader as loader
    from lm_eval.utils import env

    before = loader._import_func_in_yml, api.get_metric, datasets.load_dataset, loader._Base
    with contextlib.suppress(RuntimeError), lm_code.refused((), False), lm_code.templates():
        assert loader._import_func_in_yml is not before[0]
        raise RuntimeError
    assert before == (
        loader._import_func_in_yml, api.get_metric, datasets.load_dataset, loader._Base
    )  # fmt: skip
    assert "from_string" not in vars(env)


def test_prompts_of_the_sandbox_are_those_of_lm_eval():
    from lm_eval.utils import apply_template

    document = {"a": [3, 1, 2], "b": "x.y", "c": {"d": 1}}
    for template in (
        "{{a|sort|join(',')}}\n",
        "{{b | regex_replace('[.]', '-')}}",
        "{% for x in a %}{{loop.index}}{{x}} {% endfor %}\n",
        "{% set n = namespace(v=0) %}{% for x in a %}{% set n.v = n.v + x %}{% endfor %}{{n.v}}",
        "{{c.d}} {{ a.index(2) }} {{ b.split('.')[0].upper() }} {{ a[1:] }}",
    ):
        plain = apply_template(template, document)
        with lm_code.templates():
            assert apply_template(template, document) == plain
