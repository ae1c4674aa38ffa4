"""Scorers: like transformers on deterministic weights, published layouts at full size, scales."""

import math
import shutil
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from helpers import HEAD, REWARDS, WORDS, clip_config, photograph, scorer_tensors
from PIL import Image
from safetensors.torch import load_file

from spin import toy
from spin.checkpoint.names import BLIP_NAMES, expand_names
from spin.checkpoint.tensors import read_tensors
from spin.eval import blip
from spin.eval.scorers import (
    FILES,
    NETWORK_SCORERS,
    TEXT,
    VISION,
    VIT_H,
    VIT_L,
    AestheticScorer,
    ClipScorer,
    HPSScorer,
    PickScorer,
    clip_names,
    clip_pixels,
    hps_pixels,
    load_clip,
    load_imagereward,
    load_scorer,
    merge_head,
)
from spin.infra.errors import InputError
from spin.text import Tokenizer

GOLDEN = load_file(helpers.DATA / "rewards_golden.safetensors")  # outputs of transformers
PIXELS = load_file(helpers.DATA / "pixels.safetensors")  # of the published preprocessing
CLIP_CONFIG = clip_config(REWARDS["pickscore.tiny.config"])
HERE = Path("somewhere")
SIZES = [(300, 200), (97, 131), (512, 512)]
PROMPTS = ["a red circle", "a cat on the moon", "art"]


def photographs(count: int) -> list[Image.Image]:
    return [photograph(f"photograph.{i}", SIZES[i]) for i in range(count)]


def load_tiny_clip(tensors: dict):
    return load_clip(CLIP_CONFIG, tensors, HERE, "cpu")


def load_tiny_imagereward(tensors: dict) -> blip.ImageReward:
    config = REWARDS["imagereward.tiny.config"]
    return load_imagereward(tensors, HERE, "cpu", config["vision"], config["text"])


@pytest.fixture(scope="module")
def clip():
    return load_tiny_clip(scorer_tensors("pickscore.tiny"))


# ---- Networks ------------------------------------------------------------------------------------


def test_pickscores_clip_is_transformers(clip):
    images = helpers.oracle_input("pickscore.pixels", (2, 3, 56, 56))
    image_embeddings = clip.encode_image(images, normalize=True)
    text_embeddings = clip.encode_text(GOLDEN["pickscore.tiny.ids"], normalize=True)
    score = clip.logit_scale.exp() * (image_embeddings * text_embeddings).sum(1)
    close = {"atol": 2e-6, "rtol": 1e-5}
    torch.testing.assert_close(text_embeddings, GOLDEN["pickscore.tiny.text_embeds"], **close)
    torch.testing.assert_close(image_embeddings, GOLDEN["pickscore.tiny.image_embeds"], **close)
    torch.testing.assert_close(score, GOLDEN["pickscore.tiny.score"], atol=2e-4, rtol=1e-5)


def test_imagereward_is_transformers():
    network = load_tiny_imagereward(scorer_tensors("imagereward.tiny"))
    images = helpers.oracle_input("imagereward.pixels", (2, 3, 64, 64))
    ids = GOLDEN["imagereward.tiny.ids"]
    tokens = GOLDEN["imagereward.tiny.image_tokens"]
    close = {"atol": 5e-6, "rtol": 1e-5}
    torch.testing.assert_close(network.encode_images(images), tokens, **close)
    state = network.encode_prompts(ids, tokens)
    torch.testing.assert_close(state, GOLDEN["imagereward.tiny.text_cls"], **close)
    torch.testing.assert_close(network(images, ids), GOLDEN["imagereward.tiny.reward"], **close)
    assert torch.equal(ids != 0, GOLDEN["imagereward.tiny.mask"].bool())


def fused_shape(shapes: list[list[int]]) -> list[int]:
    """Return the shape of a tensor whose rows are those of tensors of these shapes."""
    if shapes[0] == []:
        return []
    return [sum(shape[0] for shape in shapes), *shapes[0][1:]]


@pytest.mark.parametrize("architecture", [VIT_H, VIT_L])
def test_clips_names_are_a_bijection_at_full_size(architecture):
    from open_clip import CLIP, get_model_config

    config = get_model_config(architecture)
    with torch.device("meta"):
        state = CLIP(**config).state_dict()
    names = clip_names(config)
    published = [name for theirs, _ in names for name in theirs]
    assert sorted(ours for _, ours in names) == sorted(state)
    assert len(set(published)) == len(published)


def test_the_published_pickscore_fits_at_full_size():
    from open_clip import CLIP, get_model_config

    config = get_model_config(VIT_H)
    with torch.device("meta"):
        state = CLIP(**config).state_dict()
    manifest = REWARDS["pickscore"]
    names = clip_names(config)
    assert sorted(name for theirs, _ in names for name in theirs) == sorted(manifest)
    for theirs, ours in names:
        shapes = [manifest[name] for name in theirs]
        if theirs[0].endswith("_projection.weight"):
            shapes = [shape[::-1] for shape in shapes]
        assert fused_shape(shapes) == list(state[ours].shape), ours


def test_each_scorer_has_the_activation_of_its_checkpoint():
    """OpenAI's CLIP was trained with quick GELU, LAION's with GELU."""
    from open_clip import get_model_config

    for scorer in (ClipScorer, AestheticScorer):
        assert get_model_config(scorer.architecture)["quick_gelu"]
    for scorer in (PickScorer, HPSScorer):
        assert not get_model_config(scorer.architecture).get("quick_gelu", False)


def test_the_published_imagereward_fits_at_full_size():
    with torch.device("meta"):
        state = blip.ImageReward(VISION, TEXT).state_dict()
    names = expand_names(BLIP_NAMES, v=24, t=12)
    assert sorted(ours for _, ours in names) == sorted(state)

    manifest = REWARDS["imagereward"]
    head = [name for name in manifest if name.startswith("mlp.")]
    published = [name for name in manifest if not name.startswith("mlp.")]
    # The head's five layers are merged into one.
    names = [(theirs, ours) for theirs, ours in names if not ours.startswith("head.")]
    assert sorted(name for theirs, _ in names for name in theirs) == sorted(published)
    for theirs, ours in names:
        shapes = [manifest[name] for name in theirs]
        assert fused_shape(shapes) == list(state[ours].shape), ours

    used = sum(math.prod(manifest[name]) for name in published + head)
    unused = 2 * 256 + 256 * 1024 + 256 * 768  # two projections to 256 dimensions
    assert used + unused == 446_665_953, "ImageReward's published number of parameters"


def test_only_tensors_without_a_use_may_be_absent_or_present():
    tensors = scorer_tensors("imagereward.tiny")
    unused = {
        "blip.vision_proj.weight": torch.zeros(3),
        "blip.vision_proj.bias": torch.zeros(3),
        "blip.text_proj.weight": torch.zeros(3),
        "blip.text_proj.bias": torch.zeros(3),
        "blip.text_encoder.embeddings.position_ids": torch.arange(512)[None],
    }
    load_tiny_imagereward({**tensors, **unused})
    with pytest.raises(InputError, match="1 unexpected .blip.visual_encoder.extra"):
        load_tiny_imagereward({**tensors, "blip.visual_encoder.extra": torch.zeros(3)})


@pytest.mark.parametrize(
    "name",
    ["mlp.layers.4.bias", "blip.text_encoder.encoder.layer.1.attention.self.key.bias"],
)
def test_a_missing_tensor_is_refused_by_name(name):
    tensors = scorer_tensors("imagereward.tiny")
    del tensors[name]
    with pytest.raises(InputError, match=f"1 missing .{name}"):
        load_tiny_imagereward(tensors)


def test_older_clip_files_hold_position_ids(clip):
    tensors = scorer_tensors("pickscore.tiny")
    tensors["text_model.embeddings.position_ids"] = torch.arange(9)[None]
    tensors["vision_model.embeddings.position_ids"] = torch.arange(9)[None]
    again = load_tiny_clip(tensors)
    for name, tensor in clip.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)

    del tensors["visual_projection.weight"]
    with pytest.raises(InputError, match="1 missing .visual_projection.weight"):
        load_tiny_clip(tensors)


def test_a_file_with_open_clips_own_names(clip):
    """HPS has such a one, in half precision."""
    half = {name: tensor.half() for name, tensor in clip.state_dict().items()}
    again = load_tiny_clip(half)
    assert torch.equal(again.visual.proj, half["visual.proj"].float())


# ---- The head ------------------------------------------------------------------------------------


def apply_head(tensors: dict, x: torch.Tensor) -> torch.Tensor:
    """Apply the published head's five layers one by one."""
    for i in (0, 2, 4, 6, 7):
        weight = tensors[f"layers.{i}.weight"].to(x.dtype)
        bias = tensors[f"layers.{i}.bias"].to(x.dtype)
        x = x @ weight.T + bias
    return x


def test_the_published_aesthetic_head_is_one_linear_layer():
    tensors = read_tensors(HEAD)
    x = helpers.oracle_input("head", (5, 768))
    weight, bias = merge_head(tensors, "layers.", 768, HEAD)
    assert weight.shape == (1, 768) and bias.shape == (1,)
    merged = (x @ weight.T + bias).double()
    torch.testing.assert_close(merged, apply_head(tensors, x.double()), atol=1e-4, rtol=1e-5)

    expected = "1 of another shape .layers.0.weight is .1024, 768., not .1024, 512."
    with pytest.raises(InputError, match=expected):
        merge_head(tensors, "layers.", 512, HEAD)


# ---- Images and prompts --------------------------------------------------------------------------


@pytest.mark.parametrize("i", range(3))
@pytest.mark.parametrize("kind", ["clip", "hps"])
def test_pixels_are_those_of_the_published_preprocessing(kind, i):
    preprocess = {"clip": clip_pixels, "hps": hps_pixels}[kind]
    image = photograph(f"photograph.{i}", SIZES[i])
    pixels = preprocess([image, image])
    assert pixels.shape == (2, 3, 224, 224)
    every_fifth = pixels[1][:, ::5, ::5]
    torch.testing.assert_close(every_fifth, PIXELS[f"{kind}.{i}"], atol=2e-5, rtol=1e-5)


def test_word_pieces_are_transformers():
    tokenizer = blip.WordPiece(WORDS["vocab"])
    assert len(WORDS["prompts"]) == 20
    for prompt, ids in zip(WORDS["prompts"], WORDS["ids"]):
        assert tokenizer([prompt])[0].tolist() == ids, prompt
    assert tokenizer(WORDS["prompts"]).tolist() == WORDS["ids"]


def test_a_vocabulary_that_is_not_berts_is_refused(scorers, small_scorers, tmp_path):
    folder = shutil.copytree(scorers, tmp_path / "scorers")
    (folder / "bert-base-uncased" / "vocab.txt").write_text("a\nb\n[UNK]\n")
    expected = r"vocab.txt: .* not usable: lacks \[PAD\], \[CLS\], \[SEP\]"
    with pytest.raises(InputError, match=expected):
        load_scorer("imagereward", folder)


# ---- Scorers, from a folder with files in the published layouts ----------------------------------


def test_scales_and_conventions(scorers, small_scorers, clip):
    images = photographs(2)
    prompts = PROMPTS[:2]
    names = ("pickscore", "hps", "clip", "aesthetic")
    loaded = {name: load_scorer(name, scorers) for name in names}
    scores = {}
    for name, scorer in loaded.items():
        assert scorer.metrics == (name,) and scorer.primary_metric == name
        scores[name] = torch.tensor(scorer.score(images, prompts)[name])

    embedding = clip.encode_image(clip_pixels(images), normalize=True)
    hps_embedding = clip.encode_image(hps_pixels(images), normalize=True)
    text_embedding = clip.encode_text(Tokenizer()(prompts), normalize=True)
    cosine = (embedding * text_embedding).sum(1)
    hps_cosine = (hps_embedding * text_embedding).sum(1)
    head = read_tensors(scorers / "improved-aesthetic-predictor" / HEAD.name)
    close = {"atol": 1e-4, "rtol": 1e-5}
    torch.testing.assert_close(scores["pickscore"], math.exp(4.6052) * cosine, **close)
    torch.testing.assert_close(scores["clip"], 100 * cosine, **close)
    torch.testing.assert_close(scores["hps"], hps_cosine, atol=2e-3, rtol=0)  # float16 weights
    aesthetic = apply_head(head, embedding)[:, 0]
    torch.testing.assert_close(scores["aesthetic"], aesthetic, atol=1e-4, rtol=1e-4)

    hashes = {scorer.hash for scorer in loaded.values()}
    assert len(hashes) == 3, "PickScore and CLIP score have the same file here"


@pytest.mark.parametrize("name", ["pickscore", "hps", "aesthetic", "clip", "imagereward"])
def test_a_score_does_not_depend_on_the_batch(name, scorers, small_scorers):
    scorer = load_scorer(name, scorers)
    images = photographs(3)
    together = scorer.score(images, PROMPTS)[name]
    assert together.dtype == np.float32 and len(set(together.round(3))) == 3
    for i in range(3):
        alone = scorer.score([images[i]], [PROMPTS[i]])[name]
        np.testing.assert_allclose(alone, together[i : i + 1], atol=1e-4)


def test_prompts_are_cleaned_as_each_scorer_cleans_them(scorers, small_scorers):
    """HPS and CLIP score use open_clip, which repairs quotes; PickScore uses transformers."""
    image = photograph("photograph.0", (60, 60))
    prompts = ["a corgi\u2019s head", "a corgi's head"]
    for name, same in (("hps", True), ("clip", True), ("pickscore", False)):
        curly, straight = load_scorer(name, scorers).score([image, image], prompts)[name]
        assert (curly == straight) == same


def test_the_miniature_worlds_scorer():
    scorer = load_scorer("toy")
    scene = toy.SCENES[3]
    other = toy.SCENES[4]
    image = toy.to_pil(toy.ideal_image(scene))
    scores = scorer.score([image, image], [scene.caption, other.caption])
    assert set(scores) == set(scorer.metrics) and scorer.primary_metric == "reward"
    assert scorer.less_is_better == ("palette", "energy")
    sets = scorer.score_set([image, image], scene.caption)
    assert tuple(sets) == scorer.set_metrics
    assert sets["spread"] == 0
    assert scores["reward"][0] > 9.5 > scores["reward"][1]
    assert scores["aligned"].tolist() == [1, 0]


@pytest.mark.parametrize(
    "side, prompt, reason",
    [
        (64, toy.SCENES[3].caption, "toy needs 32 x 32 pixels"),
        (32, "an astronaut", "an astronaut"),
    ],
)
def test_the_miniature_world_scores_nothing_else(side, prompt, reason):
    with pytest.raises(InputError, match=reason):
        load_scorer("toy").score([Image.new("RGB", (side, side))], [prompt])


# ---- Files ---------------------------------------------------------------------------------------


def test_an_unknown_scorer_is_refused():
    with pytest.raises(InputError, match="scorer 'beauty': must be one of toy, pickscore, hps"):
        load_scorer("beauty")


def test_every_file_has_a_class():
    assert set(FILES) == {"toy", *NETWORK_SCORERS}
    for name, scorer in NETWORK_SCORERS.items():
        assert scorer.name == name


def test_a_file_that_cannot_be_had(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def refuse(repository, allow_patterns):
        asked.append((repository, allow_patterns))
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    reason = r" \(xswu/HPSv2: no such folder here, and not available from the hub: no network\)"
    advice = f"hps needs HPS_v2_compressed.pt: put it at {tmp_path}/HPSv2/HPS_v2_compressed.pt"
    with pytest.raises(InputError, match=advice + reason):
        load_scorer("hps", tmp_path)
    advice = "use --scorers FOLDER and put it at FOLDER/HPSv2/HPS_v2_compressed.pt"
    with pytest.raises(InputError, match=advice + reason):
        load_scorer("hps")
    assert asked == 2 * [("xswu/HPSv2", ["HPS_v2_compressed.pt"])]


def test_a_broken_file_is_refused_by_name(tmp_path):
    (tmp_path / "HPSv2").mkdir()
    (tmp_path / "HPSv2" / "HPS_v2_compressed.pt").write_bytes(b"no checkpoint")
    with pytest.raises(InputError, match="HPS_v2_compressed.pt: .*; not loaded"):
        load_scorer("hps", tmp_path)


def test_a_file_from_the_hub(scorers, small_scorers, monkeypatch):
    import huggingface_hub

    def deliver(repository, allow_patterns):
        return str(scorers / repository.split("/")[1])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", deliver)
    assert load_scorer("aesthetic").hash == load_scorer("aesthetic", scorers).hash
