"""A checkpoint opened as a model: adapters and quantised weights are told apart from weights.

`weights.Checkpoint` reads any file of tensors. Whoever edits one asks here, so that every path,
live or from disk to disk, refuses the same and in the same words.
"""

import logging
import re
from contextlib import suppress
from pathlib import Path

from deltalab.checkpoints import quantised
from deltalab.checkpoints.adapted import Adapted
from deltalab.checkpoints.decoded import Dequantised
from deltalab.weights import contents
from deltalab.weights.mapping import Checkpoint

log = logging.getLogger(__name__)
_ADAPTER = re.compile(r"(^|\.)(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|vera_lambda_\w|"
                      r"hada_w\d_\w|ia3_l|prompt_embeddings|boft_R|oft_r)(\.|$)")  # fmt: skip
_MERGE = "an adapter; merge it into its model and save that"


def opened(
    path: Path, setting: str, dequantize: bool | None = None, onto: Path | None = None
) -> Checkpoint:
    """Return a checkpoint that holds a model's weights.

    Args:
        path: as for `weights.Checkpoint`.
        setting: the setting that names it, for messages.
        dequantize: whether quantised weights are decoded; None where no setting asks for it.
        onto: the base that a directory with a LoRA adapter is put onto; None: adapters are refused.

    Raises:
        ValueError: it is an adapter that is put onto no base, or is not known how; or quantised and
            not to be decoded, or likewise.
        FileNotFoundError: as for `weights.Checkpoint`.
    """
    if onto is not None and contents.is_adapter(path):
        return Adapted(opened(onto, "model.pre", dequantize), path, setting)
    check_no_adapter(path, setting)
    found = Checkpoint(path)
    if name := next((n for n in found if _ADAPTER.search(n)), None):
        raise ValueError(f"{setting}={path}: {_MERGE} (tensor {name!r})")
    if (sign := quantised.sign(found)) is None:
        return found
    try:
        decoded = Dequantised(found)
    except ValueError as error:
        if dequantize:
            raise ValueError(f"{setting}={path}: model.dequantize=true: {error}") from None
        raise _quantised(path, setting, sign) from None
    if not dequantize:
        raise _quantised(path, setting, sign, hint=dequantize is not None)
    return decoded


def check_declared(directory: Path, setting: str, dequantize: bool | None = None) -> None:
    """Raise `ValueError` where configuration files say of weights that they are quantised."""
    if not dequantize and (sign := quantised.declared(directory)):
        known = any(f"({method})" in sign for method in ("fp8", "compressed-tensors"))
        raise _quantised(directory, setting, sign, hint=known and dequantize is not None)


def _quantised(path: Path, setting: str, sign: str, hint: bool = False) -> ValueError:
    way = ", or decode them with model.dequantize=true" if hint else ""
    return ValueError(
        f"{setting}={path}: its weights are quantised ({sign}), which no edit applies to; name the"
        f" checkpoint that was quantised{way}"
    )


def check_local(
    source: str, setting: str, dequantize: bool | None = None, onto: str | None = None
) -> None:
    """Raise `ValueError` as `opened` does, where a source is a local path with weights in it.

    For plans, which need no weights: what a run would refuse is refused by its plan.
    """
    if (path := Path(source).expanduser()).exists():
        base = None if onto is None else Path(onto).expanduser()
        if contents.is_adapter(path) and base is not None and not base.exists():
            return  # of a base on the hub nothing is known here
        with suppress(FileNotFoundError):
            opened(path, setting, dequantize, base)


def check_no_adapter(path: Path, setting: str) -> None:
    """Raise `ValueError` where there is an adapter in place of a model; warn where beside one."""
    if path.is_file() and path.name.startswith("adapter_model."):
        raise ValueError(f"{setting}={path}: {_MERGE}")
    if not (path / contents.ADAPTER).is_file():
        return
    if contents.is_adapter(path):
        raise ValueError(f"{setting}={path}: {_MERGE} ({contents.ADAPTER})")
    log.warning("%s=%s: there is an adapter beside the model, which is not applied", setting, path)
