"""Edits as C programs: the tensor operations of an edit, recorded once, one line of C each.

The edit itself runs on a few entries while PyTorch's dispatcher tells which operations it takes;
each becomes a statement in the same type, so that the bits are the same: every operation here is
rounded once, as IEEE 754 has it. Floating-point numbers become parameters, so that edits that
differ in them alone have one program. Sums over a tensor or a row end a loop; what needs the sum
comes in the next one. An operation that is not in the tables below raises `Untranslatable`.
"""

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from deltalab.kernels import templates
from deltalab.rng import Draws, mix

Body = Callable[[Tensor, Tensor, Any, dict[str, Any]], Tensor | tuple[Tensor, ...]]
"""A function of (pre, post, edit, needs): the result, and after it terms to add up: how many are
true, or the squares; of one of int8, which comes last, the spread (`codes.indexed.spread`)."""
_SAMPLES = {False: ((15,), (14,)), True: ((5, 3), (2, 7))}
_KEYS = 16
_PAGE = 1 << 32
_TYPES = {
    torch.float64: "double",
    torch.float32: "float",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.int64: "int64_t",
    torch.int32: "int32_t",
    torch.int8: "int8_t",
    torch.bool: "bool",
}
_NARROW = (torch.float16, torch.bfloat16)
_INFINITE = {
    torch.bfloat16: "(x[i].bits & 0x7F80) == 0x7F80",
    torch.float16: "(x[i].bits & 0x7C00) == 0x7C00",
}
_WRAPPED = {torch.int32: "uint32_t", torch.int64: "uint64_t"}
_FILLED = {"zeros": None, "zeros_like": None, "scalar_tensor": 0, "full": 1, "full_like": 1}
_COMPARED = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_BINARY = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
_BINARY |= {f"bitwise_{n}": s for n, s in (("and", "&"), ("or", "|"), ("xor", "^"))}
_BINARY |= {f"__{n}__": s for n, s in (("and", "&"), ("or", "|"), ("xor", "^"))}
_BINARY |= {"__lshift__": "<<", "__rshift__": ">>"}


class Untranslatable(Exception):
    """The edit takes an operation that cannot be written in C here."""


@dataclass(frozen=True)
class Program:
    """One edit, for given dtypes, as C.

    Attributes:
        source: the text. It defines `in_memory` and `in_files`, which run one stage: a sum over the
            tensor for each of `totals`, then the edit.
        dtypes: of the pre-trained tensor, of the post-trained one, and of the gradient if any.
        numbers: the floating-point parameters.
        streams: the random streams it reads: the forks on the way to each, and its number.
        totals: how many sums over the whole tensor it takes first.
        terms: how many sums it takes as it edits.
        spread: whether the last of them is a spread, which takes as many numbers as `SPREAD` says.
        rows: whether it takes sums over each row, and so is to be run on whole rows.
        columns: whether it takes sums over each column first, in a stage of their own.
    """

    source: str
    dtypes: tuple[torch.dtype, ...]
    numbers: tuple[float, ...]
    streams: tuple[tuple[tuple[str, ...], int], ...]
    totals: int
    terms: int = 0
    spread: bool = False
    rows: bool = False
    columns: bool = False


def program(
    edit: Any,
    needs: tuple[str, ...],
    body: Body,
    dtypes: tuple[torch.dtype, ...],
    matrix: bool = False,
    known: Mapping[str, Any] | None = None,
) -> Program:
    """Record an edit on a few entries and write it as C.

    Args:
        edit: the edit.
        needs: what it asks for: "rng", "grad", and what is known.
        body: the function of (pre, post, edit, needs) to record.
        dtypes: of the pre-trained tensor, of the post-trained one and the result, and where there
            is one of the gradient.
        matrix: whether the edit is shown a matrix; entries are numbered row by row.
        known: values of further needs, the same for all entries.

    Raises:
        Untranslatable: it takes an operation that has no translation, or depends on the shape.

    >>> from deltalab.edits.expo import Expo
    >>> add = lambda pre, post, edit, needs: pre + edit(post - pre)
    >>> made = program(Expo(alpha=0.5), (), add, (torch.float32, torch.float32))
    >>> made.numbers, "out[i] = v2;" in made.source
    ((1.5,), True)
    """
    for dtype in dtypes:
        if dtype not in _TYPES:
            raise Untranslatable(str(dtype))
    one, other = (
        _written(edit, needs, body, dtypes, shape, known or {}) for shape in _SAMPLES[matrix]
    )
    if one != other:
        raise Untranslatable("the size of the tensor enters the computation")
    return one


def _written(
    edit: Any,
    needs: tuple[str, ...],
    body: Body,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
    known: Mapping[str, Any],
) -> Program:
    pre, post, *grad = (torch.ones(shape, dtype=dtype) for dtype in dtypes)
    streams = _Streams(shape)
    given: dict[str, Any] = {"rng": streams, "grad": grad[0] if grad else None, **known}
    try:
        with torch.no_grad(), _Recorder() as recorder:
            made = body(pre, post, edit, {name: given[name] for name in needs})
    except Exception as error:  # on so small a tensor; whoever calls it on the real one will see
        raise Untranslatable(str(error)) from error
    writer = _Writer(shape)
    inputs = zip((pre, post, *grad), ("pre", "post", "grad"), strict=False)
    writer.names = {id(tensor): f"{name}[i]" for tensor, name in inputs}
    writer.names[id(streams.counter)] = "(int32_t)(begin + i)"
    for index, word in enumerate(streams.words):
        writer.names[id(word)] = f"keys[{index}]"
    for step in recorder.steps:
        writer.take(*step)
    result, *terms = made if isinstance(made, tuple) else (made,)
    if result.dtype != post.dtype or result.shape != post.shape:
        raise Untranslatable(f"a result of {result.dtype} in {tuple(result.shape)}")
    source = writer.program(writer.operand(result, post.dtype), dtypes, terms)
    numbers, taken = tuple(writer.numbers), tuple(streams.taken)
    sums = len(writer.totals), len(terms)
    spread = bool(terms) and terms[-1].dtype == torch.int8
    wide = spread, bool(writer.sums), bool(writer.columns)
    return Program(source, dtypes, numbers, taken, *sums, *wide)


class _Streams(Draws):
    """Random numbers while an edit is recorded: notes which streams are read."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.counter = torch.arange(prod(shape), dtype=torch.int32).reshape(shape)
        self.words = [torch.zeros((), dtype=torch.int32) for _ in range(2 * _KEYS)]
        self.taken: dict[tuple[tuple[str, ...], int], int] = {}
        self.labels: tuple[str, ...] = ()

    def fork(self, label: str) -> "_Streams":
        """Return what `Rng.fork` does."""
        other = copy(self)
        other.labels = (*self.labels, label)
        return other

    def bits(self, like: Tensor, stream: int = 0) -> Tensor:
        """Return 32 random bits per element."""
        if like.shape != self.counter.shape:
            raise Untranslatable("random numbers of another shape than the tensor's")
        slot = self.taken.setdefault((self.labels, stream), len(self.taken))
        if slot == _KEYS:
            raise Untranslatable("too many random streams")
        return mix(self.counter, self.words[2 * slot], self.words[2 * slot + 1])


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps every operation with its arguments and its result."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is traced; skipping would import the tracer, 1.4 s

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, out))
        return out


class _Writer:
    """Turns recorded operations into C statements: before the loop, one a row, or one an entry."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.by_row = ((shape[0],), (shape[0], 1)) if len(shape) == 2 else ()
        self.by_column = (shape[1:], (1, *shape[1:])) if len(shape) == 2 else ()
        self.names: dict[int, str] = {}
        self.scalars: list[str] = []
        self.entries: list[str] = []
        self.numbers: list[float] = []
        self.totals: list[tuple[int, int, str]] = []
        self.rows: list[str] = []
        self.sums: list[tuple[int, int, str]] = []
        self.columns: list[tuple[int, int, str]] = []

    def take(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Write one operation.

        Raises:
            Untranslatable: it is in none of the tables.
        """
        name = func.overloadpacket.__name__
        shapes = ((), self.shape, *self.by_row, *self.by_column)
        shaped = isinstance(out, Tensor) and tuple(out.shape) in shapes
        if not shaped or func._schema.is_mutable or out.dtype not in _TYPES:
            raise Untranslatable(str(func))
        code = self.expression(name, args, kwargs, out)
        if code is None:
            raise Untranslatable(str(func))
        kind, place = ("v", self.entries) if out.shape else ("s", self.scalars)
        if tuple(out.shape) in self.by_row:
            kind, place = "r", self.rows
        self.names[id(out)] = f"{kind}{len(place)}"
        place.append(f"const {_TYPES[out.dtype]} {self.names[id(out)]} = {code};")

    def expression(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor
    ) -> str | None:
        """Return the C expression of one operation, or None."""
        kind = out.dtype
        if name == "view" and isinstance(args[1], torch.dtype):
            return self.reinterpreted(args[0], kind)
        if name in ("alias", "clone", "detach", "view", "unsqueeze", "_to_copy"):
            return self.operand(args[0], kind)
        if name in _FILLED:
            place = _FILLED[name]
            return self.operand(0 if place is None else args[place], kind)
        if name in ("where", "masked_fill"):
            mask, yes, no = args if name == "where" else (args[1], args[2], args[0])
            a, b = (self.operand(x, kind) for x in (yes, no))
            return f"{self.operand(mask, torch.bool)} ? {a} : {b}"
        if name in ("sum", "mean"):
            return self.total(name, args, out)
        if name in _COMPARED:
            common = torch.result_type(*args)
            common = torch.float32 if common in _NARROW else common
            a, b = (self.operand(x, common) for x in args)
            return f"{a} {_COMPARED[name]} {b}"
        if kind in _NARROW or set(kwargs) - {"dtype"}:
            return None  # where PyTorch rounds to 16 bits is its own affair
        if name == "rsub":
            name, args = "sub", (args[1], args[0], *args[2:])
        if name in _BINARY and len(args) == 2:
            return self.binary(_BINARY[name], *args, kind)
        if name in ("neg", "abs") and kind.is_floating_point:
            function = {"neg": "-", "abs": "__builtin_fabs" + "f" * (kind == torch.float32)}[name]
            return f"{function}({self.operand(args[0], kind)})"
        if name in ("logical_not", "bitwise_not") and kind == torch.bool:
            return f"!{self.operand(args[0], kind)}"
        return None

    def operand(self, value: Any, kind: torch.dtype) -> str:
        """Return a value, converted as PyTorch does: a tensor's name, a parameter or a number."""
        if isinstance(value, Tensor):
            if id(value) not in self.names:
                raise Untranslatable("a tensor from elsewhere")
            return _cast(self.names[id(value)], value.dtype, kind)
        if isinstance(value, bool):
            return _cast(str(value).lower(), torch.bool, kind)
        if isinstance(value, int):
            return _cast(f"{value}LL", torch.int64, kind)
        if isinstance(value, float):
            name = f"n{len(self.numbers)}"
            self.numbers.append(value)
            self.scalars.append(f"const double {name} = numbers[{name[1:]}];")
            return _cast(name, torch.float64, kind)
        raise Untranslatable(f"an argument of type {type(value).__name__}")

    def binary(self, sign: str, left: Any, right: Any, kind: torch.dtype) -> str | None:
        """Return an expression of two operands of one type; integers wrap."""
        a, b = self.operand(left, kind), self.operand(right, kind)
        whole = _WRAPPED.get(kind)
        if kind == torch.bool and sign not in "&|^":
            return None
        if sign in ("<<", ">>") and not (whole and isinstance(right, int) and 0 <= right < 32):
            return None
        if whole and sign in ("+", "-", "*", "<<"):
            return f"({_TYPES[kind]})(({whole}){a} {sign} ({whole}){b})"
        return f"({_TYPES[kind]})({a} {sign} {b})"

    def reinterpreted(self, value: Tensor, kind: torch.dtype) -> str | None:
        """Return the bits of one type read as another."""
        functions = {
            (torch.float32, torch.int32): "bits_of_float",
            (torch.int32, torch.float32): "float_of_bits",
        }
        function = functions.get((value.dtype, kind))
        return function and f"{function}({self.operand(value, value.dtype)})"

    def total(self, name: str, args: tuple[Any, ...], out: Tensor) -> str | None:
        """End a loop with the sum over all entries, a row's or a column's, for those after it."""
        known = {torch.float64: _TYPES, torch.int64: (torch.bool, torch.int32)}.get(out.dtype, ())
        if tuple(args[0].shape) != self.shape or args[0].dtype not in known:
            return None
        if tuple(out.shape) in self.by_row and list(args[1]) in ([1], [-1]):
            index, value = len(self.sums), self.operand(args[0], torch.float64)
            self.sums.append((len(self.rows), len(self.entries), value))
            mean = f"t{index}" + (" / (double)width" if name == "mean" else "")
            return _cast(mean, torch.float64, out.dtype)
        if tuple(out.shape) in self.by_column and list(args[1]) in ([0], [-2]):
            self.columns.append(
                (len(self.scalars), len(self.entries), self.operand(args[0], torch.float64))
            )
            mean = "sums[i - first]" + (" / (double)(whole / width)" if name == "mean" else "")
            return _cast(mean, torch.float64, out.dtype)
        if len(args) > 1:
            return None
        index, value = len(self.totals), self.operand(args[0], torch.float64)
        self.totals.append((len(self.scalars), len(self.entries), value))
        mean = f"sums[{index}]" + (" / (double)whole" if name == "mean" else "")
        return _cast(mean, torch.float64, out.dtype)

    def counted(self, terms: list[Tensor]) -> dict[str, str]:
        """Return the statements that add up terms as an edit goes on: a block at a time.

        Larger blocks are pushed out of the cache by the kernel, where it clears fresh memory.
        """
        found: dict[str, list[str]] = {
            part: []
            for part in ("blocks", "counts", "terms", "filled", "cleared", "added", "totals")
        }
        for index, term in enumerate(terms):
            value = self.operand(term, term.dtype)
            if term.dtype == torch.int8:
                if index + 1 < len(terms):
                    raise Untranslatable("a spread before other terms")
                found["blocks"].append("int8_t held[BLOCK]; int64_t gaps[4 * SHORT] = {0};")
                found["terms"].append(f"held[j] = {value};")
                found["cleared"].append("held[j] = 0;")
                found["added"].append(f"spread(held, size, gaps, terms + {index});")
                found["totals"].append(f"spread_short(gaps, terms + {index});")
                continue
            if term.dtype == torch.bool:
                found["counts"].append(f"int32_t held_{index} = 0;")
                found["terms"].append(f"held_{index} += {value};")
                found["added"].append(f"terms[{index}] += held_{index};")
            elif term.dtype == torch.float32:
                blocks = f"float block_{index}[BLOCK]; double lane_{index}[LANES] = {{0}};"
                found["blocks"].append(blocks)
                found["terms"].append(f"block_{index}[j] = {value};")
                found["filled"].append(f"block_{index}[j] = 0;")
                found["added"].append(f"squares(block_{index}, lane_{index});")
                found["totals"].append(f"terms[{index}] += added(lane_{index}, LANES);")
            else:
                raise Untranslatable(f"a sum of {term.dtype}")
        depths = {"blocks": 1, "counts": 3, "terms": 4, "filled": 4, "added": 3, "totals": 1}
        depths["cleared"] = 4
        return {part: _lines(code, depths[part]) for part, code in found.items()}

    def by_rows(self) -> str:
        """Return what is done once a row: the sums over it, and what comes of them."""
        parts, done = [], 0
        for index, (rows, entries, value) in enumerate(self.sums):
            parts.append(_lines(self.rows[done:rows], 2))
            each = _lines(self.entries[:entries], 4)
            parts.append(templates.ROW.format(total=index, entries=each, result=value))
            done = rows
        return "".join([*parts, _lines(self.rows[done:], 2)])

    def program(self, result: str, dtypes: tuple[torch.dtype, ...], terms: list[Tensor]) -> str:
        """Return the C program: a function for each sum, the one that edits, one for files."""
        pre, post, grad = (_TYPES[dtype] for dtype in (*dtypes, torch.float32)[:3])
        signature = ", ".join(
            [
                "int64_t begin",
                "int64_t count",
                f"const {pre} *restrict pre",
                f"const {post} *restrict post",
                f"const {grad} *restrict grad",
                f"{post} *restrict out",
                "const int32_t *restrict keys",
                "const double *restrict numbers",
                "const double *restrict sums",
                "int64_t whole",
                "double *restrict terms",
                "int64_t width",
            ]
        )
        parts, count = [templates.PRELUDE], len(self.totals) + len(self.columns)
        steps = [(templates.TOTAL, 3, *total) for total in self.totals]
        steps += [(templates.COLUMN, 3, *column) for column in self.columns]
        counted = self.counted(terms) if terms else {}
        edit, depth = (templates.COUNTED, 4) if terms else (templates.EDIT, 4)
        if sum(map(bool, (self.totals, self.sums, self.columns))) > 1 or len(self.columns) > 1:
            raise Untranslatable("sums over unlike parts of the tensor")
        counted["rows"] = self.by_rows()
        steps.append((edit, depth, len(self.scalars), len(self.entries), result))
        for stage, (template, depth, scalars, entries, value) in enumerate(steps):
            before = _lines(self.scalars[:scalars], 1)
            each = _lines(self.entries[:entries], depth)
            given = {"scalars": before, "entries": each, "result": value, **counted}
            parts.append(template.format(stage=stage, signature=signature, **given))
        names = {"pre": pre, "post": post, "grad": grad, "signature": signature}
        stages = ", ".join(f"stage_{stage}" for stage in range(count + 1))
        for side, dtype in zip(("pre", "post"), dtypes[:2], strict=True):
            names[f"infinite_{side}"] = _INFINITE.get(dtype, "!__builtin_isfinite(x[i])")
        parts.append(templates.RUN.format(stages=stages, totals=count, **names))
        return "".join(parts)


def _lines(statements: list[str], depth: int) -> str:
    return "\n".join("    " * depth + statement for statement in statements)


def _cast(code: str, old: torch.dtype, new: torch.dtype) -> str:
    """Return a C expression converted from one dtype to another, by way of float32 if narrow."""
    if old == new:
        return code
    if old in _NARROW and new != torch.float32:
        return _cast(_cast(code, old, torch.float32), torch.float32, new)
    if new in _NARROW and old != torch.float32:
        return _cast(_cast(code, old, torch.float32), torch.float32, new)
    if old in _NARROW:
        return f"from_{_TYPES[old]}({code})"
    if new in _NARROW:
        return f"to_{_TYPES[new]}({code})"
    if old == torch.bool:
        return f"({code} ? ({_TYPES[new]})1 : ({_TYPES[new]})0)"
    if new == torch.bool:
        return f"({code} != 0)"
    if old.is_floating_point and not new.is_floating_point:
        code = f"whole_of({code})"
    return f"({_TYPES[new]})({code})"
