"""Task files of lm-eval as data: what in them would run Python is refused unless it is allowed.

lm-eval's own files name functions of their package. One that comes from a directory of
`evaluator.include` could name any file beside it, a metric that is fetched as a script, or reach
Python through a prompt template; nothing of that is run unless `evaluator.run_task_code` says so.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any


class Refused(ValueError):
    """A task would run Python that did not come with lm-eval or this package."""


@contextmanager
def refused(own: Sequence[Path], allowed: bool) -> Iterator[None]:
    """While tasks are built, refuse the Python of files outside some directories.

    Args:
        own: directories whose task files may name functions: lm-eval's and this package's.
        allowed: refuse nothing.

    Raises:
        Refused: in the block, from whatever builds the task.
    """
    import datasets
    import lm_eval.api.task as api
    from lm_eval.api.registry import metric_registry
    from lm_eval.tasks import _yaml_loader as loader

    if allowed:
        yield
        return
    trusted = [place.resolve() for place in own]
    originals = loader._import_func_in_yml, api.get_metric, datasets.load_dataset, loader._Base

    def function(name: str, place: Path) -> Any:
        if not any(place.resolve().is_relative_to(root) for root in trusted):
            raise Refused(_message(f"the task files of {place}", f"the function {name}"))
        return originals[0](name, place)

    def metric(name: str, hf_evaluate_metric: bool = False) -> Any:
        originals[1]("acc")  # the first look at any metric registers all there are
        if hf_evaluate_metric or name not in metric_registry:
            raise Refused(_message("a task file", f"the script of the metric {name}"))
        return originals[1](name)

    def load_dataset(path: str, *args: Any, **options: Any) -> Any:
        if path == "pandas":
            raise Refused(_message("a task file", "the pickles of dataset_path: pandas"))
        return originals[2](path, *args, **options)

    loader._import_func_in_yml, api.get_metric = function, metric
    datasets.load_dataset, loader._Base = load_dataset, _safe()
    try:
        yield
    finally:
        loader._import_func_in_yml, api.get_metric = originals[:2]
        datasets.load_dataset, loader._Base = originals[2:]


def _message(who: str, what: str) -> str:
    return (
        f"evaluator.run_task_code=false: {who} would run Python, {what}, on this machine; read it,"
        " and set evaluator.run_task_code=true to allow it"
    )


def _safe() -> Any:
    """Return YAML's loader without Python's own tags, in C where that is here."""
    import yaml

    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@contextmanager
def templates() -> Iterator[None]:
    """Compile every prompt template once, and let none reach Python.

    lm-eval would compile it again for every document, in an environment where a template may call
    whatever it finds.

    Raises:
        Refused: in the block, where a template reaches for what is not in its document.
    """
    from lm_eval.utils import env

    env.from_string = _compiled
    try:
        yield
    finally:
        del env.from_string


@lru_cache(maxsize=256)
def _compiled(source: str) -> Any:
    return _sandbox().from_string(source)


@lru_cache(maxsize=1)
def _sandbox() -> Any:
    """Return an environment like lm-eval's, in which a template reaches its document alone."""
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval.utils import env

    class Sandbox(SandboxedEnvironment):
        def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
            raise Refused(f"a task's prompt template reaches for Python: {attribute}")

        def call(self, *args: Any, **kwargs: Any) -> Any:
            try:
                return super().call(*args, **kwargs)
            except SecurityError as error:
                raise Refused(f"a task's prompt template reaches for Python: {error}") from None

    made = Sandbox(undefined=env.undefined, keep_trailing_newline=env.keep_trailing_newline)
    made.filters.update({k: v for k, v in env.filters.items() if k not in made.filters})
    return made
