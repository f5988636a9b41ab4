"""Train the multimodal models: ``python -m experiments.visionfuse``.

For every seed: a language model (Llama, 0.2 M parameters) learns to answer questions about facts
told in words. Then each encoder's projector and a fine-tune of the language model are trained
together on pictures of the encoder's own part, the other part told in words where a question needs
it. No model ever sees the tokens of two encoders. Pictures are half A of the objective's images;
encoders are the embedded vision transformers and stay as they are.

Cost: under three minutes a seed on one thread. Each seed's directory appears when it is whole, and
one that is there is not made again.
"""

import argparse
import json
import random
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from deltalab.data import splits
from deltalab.data.images import packaged
from deltalab.visionfuse import seen
from experiments.visionfuse.world import ENCODERS, SEES, answer, drawn, prompt, table, told, words

PLACE = Path("results/models/visionfuse")
"""Beside the store of artefacts, which holds its own files alone."""
SIZE = {
    "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
TEXT = {"steps": 1200, "rate": 3e-3, "batch": 64}
SIGHT = {"steps": 300, "rate": 1e-3, "batch": 64}
PROJECTOR_RATE = 3e-3
"""The projector starts from nothing, and learns faster than the language model."""


def tokenizer() -> Any:
    """Build the tokenizer: one token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words())}, unk_token="<pad>")
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")


def language_model(encode: Any, seed: int) -> Any:
    """Build the language model at random."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    ends = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(encode), **ends, **SIZE))


def fitted(
    groups: list[dict[str, Any]], settings: dict[str, Any], loss: Callable[[int], Tensor]
) -> None:
    """Train in place with AdamW, warm-up and a cosine to zero."""
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
    rates = [group["lr"] for group in groups]
    for step in range(settings["steps"]):
        now = (
            min(1.0, (step + 1) / 50)
            * 0.5
            * (1 + torch.cos(torch.tensor(torch.pi * step / settings["steps"])).item())
        )
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * now
        optimiser.zero_grad()
        loss(step).backward()  # type: ignore[no-untyped-call]
        for group in optimiser.param_groups:
            nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimiser.step()


def read(model: Any, encode: Any, seed: int) -> None:
    """Teach the language model to answer questions about facts in words."""
    rng = random.Random(f"{seed}:text")

    def loss(step: int) -> Tensor:
        rows = [drawn(rng) for _ in range(TEXT["batch"])]
        found = encode([q for q, _ in rows], padding=True, padding_side="left", return_tensors="pt")
        target = torch.tensor([encode(a).input_ids[0] for _, a in rows])
        mask = found["attention_mask"]
        place = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(found["input_ids"], attention_mask=mask, position_ids=place).logits[:, -1]
        return functional.cross_entropy(logits, target)

    fitted([{"params": list(model.parameters()), "lr": TEXT["rate"]}], TEXT, loss)


def look(model: Any, encode: Any, encoder: str, seed: int) -> nn.Linear:
    """Teach a copy of the language model, in place, to see by one encoder; return the projector."""
    about, sees = ENCODERS[encoder], SEES[encoder]
    half = splits.places(len(packaged(about["task"], "objective")[1]), "A")
    tokens = seen(about["vit"], about["task"], "objective")[half]
    labels = packaged(about["task"], "objective")[1][half]
    labels = labels - labels.min()
    torch.manual_seed(seed)
    projector = nn.Linear(tokens.shape[2], SIZE["hidden_size"])
    embed, rng = model.get_input_embeddings(), random.Random(f"{seed}:{encoder}")

    def loss(step: int) -> Tensor:
        question = (sees, "total", "match")[step % 3]
        rows = [rng.randrange(len(labels)) for _ in range(SIGHT["batch"])]
        other = [rng.randrange(10) for _ in rows]
        own = labels[rows].tolist()
        pairs = list(
            zip(own, other, strict=True) if sees == "digit" else zip(other, own, strict=True)
        )
        texts = []
        for digit, garment in pairs:
            facts = told(None, garment) if sees == "digit" else told(digit, None)
            texts.append(" ".join([*(facts if question != sees else []), prompt(question)]))
        said = encode(texts, return_tensors="pt").input_ids
        target = torch.tensor([encode(answer(question, *p)).input_ids[0] for p in pairs])
        x, ids = projector(tokens[rows]), embed(said)
        # What is seen comes before or after what is told: fused it may stand in either place.
        told_first = rng.random() < 0.5 and question != sees
        cut = said.shape[1] - 2 if told_first else 0
        parts = [ids[:, :cut], x, ids[:, cut:]]
        return functional.cross_entropy(
            model(inputs_embeds=torch.cat(parts, 1)).logits[:, -1], target
        )

    groups = [
        {"params": list(model.parameters()), "lr": SIGHT["rate"]},
        {"params": list(projector.parameters()), "lr": PROJECTOR_RATE},
    ]
    fitted(groups, SIGHT, loss)
    return projector


def make(place: Path, seed: int) -> None:
    """Train everything of one seed and write its directory."""
    from safetensors.torch import save_file

    start, encode = time.process_time(), tokenizer()
    part = place.with_name(place.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    (part / "lm").mkdir(parents=True)

    def keep(model: nn.Module, name: str) -> dict[str, Tensor]:
        weights = {f"lm.{n}": t.detach().clone() for n, t in model.state_dict().items()}
        save_file(weights, part / f"{name}.safetensors", metadata={"format": "pt"})
        return weights

    model = language_model(encode, seed)
    read(model, encode, seed)
    keep(model, "base")
    base = {n: t.detach().clone() for n, t in model.state_dict().items()}
    projectors = {}
    for encoder in ENCODERS:
        model.load_state_dict(base)
        projector = look(model, encode, encoder, seed)
        keep(model, encoder)
        projectors |= {f"{encoder}.{n}": t.detach() for n, t in projector.state_dict().items()}
    save_file(projectors, part / "projectors.safetensors")
    model.config.save_pretrained(part / "lm")
    encode.save_pretrained(part / "lm")
    (part / "world.json").write_text(json.dumps(table()) + "\n")
    part.rename(place)
    print(f"{place}: {time.process_time() - start:.0f} s of processor time", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Make the directories of all seeds; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m experiments.visionfuse", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, default=PLACE)
    parser.add_argument("--seeds", type=int, default=5, help="so many, from 0")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    for seed in range(args.seeds):
        if not (args.out / str(seed)).is_dir():
            make(args.out / str(seed), seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
