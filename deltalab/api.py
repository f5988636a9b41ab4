"""The front door for Python: pairs, edits and accounts of the loss on plain modules and mappings.

    import deltalab as dl

    pair = dl.pair(base, tuned)                    # modules, state dicts, or paths
    weights = dl.edited(pair, dl.edit("dare", p=0.9))
    loss = dl.objective(batches)
    dl.change(pair, weights, loss), dl.term(pair, weights, loss).value
    dl.save(pair, weights, "out")

`import deltalab` imports nothing heavy: each name is fetched when it is first used.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch import Tensor, nn

from deltalab.apply import editing
from deltalab.apply.coded import held
from deltalab.apply.extras import Extras
from deltalab.artifacts import Store
from deltalab.calibration.providing import Calibration
from deltalab.codes import Code
from deltalab.edits import Edit
from deltalab.edits.keep import Keep
from deltalab.linear.delta import difference
from deltalab.linear.factor import svd
from deltalab.loss import distill, objectives
from deltalab.loss.answers import answer_losses
from deltalab.loss.engine import Changes, Engine
from deltalab.loss.objectives import Loss
from deltalab.loss.prediction import Predict
from deltalab.loss.riemann import Riemann, Term
from deltalab.models.live import live_pair
from deltalab.rng import Rng
from deltalab.settings import conf_dir, near
from deltalab.weights import mapping
from deltalab.weights.aligned import Aligned
from deltalab.weights.mapping import Checkpoint, ModelPair, Weights, meta

Source = str | Path | Mapping[str, Tensor] | nn.Module


def pair(
    pre: Source, post: Source, module: nn.Module | None = None, *, device: str = "cpu"
) -> ModelPair:
    """Return a pre- and a post-trained model as a pair with one live module.

    Args:
        pre: a module, a state dict, or the path of a checkpoint.
        post: likewise, with the same tensor names and shapes.
        module: the architecture, filled with `post` here; not needed where `post` is a module,
            which is then the live one: what is evaluated is loaded into it and taken out again.
        device: where the live module is; ignored for a module that is given as `post`.

    Raises:
        ValueError: names or shapes differ, or there is no module to evaluate.

    >>> base, tuned = nn.Linear(2, 1), nn.Linear(2, 1)
    >>> list(pair(base, tuned).post)
    ['weight', 'bias']
    """
    if isinstance(post, nn.Module) and module is None:
        names = _tied(post)
        kept = {name: tensor.detach().clone() for name, tensor in _state(post, names).items()}
        own = Aligned(names, kept.__getitem__, partial(meta, kept))
        return ModelPair(_listed(_weights(pre), names), own, post.eval())
    if module is None:
        raise ValueError("pair: give the architecture as module=, or `post` as a module")
    dtype = str(next(module.parameters()).dtype).removeprefix("torch.")
    return live_pair(module, _weights(pre), _weights(post), device, dtype, None)


def _weights(source: Source) -> Weights:
    if isinstance(source, nn.Module):
        return source.state_dict()
    return source if isinstance(source, Mapping) else Checkpoint(source)


def _tied(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return all names of every tensor of a module, by its first."""
    names: dict[int, list[str]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    return {found[0]: tuple(found) for found in names.values()}


def _state(module: nn.Module, names: Mapping[str, Any]) -> dict[str, Tensor]:
    state = module.state_dict()
    return {name: state[name] for name in names}


def _listed(weights: Weights, names: Mapping[str, tuple[str, ...]]) -> Weights:
    """Return weights under the first names of another module's tensors, whichever they have."""
    origin = {n: next((a for a in aliases if a in weights), n) for n, aliases in names.items()}
    missing = [name for name in origin.values() if name not in weights]
    if missing:
        raise ValueError(f"tensor {missing[0]!r} is in the post-trained model only")
    return Aligned(
        names, lambda name: weights[origin[name]], lambda name: meta(weights, origin[name])
    )


@cache
def methods() -> dict[str, dict[str, Any]]:
    """Return the settings of all edits with their defaults, by name.

    >>> methods()["dare"]
    {'p': 0.5, 'k': 0}
    """
    found = {}
    for file in sorted((conf_dir() / "edit").glob("*.yaml")):
        settings: Any = OmegaConf.to_container(OmegaConf.load(file))
        found[file.stem] = {k: v for k, v in settings.items() if k not in ("_target_", "select")}
    return found


def edit(name: str, **settings: Any) -> Edit:
    """Return an edit by its name, with the defaults of `conf/edit` where nothing else is said.

    Raises:
        ValueError: no such edit or setting, or a value out of range.

    >>> edit("expo", alpha=0.5)
    Expo(alpha=0.5)
    """
    if name not in methods():
        hint = near(name, methods())
        raise ValueError(f"edit={name}: must be one of {', '.join(methods())}{hint}")
    known = methods()[name]
    for setting in settings:
        if setting not in known:
            raise ValueError(
                f"edit.{setting}: {name} has no such setting{near(setting, known)};"
                f" it has {', '.join(known) or 'none'}"
            )
    node: Any = OmegaConf.to_container(OmegaConf.load(conf_dir() / "edit" / f"{name}.yaml"))
    module, _, kind = node["_target_"].rpartition(".")
    made: Edit = getattr(import_module(module), kind)(**{**known, **settings})
    return made


def edited(
    pair: ModelPair,
    edit: Edit,
    *,
    select: Any = "all",
    seed: int = 0,
    loss: Loss | None = None,
    turned: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Return the edited tensors of a pair, as they would be stored.

    Args:
        pair: from `pair`.
        edit: from `edit`, or any callable that keeps the contract of `deltalab.edits.Edit`.
        select: which tensors: all, matrices, linear, proj or no_embed, or `{preset, include,
            exclude}`.
        seed: of random edits.
        loss: for edits that need a gradient, activations or a learned scale.
        turned: patterns of the names of matrices that are stored (in, out), where no configuration
            of the module tells; edits that look at rows and columns see all as (out, in).

    Raises:
        ValueError: an edit that needs a loss, and none given.

    >>> import torch, deltalab as dl
    >>> both = {"weight": torch.zeros(1, 2)}, {"weight": torch.tensor([[1.0, -2.0]])}
    >>> one = dl.pair(*both, nn.Linear(2, 1, bias=False))
    >>> dl.edited(one, dl.edit("expo", alpha=1.0))["weight"]
    tensor([[ 2., -4.]])
    """
    providers: Mapping[str, Any] = {}
    if loss is not None:
        gradient = cache(lambda: Engine(pair, loss, Store(None, {})).gradient)
        calibrated = Calibration(pair, loss, Store(None, {}))
        providers = {**distill.providers(pair, loss, gradient), **calibrated.providers()}
    extras = Extras.of(edit, pair, seed=seed, providers=providers, turned=turned)
    return dict(editing.edited(pair.pre, pair.post, edit, select, extras))


def encode(
    edit: Edit,
    delta: Tensor,
    *,
    post: Tensor | None = None,
    seed: int = 0,
    name: str = "",
    values: str = "exact",
    **needs: Any,
) -> Code | None:
    """Return what a file holds of one edited delta, None where an edit has no such form.

    Args:
        edit: from `edit`.
        delta: W_post - W_pre, float32.
        post: W_post, whose own entries are then held, in their own type, where entries are kept.
        seed: of random edits.
        name: the tensor's, for these.
        values: "exact", or "float16" for every number.
        needs: what else the edit asks for, as `quantile` or `scale`.

    Returns:
        A code: its `arrays` and `settings`, and its `bits` of payload and metadata.

    >>> import torch
    >>> code = encode(edit("bitdelta"), torch.tensor([[1.0, -3.0]]))
    >>> code.bits.payload, decode(code)
    (8, tensor([[ 2., -2.]]))
    """
    own = {"rng": Rng(seed, name), "svd": lambda: svd(delta.flatten(1)), "quantile": None}
    given = {need: needs.get(need, own.get(need)) for need in edit.needs}
    return held(edit, values).encode(delta, post=post, **given)


def decode(code: Code, pre: Tensor | None = None) -> Tensor:
    """Return the edited delta that a code holds, float32.

    Args:
        code: from `encode`.
        pre: W_pre, where the code holds entries of W_post.
    """
    return code.decode(pre)


@dataclass(frozen=True, eq=False)
class _Given:
    """A loss of batches that are there already."""

    batches: Sequence[Any]
    losses: Callable[[nn.Module, Any], tuple[Tensor, Tensor]]
    unit: str

    def __call__(self, module: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        return self.losses(module, batch)


def objective(
    batches: Sequence[Any],
    losses: Callable[[nn.Module, Any], tuple[Tensor, Tensor]] | None = None,
    unit: str | None = None,
) -> Loss:
    """Return an objective from batches on the module's device.

    Args:
        batches: fixed batches. Without `losses`: mappings with `input_ids`, `attention_mask` and
            `labels` (-100 where nothing is predicted), as tokenizers and collators give them, for a
            causal language model; or pairs (inputs, class labels) for a classifier.
        losses: gives of a module and a batch the losses (n,), summed within each example, and
            weights (n,), what each counts for in the mean.
        unit: what the mean is in; nats a token or an example where `losses` is not given.

    Raises:
        ValueError: no batches.

    >>> import torch
    >>> own = objective([(torch.ones(2, 3), torch.tensor([0, 1]))])
    >>> round(objectives.measure(nn.Linear(3, 4), own).mean) in range(1, 4)
    True
    """
    found = list(batches)
    if not found:
        raise ValueError("objective: no batches")
    if losses is not None:
        return _Given(found, losses, unit or "")
    if isinstance(found[0], Mapping) or hasattr(found[0], "keys"):
        tokens = [(b["input_ids"], b["attention_mask"], b["labels"]) for b in found]
        return _Given(tokens, answer_losses, "nats per token")
    most = max(int(y.max()) for _, y in found)
    return objectives.CrossEntropy(tuple(found), most)


@contextmanager
def loaded(pair: ModelPair, weights: Weights) -> Iterator[nn.Module]:
    """Give the live module with some weights in it, for a while; then it holds `post` again."""
    with mapping.loaded(pair.module, weights, restore=pair.post) as module:
        yield module


def change(pair: ModelPair, weights: Weights, loss: Loss) -> tuple[float, float]:
    """Return the measured loss change of edited weights and its paired standard error.

    >>> import torch
    >>> base, tuned = nn.Linear(2, 2), nn.Linear(2, 2)
    >>> own = objective([(torch.ones(2, 2), torch.tensor([0, 1]))])
    >>> change(pair(base, tuned), {}, own)
    (0.0, 0.0)
    """
    post = objectives.measure(pair.module, loss)
    with loaded(pair, weights) as module:
        return objectives.change(post, objectives.measure(module, loss))


def term(
    pair: ModelPair, weights: Weights, loss: Loss, rule: str = "gauss", points: int = 3
) -> Term:
    """Return the Riemann term of edited weights: the loss change along the straight line.

    Args:
        pair: from `pair`.
        weights: from `edited`.
        loss: from `objective`.
        rule: `gauss`, `radau`, `left` (the paper's, with 5 points), `trapezoid`, `simpson`, ...
        points: gradients to take.

    Returns:
        The term: `value`, and its split `by_tensor`, in the loss's unit.
    """
    settings = Riemann(rule=rule, points=points)
    found = _changes(pair, weights, loss, Keep(), settings, Predict(enabled=False, probes=0))
    return next(iter(found.terms.values()))


def predict(pair: ModelPair, weights: Weights, loss: Loss, edit: Edit) -> dict[str, Any]:
    """Return the change predicted from gradient and curvature at W_post alone."""
    none = Riemann(rule=None, points=1)
    predictor = Predict(enabled=True, probes=0)
    return _changes(pair, weights, loss, edit, none, predictor).prediction or {}


def _changes(
    pair: ModelPair,
    weights: Weights,
    loss: Loss,
    edit: Edit,
    settings: Riemann,
    prediction: Predict,
) -> Changes:
    shift = {name: difference(pair.post[name], weights[name]) for name in weights}
    engine = Engine(pair, loss, Store(None, {}))
    return engine.changes(edit, shift, {}, settings, prediction)


def save(pair: ModelPair, weights: Weights, out: str | Path) -> Path:
    """Write the model with edited weights to a new directory, as its own library would load it.

    A model of transformers is saved by its own `save_pretrained`, any other as
    `model.safetensors` with the names of its state dict.

    Raises:
        ValueError: something is at `out` already.
    """
    from safetensors.torch import save_model

    place = Path(out).expanduser()
    if place.exists():
        raise ValueError(f"out={out}: exists already, name a new directory")
    with loaded(pair, weights) as module:
        if hasattr(module, "save_pretrained"):
            save: Any = module.save_pretrained
            save(place)
        else:
            place.mkdir(parents=True)
            save_model(module, str(place / "model.safetensors"))
    return place
