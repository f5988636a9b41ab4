import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from deltalab import keys
from deltalab.models import clip, clip_heads, clip_names
from deltalab.models.clip import ClipPair
from deltalab.store.digests import key_of
from deltalab.weights.mapping import Checkpoint, part_of

NAME = "vit_base_patch32_clip_quickgelu_224"
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
DIM = 24


def tokenizer_into(directory):
    """A tokenizer of single letters in CLIP's format: lower case, `</w>` at a word's end."""
    from transformers import CLIPTokenizer

    letters = list("abcdefghijklmnopqrstuvwxyz0123456789.:\"'-!/,")
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {w: i for i, w in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    directory.mkdir(exist_ok=True)
    (directory / "vocab.json").write_text(json.dumps(vocabulary))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(directory / "vocab.json"), str(directory / "merges.txt")).save_pretrained(
        directory
    )
    return vocabulary


def whole_clip(directory, seed, vocabulary=None):
    """A CLIP of two small towers with random weights and biases, saved as Hugging Face does."""
    from transformers import CLIPConfig, CLIPModel

    vocabulary = vocabulary or {}
    end = len(vocabulary) - 1 if vocabulary else 49407
    config = CLIPConfig(
        text_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 60, "projection_dim": DIM,
            "vocab_size": end + 1, "bos_token_id": end - 1, "eos_token_id": end,
            "pad_token_id": end,
        },
        vision_config={
            "hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 2,
            "num_attention_heads": 3, "image_size": 32, "patch_size": 8, "projection_dim": DIM,
        },
        projection_dim=DIM,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim:
                parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    return model


def vision_only(source, directory, prefix="vision_model."):
    """Save the image tower alone, as fine-tuned checkpoints are published."""
    directory.mkdir()
    weights = load_file(source / "model.safetensors")
    own = {
        prefix + n.removeprefix("vision_model."): t
        for n, t in weights.items()
        if n.startswith("vision_model.")
    }
    save_file(own, directory / "model.safetensors")
    config = json.loads((source / "config.json").read_text())["vision_config"]
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A pre-trained CLIP with its tokenizer, and a fine-tuned image tower."""
    root = tmp_path_factory.mktemp("clip")
    vocabulary = tokenizer_into(root / "pre")
    pre = whole_clip(root / "pre", 0, vocabulary)
    whole_clip(root / "tuned", 1, vocabulary)
    return root / "pre", vision_only(root / "tuned", root / "post"), pre


def spec(pre, post, **further):
    settings = {"task": "mnist", "name": NAME, "args": TINY, "device": "cpu", **further}
    return ClipPair(pre=str(pre), post=str(post), **settings)


def reference(directory, images):
    """Image features by transformers itself."""
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(directory).eval()
    with torch.no_grad():
        hidden = model.vision_model(pixel_values=images).pooler_output
        return model.visual_projection(hidden)


def test_features_and_logits_are_those_of_transformers(pair, tmp_path):
    pre, post, model = pair
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    opened = spec(pre, post).open()
    with torch.no_grad():
        tower = model.vision_model
        expected = model.visual_projection(tower(pixel_values=images).pooler_output)
        opened.module.load_state_dict(dict(opened.pre))
        got = opened.module.features(images)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        assert expected.std() > 0.1
        logits = opened.module(images)
    head = clip_heads.zero_shot(pre, "model.pre", "mnist")
    cosines = functional.cosine_similarity(expected[:, None], head[None], dim=-1)
    torch.testing.assert_close(logits, 100 * cosines, rtol=1e-4, atol=1e-3)
    assert opened.labels == tuple("0123456789")
    # The fine-tuned tower has no projection of its own: it keeps the pre-trained one, and neither
    # it nor the head is a weight that an edit could touch.
    assert all(name.startswith("visual.") for name in opened.post)
    assert set(opened.module.state_dict()) == set(opened.post)
    assert {part_of(n) for n in opened.post} == {"attention", "mlp", "norm", "embedding"}


def test_the_published_size_against_transformers(tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(num_hidden_layers=12)).eval()
    model.save_pretrained(tmp_path)
    tower = clip.created(NAME, {"num_classes": 0}).eval()
    shapes = {name: tuple(t.shape) for name, t in tower.state_dict().items()}
    found = clip_names.found(Checkpoint(tmp_path), shapes, "model.pre")
    tower.load_state_dict(dict(found.tower))
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = model(pixel_values=images).image_embeds
        got = functional.linear(tower(images), found.projection)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in tower.parameters()) == 87_456_000
    # The difference between QuickGELU and GELU is far above the tolerance.
    with torch.no_grad():
        other = clip.created("vit_base_patch32_clip_224", {"num_classes": 0}).eval()
        other.load_state_dict(tower.state_dict())
        wrong = functional.linear(other(images), found.projection)
    assert (wrong - expected).abs().max() > 1e-3


def as_open_clip(weights, before=""):
    """Rename a Hugging Face state dict to OpenAI's names, apart from the package's table."""
    found = {}
    for layer in range(2):
        old, new = f"vision_model.encoder.layers.{layer}.", f"visual.transformer.resblocks.{layer}."
        for kind in ("weight", "bias"):
            joined = [weights[f"{old}self_attn.{p}_proj.{kind}"] for p in ("q", "k", "v")]
            found[f"{new}attn.in_proj_{kind}"] = torch.cat(joined)
            found[f"{new}attn.out_proj.{kind}"] = weights[f"{old}self_attn.out_proj.{kind}"]
            found[f"{new}ln_1.{kind}"] = weights[f"{old}layer_norm1.{kind}"]
            found[f"{new}ln_2.{kind}"] = weights[f"{old}layer_norm2.{kind}"]
            found[f"{new}mlp.c_fc.{kind}"] = weights[f"{old}mlp.fc1.{kind}"]
            found[f"{new}mlp.c_proj.{kind}"] = weights[f"{old}mlp.fc2.{kind}"]
    for kind in ("weight", "bias"):
        found[f"visual.ln_pre.{kind}"] = weights[f"vision_model.pre_layrnorm.{kind}"]
        found[f"visual.ln_post.{kind}"] = weights[f"vision_model.post_layernorm.{kind}"]
    embeddings = "vision_model.embeddings."
    found["visual.class_embedding"] = weights[f"{embeddings}class_embedding"]
    found["visual.positional_embedding"] = weights[f"{embeddings}position_embedding.weight"]
    found["visual.conv1.weight"] = weights[f"{embeddings}patch_embedding.weight"]
    found["visual.proj"] = weights["visual_projection.weight"].T
    found |= {"logit_scale": torch.tensor(4.6), "positional_embedding": torch.zeros(77, 8)}
    found |= {"transformer.resblocks.0.ln_1.bias": torch.zeros(8), "ln_final.bias": torch.zeros(8)}
    return {before + name: tensor.contiguous() for name, tensor in found.items()}


@pytest.mark.parametrize("before", ["", "module."])
def test_open_clip_names_load_as_timm_loads_them(pair, tmp_path, before):
    from timm.models.vision_transformer import checkpoint_filter_fn

    source = as_open_clip(load_file(pair[0] / "model.safetensors"), before)
    save_file(source, tmp_path / "open_clip.safetensors")
    whole = clip.created(NAME, {**TINY, "num_classes": DIM}).eval()
    whole.load_state_dict(checkpoint_filter_fn(dict(source), whole))
    head = torch.randn(10, DIM)
    save_file({"weight": head}, tmp_path / "head.safetensors")
    path, images = tmp_path / "open_clip.safetensors", torch.randn(2, 3, 32, 32)
    opened = spec(path, path, head=str(tmp_path / "head.safetensors")).open()
    with torch.no_grad():
        torch.testing.assert_close(opened.module.features(images), whole(images), rtol=0, atol=1e-6)
        torch.testing.assert_close(whole(images), reference(pair[0], images), rtol=0, atol=1e-5)
        cosines = functional.normalize(whole(images), dim=-1) @ head.T
        torch.testing.assert_close(opened.module(images), 100 * cosines, rtol=1e-4, atol=1e-4)
    # Fine-tuned with the tower, the projection is a weight, and part of the head.
    assert clip_names.PROJECTION in opened.post
    assert opened.post[clip_names.PROJECTION].shape == (DIM, 48)
    assert part_of(clip_names.PROJECTION) == "head"


def test_an_image_tower_without_any_prefix(pair, tmp_path):
    bare = vision_only(pair[0], tmp_path / "bare", prefix="")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        got = spec(pair[0], bare).open().module.features(images)
    torch.testing.assert_close(got, reference(pair[0], images), rtol=1e-5, atol=1e-5)


def test_what_is_missing_or_left_over_is_named(pair, tmp_path):
    weights = load_file(pair[1] / "model.safetensors")
    path = tmp_path / "changed.safetensors"

    def refused(changed, message, **further):
        save_file(changed, path)
        with pytest.raises(ValueError, match=re.escape(message)):
            spec(pair[0], path, **further).open()

    key = "vision_model.encoder.layers.1.self_attn.k_proj.bias"
    refused(
        {n: t for n, t in weights.items() if n != key}, f"model.post: tensor {key!r} is missing"
    )
    extra = {"vision_model.encoder.layers.2.layer_norm1.bias": torch.zeros(48)}
    refused(weights | extra, "layers.2.layer_norm1.bias' is none of the architecture")
    refused(weights | {"classifier.weight": torch.zeros(2)}, "'classifier.weight' is none of")
    refused(
        weights | {"vision_model.pre_layrnorm.bias": torch.zeros(47)},
        "has shape (47,), the architecture (model.name, model.args) needs (48,)",
    )
    refused({"fc.weight": torch.zeros(2)}, "model.post: no CLIP image tower")
    # Old versions of transformers saved a table of positions: it is no parameter.
    table = {"vision_model.embeddings.position_ids": torch.arange(17)[None]}
    save_file(weights | table, path)
    assert spec(pair[0], path).open().post.keys() == spec(*pair[:2]).open().post.keys()


def test_what_shapes_do_not_tell_is_compared_with_the_configuration(pair, tmp_path):
    with pytest.raises(ValueError, match="num_attention_heads=3, the architecture .* has 6"):
        spec(*pair[:2], args={**TINY, "num_heads": 6}).open()
    with pytest.raises(ValueError, match="hidden_act=quick_gelu, the architecture .* has GELU"):
        spec(*pair[:2], name="vit_base_patch32_clip_224").open()


def test_a_head_is_the_mean_direction_of_its_prompts(pair):
    from transformers import AutoTokenizer

    model, tokenizer = pair[2].double(), AutoTokenizer.from_pretrained(pair[0])
    head = clip_heads.zero_shot(pair[0], "model.pre", "eurosat")
    assert head.shape == (10, DIM)
    for number in (0, 4, 9):
        features = []
        for template in clip_heads.tasks()["eurosat"]["templates"]:
            text = template.replace("{}", clip_heads.tasks()["eurosat"]["classes"][number])
            tokens = tokenizer(text, return_tensors="pt", truncation=True, max_length=60)
            with torch.no_grad():
                hidden = model.text_model(**tokens).pooler_output
                feature = model.text_projection(hidden)[0]
            features.append(feature / feature.norm())
        mean = sum(features) / len(features)
        torch.testing.assert_close(head[number].double(), mean / mean.norm(), rtol=0, atol=1e-6)
    model.float()


def test_every_task_has_as_many_classes_as_its_data_set():
    sizes = {
        "cars": 196, "dtd": 47, "eurosat": 10, "gtsrb": 43, "mnist": 10, "resisc45": 45,
        "sun397": 397, "svhn": 10,
    }  # fmt: skip
    for task, size in sizes.items():
        prompts = clip_heads.prompts(task)
        assert len(prompts) == size == len({tuple(p) for p in prompts})
        assert all("{" not in prompt and len(prompt) > 10 for each in prompts for prompt in each)


def test_a_head_from_a_file(pair, tmp_path):
    head = torch.randn(10, DIM)
    file = tmp_path / "head.pt"
    torch.save({"weight": head}, file)
    opened = spec(*pair[:2], head=str(file)).open()
    assert torch.equal(opened.module.head, head)
    torch.save({"weight": head[:9]}, file)
    with pytest.raises(ValueError, match="9 rows, the task has 10 classes"):
        spec(*pair[:2], head=str(file), scale=50.0).open()
    torch.save({"weight": head[:, 1:]}, file)
    with pytest.raises(ValueError, match="23 dimensions, image features have 24"):
        spec(*pair[:2], head=str(file), scale=60.0).open()
    torch.save({"heads": head}, file)
    with pytest.raises(ValueError, match="must hold a matrix 'weight' alone, has heads"):
        spec(*pair[:2], head=str(file), scale=70.0).open()
    with pytest.raises(FileNotFoundError, match=r"model\.head=nowhere\.pt: no such file"):
        spec(*pair[:2], head="nowhere.pt").open()
    torch.save(torch.nn.Linear(2, 2), file)
    with pytest.raises(ValueError, match="refused"):
        spec(*pair[:2], head=str(file), scale=80.0).open()


def test_a_missing_text_tower_is_told_with_the_way_out(pair, tmp_path):
    lone = vision_only(pair[0], tmp_path / "lone")
    save_file(load_file(pair[0] / "model.safetensors"), tmp_path / "whole.safetensors")
    with pytest.raises(FileNotFoundError, match=r"model\.pre=.*model\.text, or a head with"):
        spec(tmp_path / "whole.safetensors", lone).open()
    opened = spec(tmp_path / "whole.safetensors", lone, text=str(pair[0])).open()
    assert opened.module.head.shape == (10, DIM)
    with pytest.raises(ValueError, match=r"model\.task=birds: must be one of cars, dtd, .*svhn"):
        spec(*pair[:2], task="birds")


def test_cosines_are_exact_in_any_dtype(pair):
    images = torch.randn(2, 3, 32, 32)
    exact = spec(*pair[:2]).open().module(images)
    rough = spec(*pair[:2], dtype="bfloat16").open()
    assert next(rough.module.parameters()).dtype == torch.bfloat16
    assert rough.module.head.dtype == torch.float32
    with torch.no_grad():
        logits = rough.module(images.bfloat16())
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, exact.detach(), rtol=0, atol=3)


def test_the_key_knows_the_classes_and_the_files(pair, tmp_path):
    pre, post, head = (tmp_path / name for name in ("pre.bin", "post.bin", "head.bin"))
    for file in (pre, post, head):
        file.write_text(file.name)
    given = {"_target_": f"{ClipPair.__module__}.ClipPair", "task": "mnist"}
    given |= {"pre": str(pre), "post": str(post)}
    marks = [keys.node(given, "model", False)]
    more = {"task": "eurosat"}, {"text": str(pre)}, {"head": str(head)}
    marks += [keys.node({**given, **one}, "model", False) for one in more]
    head.write_text("other")
    marks.append(keys.node({**given, "head": str(head)}, "model", False))
    assert len({key_of(mark) for mark in marks}) == 5


def test_images_are_prepared_as_clip_does(pair):
    from PIL import Image
    from transformers import CLIPImageProcessor

    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (50, 80, 3), dtype=torch.uint8, generator=generator)
    image = Image.fromarray(noise.numpy()).resize((150, 100), Image.Resampling.BICUBIC)
    processor = CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    got = spec(*pair[:2]).open().transform(image)
    assert got.shape == (3, 32, 32)
    assert (got - expected).abs().max() < 0.05  # of values from -1.8 to 2.1


def images_into(directory):
    """A local image data set of ten classes, as `imagefolder` reads it."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        for label in range(10):
            (directory / split / str(label)).mkdir(parents=True)
            for number in range(2):
                pixels = torch.randint(0, 256, (28, 28), dtype=torch.uint8, generator=generator)
                file = directory / split / str(label) / f"{number}.png"
                Image.fromarray(pixels.numpy(), "L").save(file)
    return directory


def test_a_point_runs_from_the_command_line(pair, tmp_path, monkeypatch):
    import sys

    from PIL import Image

    from deltalab.cli import main

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    arguments = [
        "model=clip_mnist", f"model.pre={pair[0]}", f"model.post={pair[1]}", "edit=dare",
        "edit.p=0.5", f"model.args={{{','.join(f'{k}: {v}' for k, v in TINY.items())}}}",
        "model.device=cpu", "data.path=imagefolder", f"data.dir={images_into(tmp_path / 'data')}",
        f"results={tmp_path / 'results'}", "select=all", "riemann.rule=gauss", "riemann.points=2",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["deltalab", *arguments])
    main()
    (file,) = (tmp_path / "results" / "records").glob("*.json")
    record = json.loads(file.read_text())
    assert record["status"] == "ok", record["error"]
    opened = spec(*pair[:2]).open()
    assert record["touched"]["tensors"] == len(opened.post)
    files = sorted((tmp_path / "data" / "test").glob("*/*.png"))
    images = torch.stack([opened.transform(Image.open(f).convert("RGB")) for f in files])
    for side, weights in (("pre", opened.pre), ("post", opened.post)):
        opened.module.load_state_dict(dict(weights))
        with torch.no_grad():
            guesses = opened.module(images).argmax(1).tolist()
        right = [str(guess) == f.parent.name for guess, f in zip(guesses, files, strict=True)]
        assert record["reference"][side]["mnist/accuracy"] == pytest.approx(sum(right) / 20)
    # Two Gauss nodes on the scaled, normalised logits: the module's own loss is what is followed.
    assert record["term"]["value"] == pytest.approx(record["loss"]["change"], rel=0.1)
