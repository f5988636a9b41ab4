"""What a run will cost, worked out from shapes alone: also for a module on the meta device."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from deltalab.budgets.shared import Shared
from deltalab.edits import Edit
from deltalab.loss.lines import NODES
from deltalab.loss.passes import CHUNK
from deltalab.loss.riemann import Riemann
from deltalab.run.sensitivity import PASSES

GIB = 1 << 30
GRADIENT = "gradient at W_post in float32"
OWN = ("model", GRADIENT)
"""What every expert of a family holds for itself."""


@dataclass(frozen=True)
class Plan:
    """The cost of a sweep's terms.

    Attributes:
        tensors: tensors that the edits touch, tied ones once.
        parameters: entries of those tensors.
        of_parameters: entries of the whole model.
        evaluations: the most gradient evaluations that all points together take.
        held: bytes that every engine holds, by what they are.
        engines: bytes above those, by engine.
        activations: whether the activations of a pass are in `engines`, or unknown.
        passes: forward passes over half of the examples that budgets take to learn what the loss
            makes of errors in each tensor.
    """

    tensors: int
    parameters: int
    of_parameters: int
    evaluations: int
    held: dict[str, int]
    engines: dict[str, int]
    activations: bool
    passes: int = 0

    def bytes(self, engine: str) -> int:
        """Return the bytes that a run with this engine needs."""
        return sum(self.held.values()) + self.engines[engine]

    def joined(self, other: "Plan") -> "Plan":
        """Return the cost of two sweeps of one model: evaluations add up, memory does not."""
        held, engines = (
            {name: max(a.get(name, 0), b.get(name, 0)) for name in {**a, **b}}
            for a, b in ((self.held, other.held), (self.engines, other.engines))
        )
        return replace(
            self,
            evaluations=self.evaluations + other.evaluations,
            held=held,
            engines=engines,
            activations=self.activations and other.activations,
            passes=max(self.passes, other.passes),
        )

    def beside(self, other: "Plan") -> "Plan":
        """Return the cost of two experts that are open at once, judged one after the other.

        Each has its own module and its own gradient at W_post; what is edited, what is shifted and
        what a pass needs is one expert's at a time.
        """
        both = self.joined(other)
        own = {n: self.held.get(n, 0) + other.held.get(n, 0) for n in OWN if n in both.held}
        return replace(both, held={**both.held, **own})

    def check(self, engine: str, available: int, where: str) -> None:
        """Raise `ValueError` where a run would not fit, naming the engines that would.

        Args:
            engine: the engine asked for.
            available: bytes that may be used.
            where: the device's name, for the message.
        """
        if self.bytes(engine) <= available:
            return
        others = [name for name in self.engines if self.bytes(name) <= available]
        hint = f"; these fit: {', '.join(others)}" if others else "; no engine fits"
        raise ValueError(
            f"engine {engine} needs {self.bytes(engine) / GIB:.1f} GiB, {where} has"
            f" {available / GIB:.1f} GiB{hint}"
        )

    def table(self) -> str:
        """Return the plan as lines of text."""
        share = self.parameters / max(1, self.of_parameters)
        lines = [
            f"touched      {self.tensors} tensors, {self.parameters:,} of"
            f" {self.of_parameters:,} parameters ({100 * share:.1f} %)",
            f"evaluations  at most {self.evaluations} gradient evaluations",
            *(f"held         {n / GIB:8.2f} GiB  {name}" for name, n in self.held.items()),
        ]
        if self.passes:
            half = "over half of the examples"
            lines.insert(2, f"budget       {self.passes} forward passes {half}, a gradient an edit")
        without = "" if self.activations else ", without activations"
        lines += [
            f"needed       {self.bytes(name) / GIB:8.2f} GiB  engine {name}{without}"
            for name in self.engines
        ]
        return "\n".join(lines)


def plan(
    module: nn.Module,
    touched: Sequence[str],
    edits: Sequence[Edit],
    settings: Riemann,
    activations: int | None = None,
    predicted: bool = False,
    compared: bool = False,
) -> Plan:
    """Work out the cost of the terms of a sweep; nothing is computed or allocated.

    Args:
        module: the live module, or one of its shape on the meta device.
        touched: the names of the tensors that the edits touch.
        edits: the edits of the sweep.
        settings: the rules.
        activations: bytes stored by the forward pass of a micro-batch (`stored`), where known.
        predicted: whether predictions are made too.
        compared: as for `most_evaluations`.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    unique = {id(parameters[n]): parameters[n] for n in touched if n in parameters}
    everything = [*module.parameters(), *module.buffers()]
    entries = sum(p.numel() for p in unique.values())
    stored_bytes = sum(_bytes(p) for p in unique.values())
    narrow = any(p.is_floating_point() and p.element_size() == 2 for p in everything)
    wide = bool(narrow and settings.dtype)
    held = {
        "model": sum(_bytes(tensor) for tensor in everything),
        "edited weights": stored_bytes,
        "shift in float32": 4 * entries,
    }
    if wide:
        held["model widened to float32"] = sum(
            2 * t.numel() for t in everything if t.is_floating_point() and t.element_size() == 2
        )
    if settings.starts_at_post or predicted:
        held[GRADIENT] = 4 * entries
    forward = activations or 0
    largest = (2 if wide else 1) * max((_bytes(p) for p in unique.values()), default=0)
    products = 16 * min(16 * CHUNK, max((p.numel() for p in unique.values()), default=0))
    blocks = _blocks(module)
    engines = {
        "reverse": largest + products + forward,
        "reverse, checkpoint": largest + products + 2 * forward // max(1, blocks),
        "forward": stored_bytes + 4 * forward // max(1, blocks),
    }
    if predicted:  # the curvature holds a gradient and differentiates its graph
        engines["curvature"] = stored_bytes + largest + products + 3 * forward
    return Plan(
        tensors=len(unique),
        parameters=entries,
        of_parameters=sum(p.numel() for p in module.parameters()),
        evaluations=most_evaluations(edits, settings, not narrow, compared),
        held=held,
        engines=engines,
        activations=activations is not None,
        passes=max((signal_passes(edit, len(unique)) for edit in edits), default=0),
    )


def signal_passes(edit: Edit, tensors: int) -> int:
    """Return the forward passes that an edit's budget takes for a model's sensitivities.

    They are taken once for a pair, whatever the edits.
    """
    if not isinstance(edit, Shared) or edit.budget is None:
        return 0
    return PASSES * tensors if "sensitivity" in edit.budget.wants("") else 0


def most_evaluations(
    edits: Sequence[Edit], settings: Riemann, lines: bool = True, compared: bool = False
) -> int:
    """Return the most gradient evaluations that a sweep can take, shared ones once.

    Args:
        edits: the edits of the sweep.
        settings: the rules.
        lines: whether edits share lines; those of weights stored in 16 bits do not.
        compared: whether these are merges, each of which is a way of its own (`lines.alone`).

    >>> from deltalab.edits.expo import Expo
    >>> most_evaluations([Expo(i / 10) for i in range(-10, 11)], Riemann("adaptive"))
    12
    """
    nodes = {node for rule in settings.rules for node in rule.nodes}
    shared = int(settings.starts_at_post)
    fixed = len(edits) * len(nodes - {0.0} if shared else nodes)
    budget: dict[str, int] = {}
    if compared and settings.adaptive:
        return shared + fixed + len(edits) * sum(n - 1 for n in NODES)
    for edit in edits if settings.adaptive else ():
        line = edit.line() if lines else None
        budget[line.family if line else repr(edit)] = line.most if line else 2 + 5
    return shared + fixed + sum(budget.values())


def stored(module: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Return the bytes of activations that a forward pass stores for its backward pass.

    Works on the meta device, where nothing is computed.

    Args:
        module: the module, whose parameters are not counted.
        forward: runs it on a micro-batch and returns the loss, or the output.
    """
    own = {_storage(tensor) for tensor in [*module.parameters(), *module.buffers()]}
    seen: dict[int, int] = {}
    kept = []  # a freed storage's address could come again

    def pack(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in own:
            kept.append(tensor)
            seen[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    del output
    return sum(seen.values())


def available(device: str) -> int:
    """Return the bytes that may still be used on a device."""
    if device != "cpu" and torch.cuda.is_available():
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    with open("/proc/meminfo") as file:
        about: Mapping[str, str] = dict(line.split(":", 1) for line in file)
    return int(about["MemAvailable"].split()[0]) * 1024


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _blocks(module: nn.Module) -> int:
    """Return the length of the longest list of blocks, as `checkpointing` cuts the module."""
    return max((len(m) for m in module.modules() if isinstance(m, nn.ModuleList)), default=1)
