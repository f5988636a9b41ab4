"""Tiny causal language models of any architecture that transformers builds from a configuration."""

import json

import texts
import torch

SMALL = {
    "vocab_size": 300, "hidden_size": 32, "n_embd": 32, "d_model": 32, "dim": 32, "emb_dim": 32,
    "embedding_size": 32, "word_embed_proj_dim": 32, "hidden_dim": 32, "block_multiple_of": 8,
    "intermediate_size": 48, "ffn_dim": 48, "n_inner": 48, "ffn_hidden_size": 48, "dff": 48,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "dim_ff": 48, "d_inner": 48,
    "ffn_dim_override": 48, "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2,
    "encoder_layers": 1, "decoder_layers": 2, "num_encoder_layers": 1, "num_decoder_layers": 2,
    "num_blocks": 2, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_decoder_attention_heads": 4,
    "attention_heads": 4, "num_encoder_attention_heads": 4, "num_key_value_heads": 2,
    "num_kv_heads": 2, "head_dim": 8, "d_kv": 8, "dim_head": 8, "global_head_dim": 8,
    "attention_head_dim": 8, "max_position_embeddings": 128, "n_positions": 128,
    "max_seq_len": 128, "n_ctx": 128, "seq_length": 128, "sliding_window": 16, "rotary_dim": 4,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1,
    "tie_word_embeddings": False, "use_cache": False, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_topk": 2,
    "moe_k": 2, "top_k": 2, "n_shared_experts": 1, "moe_intermediate_size": 24,
    "moe_ffn_hidden_size": 24, "expert_ffn_hidden_size": 24, "shared_expert_intermediate_size": 24,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_dense_layers": 1,
    "moe_num_shared_experts": 1, "num_shared_experts": 1, "num_zero_experts": 0, "q_lora_rank": 16,
    "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "qk_head_dim": 16, "state_size": 4, "ssm_state_size": 4, "mamba_d_state": 4,
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_num_heads": 4,
    "n_groups": 1, "mamba_head_dim": 16, "mamba_dt_rank": 4, "time_step_rank": 4, "conv_kernel": 4,
    "expand": 2, "mamba_chunk_size": 16, "chunk_size": 16, "lru_width": 32,
    "attention_window_size": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "query_pre_attn_scalar": 8,
    "attention_window": 16, "vocab_size_per_layer_input": 300, "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
}  # fmt: skip
"""Settings of configurations by all their names, each given where an architecture has it."""

OWN = {
    "gpt_bigcode": {"multi_query": True},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "rwkv": {"attention_hidden_size": 32, "intermediate_size": 48},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n": {"num_kv_shared_layers": 0, "activation_sparsity_pattern": 0.0},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "prophetnet": {"num_hidden_layers": None},
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 16]},
    "roc_bert": {"enable_pronunciation": False, "enable_shape": False},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}
"""What an architecture needs beside, or otherwise."""
MOST = 3_000_000
"""Parameters of what counts as tiny."""


class TooLarge(Exception):
    """An architecture that `SMALL` does not make tiny."""


def config(kind, **changes):
    """Return a configuration of `model_type` kind that `SMALL` fits, with further settings."""
    from transformers import AutoConfig

    kind = AutoConfig.for_model(kind).get_text_config(decoder=True).model_type
    known = AutoConfig.for_model(kind)
    own = {name: value for name, value in SMALL.items() if _settable(known, name)}
    if hasattr(known, "kv_lora_rank"):
        own["num_key_value_heads"] = own["num_attention_heads"]
    for further in (OWN.get(kind, {}), changes):
        own = {name: value for name, value in {**own, **further}.items() if value is not None}
    return AutoConfig.for_model(kind, **own)


def _settable(known, name):
    """Whether a configuration has a setting of this name, and no property that others make."""
    made = getattr(type(known), name, None)
    if isinstance(made, property) and made.fset is None:
        return False
    try:
        return hasattr(known, name)
    except Exception:  # one that differs from layer to layer
        return False


def model(kind, seed=0, scale=0.02, **changes):
    """Return a causal language model of random weights, norms and biases among them.

    Raises:
        TooLarge: it is not tiny.
    """
    from transformers import AutoModelForCausalLM

    settings = config(kind, **changes)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(settings).parameters())
    if size > MOST:
        raise TooLarge(f"{size / 1e6:.0f} million parameters")
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(settings).float().eval()
    return moved(made, scale, seed)


def moved(made, scale=0.02, seed=1):
    """Add noise to every parameter of a model, which thereby becomes its post-trained version."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=draw))
    return made


def save(made, place):
    """Save a model with a tokenizer of its vocabulary; return the directory."""
    made.save_pretrained(place)
    texts.tokenizer().save_pretrained(place)
    return place


def pair(kind, place, scale=0.02, **changes):
    """Write a pair; return its directories."""
    made = model(kind, **changes)
    pre = save(made, place / "pre")
    return pre, save(moved(made, scale), place / "post")


def configure(place, file="config.json", **changes):
    """Change settings in a JSON file."""
    content = json.loads((place / file).read_text())
    (place / file).write_text(json.dumps(content | changes))


def opened(paths, **settings):
    """Open a pair of directories."""
    from deltalab.models.hf_llm import HfPair

    return HfPair(*map(str, paths), **{"dtype": "float32", "device": "cpu", **settings}).open()


def compared(kind, place):
    """Hold a pair against `from_pretrained` of its directories, in float32.

    Memory is aligned alike first, on which the order of sums within a product depends.

    Returns:
        The largest difference of a logit, and of a loss from that of transformers' logits, of
        either end; and by how much the ends' losses differ.
    """
    from transformers import AutoModelForCausalLM

    from deltalab.data.tokens import Coded, padded
    from deltalab.loss.answers import AnswerLoss
    from deltalab.loss.objectives import measure
    from deltalab.weights.mapping import loaded

    paths = pair(kind, place)
    found = opened(paths, context=64)
    draw = torch.Generator().manual_seed(0)
    coded = [
        Coded(each, each, "") for each in torch.randint(6, 250, (2, 24), generator=draw).tolist()
    ]
    ids, mask, _ = batch = padded(coded, 0)
    ours, theirs = [], []
    with torch.no_grad():
        for path, weights in zip(paths, (found.pre, {}), strict=True):
            other = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
            _aligned(other)
            theirs.append(other(input_ids=ids, attention_mask=mask, use_cache=False).logits)
            with loaded(found.module, weights, found.post) as module:
                _aligned(module)
                logits = module(input_ids=ids, attention_mask=mask, use_cache=False).logits
                ours.append((logits, measure(module, AnswerLoss((batch,))).mean))
    right = [
        float(torch.nn.functional.cross_entropy(each[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
        for each in theirs
    ]
    logit = max(float((a[0] - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
    return (
        logit,
        max(abs(a[1] - b) for a, b in zip(ours, right, strict=True)),
        abs(right[0] - right[1]),
    )


def _aligned(module):
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.data = tensor.data.clone()
