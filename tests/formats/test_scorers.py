"""The scorers: against transformers on deterministic weights, the published head, published layouts at full size."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import helpers
import torch
from PIL import Image
from safetensors.torch import load_file
from helpers import HEAD, REWARDS, WORDS, clip_config, tensors_of

from spin.eval import blip
from spin.eval import scorers as rewards
from spin.toy import world as toy
from spin.infra.run import InputError
from spin.text import Tokenizer, names

GOLDEN = load_file(helpers.DATA / "rewards_golden.safetensors")
PIXELS = load_file(helpers.DATA / "pixels.safetensors")
SIZES = [(300, 200), (97, 131), (512, 512)]
HERE = Path("somewhere")


@pytest.fixture(scope="module")
def clip():
    return rewards.load_clip(clip_config(REWARDS["pickscore.tiny.config"]), tensors_of("pickscore.tiny"), HERE, "cpu")


def load_tiny_imagereward(tensors):
    config = REWARDS["imagereward.tiny.config"]
    return rewards.load_imagereward(tensors, HERE, "cpu", config["vision"], config["text"])


# ---------------------------------------------------------------------------------------------------------------------
# networks


def test_pickscore_is_transformers(clip):
    images = helpers.oracle_input("pickscore.pixels", (2, 3, 56, 56))
    seen = clip.encode_image(images, normalize=True)
    said = clip.encode_text(GOLDEN["pickscore.helpers.ids"], normalize=True)
    close = {"atol": 2e-6, "rtol": 1e-5}
    torch.testing.assert_close(said, GOLDEN["pickscore.helpers.text_embeds"], **close)
    torch.testing.assert_close(seen, GOLDEN["pickscore.helpers.image_embeds"], **close)
    score = clip.logit_scale.exp() * (seen * said).sum(1)
    torch.testing.assert_close(score, GOLDEN["pickscore.helpers.score"], atol=2e-4, rtol=1e-5)


def test_imagereward_is_transformers():
    network = load_tiny_imagereward(tensors_of("imagereward.tiny"))
    ids, tokens = (GOLDEN[f"imagereward.tiny.{name}"] for name in ("ids", "image_tokens"))
    images = helpers.oracle_input("imagereward.pixels", (2, 3, 64, 64))
    close = {"atol": 5e-6, "rtol": 1e-5}
    torch.testing.assert_close(network.look(images), tokens, **close)
    torch.testing.assert_close(network.read(ids, tokens), GOLDEN["imagereward.helpers.text_cls"], **close)
    torch.testing.assert_close(network(images, ids), GOLDEN["imagereward.helpers.reward"], **close)
    assert torch.equal(ids != 0, GOLDEN["imagereward.helpers.mask"].bool())


@pytest.mark.parametrize("architecture, manifest", [("ViT-H-14", "pickscore"), ("ViT-L-14-quickgelu", None)])
def test_published_clips_fit_at_full_size(architecture, manifest):
    """Every name and shape of the published file has its place, and there is no other."""
    from open_clip import CLIP, get_model_config

    config = get_model_config(architecture)
    assert config.get("quick_gelu", False) == architecture.endswith("quickgelu") == (manifest is None)
    assert {rewards.CLIPS[name] for name in ("aesthetic", "clip")} == {"ViT-L-14-quickgelu"}, "OpenAI's activation"
    assert {rewards.CLIPS[name] for name in ("pickscore", "hps")} == {"ViT-H-14"}
    with torch.device("meta"):
        state = CLIP(**config).state_dict()
    table = rewards.clip_names(config)
    assert sorted(ours for _, ours in table) == sorted(state)
    theirs = [name for of, _ in table for name in of]
    assert len(set(theirs)) == len(theirs)
    if manifest:
        assert sorted(theirs) == sorted(REWARDS[manifest])
        for of, ours in table:
            shapes = [REWARDS[manifest][name] for name in of]
            shapes = [shape[::-1] if "_projection" in of[0] else shape for shape in shapes]
            rows = [sum(shape[0] for shape in shapes), *shapes[0][1:]] if shapes[0] else []
            assert rows == list(state[ours].shape), ours


def test_the_published_imagereward_fits_at_full_size():
    with torch.device("meta"):
        state = blip.ImageReward(rewards.VISION, rewards.TEXT).state_dict()
    table = names("blip", v=24, t=12)
    assert sorted(ours for _, ours in table) == sorted(state)
    published = {name: shape for name, shape in REWARDS["imagereward"].items() if not name.startswith("mlp.")}
    table = [(of, ours) for of, ours in table if not ours.startswith("head.")]  # the five layers, multiplied out
    assert sorted(name for of, _ in table for name in of) == sorted(published)
    for of, ours in table:
        shapes = [published[name] for name in of]
        assert [sum(shape[0] for shape in shapes), *shapes[0][1:]] == list(state[ours].shape), ours
    head = {name: math.prod(shape) for name, shape in REWARDS["imagereward"].items() if name.startswith("mlp.")}
    unused = 2 * 256 + 256 * 1024 + 256 * 768
    assert sum(map(math.prod, published.values())) + sum(head.values()) + unused == 446_665_953


def test_only_the_unused_tensors_may_be_there_or_not():
    unused = {f"blip.{which}_proj.{p}": torch.zeros(3) for which in ("vision", "text") for p in ("weight", "bias")}
    unused["blip.text_encoder.embeddings.position_ids"] = torch.arange(512)[None]
    tensors = tensors_of("imagereward.tiny")
    load_tiny_imagereward(tensors | unused)
    with pytest.raises(InputError, match="1 unexpected .blip.visual_encoder.extra"):
        load_tiny_imagereward(tensors | {"blip.visual_encoder.extra": torch.zeros(3)})
    with pytest.raises(InputError, match="1 missing .mlp.layers.4.bias"):
        load_tiny_imagereward({name: t for name, t in tensors.items() if name != "mlp.layers.4.bias"})
    with pytest.raises(InputError, match="1 missing .blip.text_encoder.encoder.layer.1.attention.self.key.bias"):
        load_tiny_imagereward({name: t for name, t in tensors.items() if "layer.1.attention.self.key.bias" not in name})


def test_older_clip_files_hold_position_ids(clip):
    tensors = tensors_of("pickscore.tiny")
    tensors |= {f"{which}_model.embeddings.position_ids": torch.arange(9)[None] for which in ("text", "vision")}
    again = rewards.load_clip(clip_config(REWARDS["pickscore.tiny.config"]), tensors, HERE, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), clip.state_dict().values()))
    with pytest.raises(InputError, match="1 missing .visual_projection.weight"):
        tensors.pop("visual_projection.weight")
        rewards.load_clip(clip_config(REWARDS["pickscore.tiny.config"]), tensors, HERE, "cpu")


def test_a_file_with_open_clips_own_names(clip):
    """As HPS has them, in half precision."""
    half = {name: tensor.half() for name, tensor in clip.state_dict().items()}
    again = rewards.load_clip(clip_config(REWARDS["pickscore.tiny.config"]), half, HERE, "cpu")
    assert torch.equal(again.visual.proj, half["visual.proj"].float())


# ---------------------------------------------------------------------------------------------------------------------
# the head


def test_the_published_aesthetic_head_is_one_affine_map():
    tensors = rewards.read_file(HEAD)
    x = helpers.oracle_input("head", (5, 768)).double()
    one_by_one = x
    for i in (0, 2, 4, 6, 7):
        one_by_one = one_by_one @ tensors[f"layers.{i}.weight"].double().T + tensors[f"layers.{i}.bias"].double()
    weight, bias = rewards.affine(tensors, "layers.", 768, HEAD)
    assert weight.shape == (1, 768) and bias.shape == (1,)
    torch.testing.assert_close((x.float() @ weight.T + bias).double(), one_by_one, atol=1e-4, rtol=1e-5)
    with pytest.raises(InputError, match="1 of another shape .layers.0.weight is .1024, 768., not .1024, 512."):
        rewards.affine(tensors, "layers.", 512, HEAD)


# ---------------------------------------------------------------------------------------------------------------------
# pictures and prompts


@pytest.mark.parametrize("i", range(3))
def test_pixels_are_those_of_the_published_preprocessing(i):
    picture = helpers.photograph(f"photograph.{i}", SIZES[i])
    for way, ours in (("clip", rewards.clip_pixels), ("hps", rewards.hps_pixels)):
        found = ours([picture, picture])
        assert found.shape == (2, 3, 224, 224)
        torch.testing.assert_close(found[1][:, ::5, ::5], PIXELS[f"{way}.{i}"], atol=2e-5, rtol=1e-5)


def test_word_pieces_are_transformers():
    tokenizer = blip.WordPiece(WORDS["vocab"])
    assert len(WORDS["prompts"]) == 20
    for prompt, ids in zip(WORDS["prompts"], WORDS["ids"]):
        assert tokenizer([prompt])[0].tolist() == ids, prompt
    assert tokenizer(WORDS["prompts"]).tolist() == WORDS["ids"]


def test_a_vocabulary_that_is_not_berts(scorers, small_scorers, tmp_path):
    shutil.copytree(scorers, tmp_path / "scorers")
    (tmp_path / "scorers/bert-base-uncased/vocab.txt").write_text("a\nb\n[UNK]\n")
    with pytest.raises(InputError, match=r"vocab.txt: .* not usable: lacks \[PAD\], \[CLS\], \[SEP\]"):
        rewards.load("imagereward", tmp_path / "scorers")


# ---------------------------------------------------------------------------------------------------------------------
# scorers, from a folder with files in the published layouts


def test_scales_and_conventions(scorers, small_scorers):
    pictures = [helpers.photograph(f"photograph.{i}", SIZES[i]) for i in range(2)]
    prompts = ["a red circle", "a cat on the moon"]
    loaded = {name: rewards.load(name, scorers) for name in ("pickscore", "hps", "clip", "aesthetic")}
    found = {name: scorer.score(pictures, prompts)[name] for name, scorer in loaded.items()}
    config = clip_config(REWARDS["pickscore.tiny.config"])
    network = rewards.load_clip(config, tensors_of("pickscore.tiny"), HERE, "cpu")
    said = network.encode_text(Tokenizer()(prompts), normalize=True)
    seen = network.encode_image(rewards.clip_pixels(pictures), normalize=True)
    cosine = (seen * said).sum(1)
    torch.testing.assert_close(torch.tensor(found["pickscore"]), math.exp(4.6052) * cosine, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(torch.tensor(found["clip"]), 100 * cosine, atol=1e-4, rtol=1e-5)
    seen_by_hps = network.encode_image(rewards.hps_pixels(pictures), normalize=True)
    torch.testing.assert_close(torch.tensor(found["hps"]), (seen_by_hps * said).sum(1), atol=2e-3, rtol=0)  # half
    tensors = rewards.read_file(scorers / "improved-aesthetic-predictor" / HEAD.name)
    x = seen
    for i in (0, 2, 4, 6, 7):
        x = x @ tensors[f"layers.{i}.weight"].T + tensors[f"layers.{i}.bias"]
    torch.testing.assert_close(torch.tensor(found["aesthetic"]), x[:, 0], atol=1e-4, rtol=1e-4)
    assert len({scorer.hash for scorer in loaded.values()}) == 3, "PickScore and CLIP score have the same file here"
    assert all(scorer.metrics == (name,) for name, scorer in loaded.items())


def test_a_score_does_not_depend_on_the_batch(scorers, small_scorers):
    pictures = [helpers.photograph(f"photograph.{i}", SIZES[i]) for i in range(3)]
    prompts = ["a red circle", "a cat on the moon", "art"]
    for name in ("pickscore", "hps", "aesthetic", "imagereward"):
        scorer = rewards.load(name, scorers)
        together = scorer.score(pictures, prompts)[name]
        alone = [scorer.score([picture], [prompt])[name][0] for picture, prompt in zip(pictures, prompts)]
        np.testing.assert_allclose(together, alone, atol=1e-4)
        assert together.dtype == np.float32 and len(set(together.round(3))) == 3


def test_the_miniature_worlds_score_has_the_same_face():
    scorer, scene = rewards.load("toy"), toy.SCENES[3]
    found = scorer.score([toy.to_pil(toy.ideal(scene))] * 2, [scene.caption, toy.SCENES[4].caption])
    assert set(found) == set(scorer.metrics) and scorer.judged_by == "reward"
    assert found["reward"][0] > 9.5 > found["reward"][1] and found["aligned"].tolist() == [1, 0]
    with pytest.raises(InputError, match="toy scores 32 x 32 pixels by captions of its world"):
        scorer.score([Image.new("RGB", (64, 64))], [scene.caption])
    with pytest.raises(InputError, match="an astronaut"):
        scorer.score([Image.new("RGB", (32, 32))], ["an astronaut"])


def test_a_file_that_cannot_be_had(tmp_path, monkeypatch):
    import huggingface_hub

    def refuse(repository, allow_patterns):
        assert (repository, allow_patterns) == ("xswu/HPSv2", ["HPS_v2_compressed.pt"])
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    reason = r" \(xswu/HPSv2: no such folder here, and not to be had from the hub: no network\)"
    put = f"hps needs HPS_v2_compressed.pt: put it at {tmp_path}/HPSv2/HPS_v2_compressed.pt"
    with pytest.raises(InputError, match=put + reason):
        rewards.load("hps", tmp_path)
    say = "hps needs HPS_v2_compressed.pt: say --scorers FOLDER, with it at FOLDER/HPSv2/HPS_v2_compressed.pt"
    with pytest.raises(InputError, match=say + reason):
        rewards.load("hps")
    (tmp_path / "HPSv2").mkdir()
    (tmp_path / "HPSv2/HPS_v2_compressed.pt").write_bytes(b"no checkpoint")
    with pytest.raises(InputError, match="HPS_v2_compressed.pt: .*; not read"):
        rewards.load("hps", tmp_path)


def test_a_file_from_the_hub(scorers, small_scorers, monkeypatch):
    import huggingface_hub

    def deliver(repository, allow_patterns):
        return str(scorers / repository.split("/")[1])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", deliver)
    assert rewards.load("aesthetic").hash == rewards.load("aesthetic", scorers).hash


def test_prompts_are_cleaned_as_each_scorer_cleans_them(scorers, small_scorers):
    """HPS and CLIP score by open_clip, which repairs quotes; PickScore by transformers, which does not."""
    picture, curly, straight = helpers.photograph("photograph.0", (60, 60)), "a corgi\u2019s head", "a corgi's head"
    for name, same in (("hps", True), ("clip", True), ("pickscore", False)):
        one, other = rewards.load(name, scorers).score([picture, picture], [curly, straight])[name]
        assert (one == other) == same
