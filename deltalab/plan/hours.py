"""GPU hours of a sweep, estimated from parameters, tokens and points.

A forward pass over T tokens of a model with N parameters in its matrices takes 2 N T floating-point
operations, a gradient 6 N T: forward 2 N T, backward 4 N T (attention's own products are left out:
a few per cent at these lengths). Generation reads all weights once a step and batch, which is what
it waits for. Images are decoded by one process each time a model is scored. How many examples and
tokens there are, `estimates.yaml` says.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from deltalab.settings import packaged

FORWARD, GRADIENT, PRODUCT = 2, 6, 12
"""Operations a parameter and token; a Hessian-vector product is two gradients."""
ESTIMATES = "plan/estimates.yaml"
BATCH = 32
"""Sequences generated together, where the evaluator does not say."""
DECODED = 150
"""Images of 640 x 480 that one core decodes and scales in a second."""


@dataclass(frozen=True)
class Device:
    """How fast a GPU is with plain PyTorch, which is well below what its maker promises.

    Args:
        tflops: 10^12 operations a second that long passes reach in 16 bits; 400 is 40 % of an
            H100's peak. In float32, which PyTorch keeps from the tensor cores, a tenth is reached.
        gbps: 10^9 bytes of weights a second that generation, one step after another, gets through:
            an 8B model in bf16 takes 27 ms a step at 600.

    Raises:
        ValueError: a rate that is not above 0.
    """

    tflops: float = 400.0
    gbps: float = 600.0

    def operations(self, wide: bool) -> float:
        """Return operations a second, in float32 (`wide`) or in 16 bits."""
        return self.tflops * (1e11 if wide else 1e12)

    def __post_init__(self) -> None:
        for name in ("tflops", "gbps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"device_{name}={getattr(self, name)}: must be above 0")


@dataclass(frozen=True)
class Work:
    """What one run over some data asks of a model.

    Attributes:
        tokens: tokens read in forward passes.
        steps: steps of generation, a batch each.
        batch: sequences of such a batch.
        seconds: what decoding its images takes.
        unknown: what of it could not be estimated, by name.
    """

    tokens: float = 0.0
    steps: float = 0.0
    batch: int = BATCH
    seconds: float = 0.0
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True)
class Model:
    """What of a model the hours depend on.

    Attributes:
        matrices: entries of the parameters that every token is multiplied with.
        stored: bytes of all parameters.
        wide: whether they are in float32 or wider.
        patches: tokens of an image, of models that cut it into such.
    """

    matrices: int
    stored: int
    wide: bool = False
    patches: int | None = None

    @classmethod
    def of(cls, module: nn.Module) -> "Model":
        """Describe a module, which may be on the meta device; tied parameters count once.

        >>> module = nn.ModuleDict({"table": nn.Embedding(5, 2), "head": nn.Linear(2, 5)})
        >>> Model.of(module)
        Model(matrices=15, stored=100, wide=True, patches=None)
        >>> module["head"].weight = module["table"].weight
        >>> Model.of(module).matrices, Model.of(module["table"]).matrices
        (15, 0)
        """
        tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
        tables -= {id(m.weight) for m in module.modules() if isinstance(m, nn.Linear)}
        parameters = list(module.parameters())
        positions = [p for name, p in module.named_parameters() if name.endswith("pos_embed")]
        return cls(
            sum(p.numel() for p in parameters if id(p) not in tables),
            sum(p.numel() * p.element_size() for p in parameters),
            any(p.element_size() > 2 for p in parameters),
            positions[0].shape[-2] if positions else None,
        )


@dataclass(frozen=True)
class Hours:
    """Hours by what they are spent on.

    Attributes:
        parts: name -> hours.
        unknown: what is not in them.
    """

    parts: Mapping[str, float] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()

    @property
    def total(self) -> float:
        """Hours of all parts."""
        return sum(self.parts.values())

    def plus(self, other: "Hours") -> "Hours":
        """Return the sum of two, part by part.

        >>> Hours({"terms": 1.0}).plus(Hours({"terms": 0.5, "losses": 2.0}, ("x",)))
        Hours(parts={'terms': 1.5, 'losses': 2.0}, unknown=('x',))
        """
        names = dict.fromkeys([*self.parts, *other.parts])
        parts = {name: self.parts.get(name, 0.0) + other.parts.get(name, 0.0) for name in names}
        return Hours(parts, tuple(dict.fromkeys([*self.unknown, *other.unknown])))


def passes(work: Work, model: Model, device: Device, operations: int = FORWARD) -> float:
    """Return the hours of one run over some data.

    Args:
        work: tokens and steps of generation.
        model: the model that reads and generates.
        device: how fast it is.
        operations: a parameter and token: `FORWARD`, `GRADIENT` or `PRODUCT`.

    >>> model, device = Model(matrices=10**9, stored=2 * 10**9), Device(tflops=1, gbps=1)
    >>> passes(Work(tokens=1.8e6), model, device)
    1.0
    >>> passes(Work(steps=1800, batch=1), model, device)
    1.0
    """
    rate = device.operations(model.wide)
    read = operations * model.matrices * work.tokens / rate
    multiplied = FORWARD * model.matrices * work.batch / rate
    step = max(model.stored / (device.gbps * 1e9), multiplied)
    return (read + work.steps * step) / 3600


def of_objective(objective: Any, model: Model) -> Work:
    """Estimate what one pass over an objective's examples reads; its images are decoded once.

    >>> from deltalab.loss.answers import Answers
    >>> from deltalab.data.text import Problems
    >>> problems = Problems("openai/gsm8k", split="train")
    >>> of_objective(Answers(problems, limit=256), Model(1, 1)).tokens
    48896.0
    """
    work = _of_data(objective.data, getattr(objective, "limit", None), model)
    return replace(work, seconds=0.0)


def of_evaluator(evaluator: Any, model: Model) -> dict[str, Work]:
    """Estimate what scoring a model once reads and generates, by task.

    >>> from deltalab.evaluators.lm_eval import LmEval
    >>> found = of_evaluator(LmEval({"gsm8k": {"shots": 5}, "my_task": {}}, limit=64), Model(1, 1))
    >>> found["gsm8k"].tokens, found["gsm8k"].steps, found["my_task"].unknown
    (65344.0, 512.0, ('my_task',))
    """
    if evaluator is None:
        return {}
    if hasattr(evaluator, "tasks"):
        return _of_tasks(evaluator)
    if hasattr(evaluator, "data"):
        return {"accuracy": _of_data(evaluator.data, None, model)}
    name = type(evaluator).__module__.rsplit(".", 1)[-1]
    known = name in packaged(ESTIMATES)["tasks"]
    return {name: _of_task(name, 0, None, evaluator) if known else Work(unknown=(name,))}


def _of_tasks(evaluator: Any) -> dict[str, Work]:
    found = {}
    for task in evaluator.tasks:
        if task.name not in packaged(ESTIMATES)["tasks"]:
            found[task.name] = Work(unknown=(task.name,))
            continue
        for shots in task.shots:
            label = task.name if len(task.shots) == 1 else f"{task.name}/{shots}shot"
            found[label] = _of_task(task.name, shots or 0, task.limit, evaluator)
    return found


def _of_task(name: str, shots: int, limit: int | None, evaluator: Any) -> Work:
    task = packaged(ESTIMATES)["tasks"][name]
    limit = limit or getattr(evaluator, "limit", None)
    documents = min(limit or task["documents"], task["documents"])
    size = evaluator.batch_size
    batch = min(size if isinstance(size, int) else BATCH, documents)
    prompt = task.get("around", 0) + shots * task["example"] + task["question"]
    steps = min(task.get("steps", 0), getattr(evaluator, "max_new_tokens", None) or 10**9)
    return Work(
        tokens=float(documents * task["passes"] * prompt),
        steps=float(-(-documents // batch) * steps),
        batch=batch,
    )


def _of_data(data: Any, limit: int | None, model: Model) -> Work:
    path = str(getattr(data, "path", None) or getattr(data, "dir", ""))
    known = packaged(ESTIMATES)["data"].get(path, {})
    limits = [limit, getattr(data, "limit", None), known.get(getattr(data, "split", None))]
    count = min((n for n in limits if n is not None), default=None)
    tokens = known.get("tokens", model.patches)
    if count is None or tokens is None:
        return Work(unknown=(path or type(data).__name__,))
    seconds = count / known.get("decoded", DECODED) if "tokens" not in known else 0.0
    return Work(tokens=float(count * tokens), seconds=seconds)


def of_points(
    points: Iterable[tuple[Any, Any]],
    evaluations: Mapping[Any, tuple[int, int]],
    model: Model,
    device: Device,
    wide: bool = False,
) -> Hours:
    """Estimate the hours of the points of one pair.

    Every point measures the loss and is scored once; so are both ends of the pair, once for each
    objective and evaluator.

    Args:
        points: the objective and the evaluator of every point.
        evaluations: of every objective, the gradients and the Hessian-vector products taken.
        model: the model.
        device: how fast it is.
        wide: whether terms are taken in float32 also of a model in 16 bits.
    """
    steep = replace(model, wide=model.wide or wide)
    counts: dict[tuple[Any, Any], int] = {}
    for each in points:
        counts[each] = counts.get(each, 2) + 1
    found = Hours()
    for (objective, evaluator), count in counts.items():
        work = of_objective(objective, model)
        parts = {"losses": count * passes(work, model, device)}
        unknown = list(work.unknown)
        for name, task in of_evaluator(evaluator, model).items():
            parts[name] = count * passes(task, model, device)
            parts["decoding"] = count * task.seconds / 3600 + parts.get("decoding", 0.0)
            unknown += task.unknown
        found = found.plus(Hours(parts, tuple(dict.fromkeys(unknown))))
    for objective, (gradients, products) in evaluations.items():
        work = of_objective(objective, model)
        hours = gradients * passes(work, steep, device, GRADIENT)
        hours += products * passes(work, steep, device, PRODUCT)
        found = Hours({"terms": hours}).plus(found)
    return found
