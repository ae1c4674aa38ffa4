"""Checkpoint folders: what `save` writes, `load` reads back to the last bit; what is foreign is refused in one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spin.checkpoint import pipeline as weights
from spin.infra.run import InputError
from spin.text import BOS, EOS, Tokenizer


@pytest.fixture
def copy(tiny_folder, tmp_path) -> Path:
    """A tiny checkpoint of the test's own."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(path: Path, change) -> None:
    """change: {name: tensor} -> {name: tensor}."""
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}, path)


def states(sd) -> dict[str, torch.Tensor]:
    networks = {"unet": sd.unet, "vae": sd.vae, "text": sd.text_encoder.tower}
    return {f"{part}.{name}": t for part, network in networks.items() for name, t in network.state_dict().items()}


@torch.no_grad()
def assert_same(a, b) -> None:
    ours, theirs = states(a), states(b)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]), name
    for sd in (a, b):  # torch computes frozen attention along a faster path, which rounds differently
        sd.text_encoder.requires_grad_(False)
    prompts = ["a red circle!", ""]
    assert torch.equal(a.encode_prompts(prompts), b.encode_prompts(prompts))
    assert torch.equal(a.scheduler.alphas_cumprod, b.scheduler.alphas_cumprod)
    assert a.scheduler.prediction_type == b.scheduler.prediction_type


UNET, VAE, TEXT = (
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)

# ---------------------------------------------------------------------------------------------------------------------
# out and in again


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("folder", ["tiny_folder", "tiny2_folder"])
def test_round_trip_is_bit_equal(folder, dtype, tmp_path, request):
    sd = weights.load(request.getfixturevalue(folder), dtype)
    weights.save(sd, tmp_path / "saved")
    assert_same(sd, weights.load(tmp_path / "saved", dtype))


def test_saved_folder_has_every_file_of_the_diffusers_layout(sd, tmp_path):
    weights.save(sd, tmp_path)
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/special_tokens_map.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }
    assert json.loads((tmp_path / "tokenizer/tokenizer_config.json").read_text())["model_max_length"] == 77
    assert not (tmp_path / "tokenizer/merges.txt").read_text().endswith("\n")  # it would count as a merge


def test_loading_leaves_the_folder_and_its_files_alone(copy):
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    sd = weights.load(copy)
    with torch.no_grad():
        for network in (sd.unet, sd.vae, sd.text_encoder):
            for parameter in network.parameters():
                parameter.add_(1.0)
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_networks_come_back_in_eval_mode_and_trainable(tiny_folder):
    sd = weights.load(tiny_folder)
    for network in (sd.unet, sd.vae, sd.text_encoder):
        assert not any(module.training for module in network.modules())
        assert all(parameter.requires_grad for parameter in network.parameters())


def test_a_half_precision_label_is_not_handed_on(copy, tmp_path):
    """Our weights are float32: diffusers would load the text encoder in half and fail on the first picture."""
    edit_json(copy / "text_encoder/config.json", torch_dtype="float16")
    weights.save(weights.load(copy), tmp_path / "saved")
    assert "torch_dtype" not in json.loads((tmp_path / "saved/text_encoder/config.json").read_text())


def test_saved_files_are_readable_as_the_umask_says(sd, tmp_path):
    weights.save(sd, tmp_path)
    (tmp_path / "plain").touch()
    modes = {path.stat().st_mode for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == {(tmp_path / "plain").stat().st_mode}


def test_another_unet(tiny_folder, copy):
    edit_tensors(copy / UNET, lambda tensors: {name: tensor + 1 for name, tensor in tensors.items()})
    for source in (copy, copy / "unet"):
        mixed = weights.load(tiny_folder, unet=source)
        assert torch.equal(mixed.unet.conv_in.bias, weights.load(copy).unet.conv_in.bias)
        assert torch.equal(mixed.vae.quant_conv.bias, weights.load(tiny_folder).vae.quant_conv.bias)


# ---------------------------------------------------------------------------------------------------------------------
# folders of other generations of diffusers and transformers


def test_text_tensors_without_their_prefix(copy, sd):
    edit_tensors(copy / TEXT, lambda tensors: {name.removeprefix("text_model."): t for name, t in tensors.items()})
    assert_same(weights.load(copy), sd)


def test_stored_position_ids_are_ignored(copy, sd):
    ids = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    edit_tensors(copy / TEXT, lambda tensors: tensors | ids)
    assert_same(weights.load(copy), sd)


def test_old_attention_names_of_the_vae(copy, sd):
    def rename(name):
        for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        return name

    edit_tensors(copy / VAE, lambda tensors: {rename(name): tensor for name, tensor in tensors.items()})
    assert "decoder.mid_block.attentions.0.query.weight" in load_file(copy / VAE)
    assert_same(weights.load(copy), sd)


def test_half_precision_files(copy, sd):
    for name in (UNET, VAE, TEXT):
        edit_tensors(copy / name, lambda tensors: {name: tensor.half() for name, tensor in tensors.items()})
        (copy / name).rename(copy / name.replace(".safetensors", ".fp16.safetensors"))
    loaded = weights.load(copy)
    for name, tensor in states(loaded).items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, states(sd)[name].half().float())


def test_vae_without_scaling_factor_means_0_18215(copy):
    assert "scaling_factor" not in json.loads((copy / "vae/config.json").read_text())
    assert weights.load(copy).vae.scaling_factor == 0.18215
    edit_json(copy / "vae/config.json", scaling_factor=0.5)
    assert weights.load(copy).vae.scaling_factor == 0.5


SMALL = ["a </w>", "r e", "re d</w>"]  # three merges: a vocabulary of 517
PROMPT = "a red fox!"


def small_vocabulary() -> dict[str, int]:
    return Tokenizer(SMALL).vocab


@pytest.mark.parametrize("newline_at_the_end", [False, True])
def test_tokenizer_from_vocab_and_merges(newline_at_the_end, tmp_path):
    text = "#version: 0.2\n" + "\n".join(SMALL) + ("\n" if newline_at_the_end else "")
    (tmp_path / "merges.txt").write_text(text)
    (tmp_path / "vocab.json").write_text(json.dumps(small_vocabulary()))
    assert weights.load_tokenizer(tmp_path)([PROMPT]).tolist() == Tokenizer(SMALL)([PROMPT]).tolist()


@pytest.mark.parametrize("as_pairs", [False, True])
def test_tokenizer_from_tokenizer_json_alone(as_pairs, tmp_path):
    merges = [merge.split() for merge in SMALL] if as_pairs else SMALL
    model = {"model": {"vocab": small_vocabulary(), "merges": merges}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(model))
    assert weights.load_tokenizer(tmp_path)([PROMPT]).tolist() == Tokenizer(SMALL)([PROMPT]).tolist()


def test_ids_follow_from_the_merges():
    tokenizer = Tokenizer(SMALL, length=8)
    vocab = tokenizer.vocab
    assert [vocab["re"], vocab["red</w>"], vocab[BOS], vocab[EOS]] == [513, 514, 515, 516]
    expected = [vocab[token] for token in (BOS, "a</w>", "red</w>", "f", "o", "x</w>", "!</w>", EOS)]
    assert tokenizer([PROMPT]).tolist() == [expected]
    assert tokenizer([PROMPT * 3]).tolist()[0][-1] == vocab[EOS]  # cut, and still ended


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("token", ["!", {"content": "!", "lstrip": False}])
def test_pad_token(file, token, tmp_path):
    (tmp_path / file).write_text(json.dumps({"pad_token": token}))
    tokenizer = weights.load_tokenizer(tmp_path)
    assert tokenizer(["a"])[0, -1] == 0
    assert weights.load_tokenizer(tmp_path / "nothing")(["a"])[0, -1] == 49407


# ---------------------------------------------------------------------------------------------------------------------
# refusals


def drop(name):
    return lambda tensors: {n: tensor for n, tensor in tensors.items() if n != name}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


REFUSALS = {
    "no unet": (lambda f: shutil.rmtree(f / "unet"), "unet/config.json: no such file"),
    "no weights": (lambda f: (f / UNET).unlink(), "diffusion_pytorch_model.safetensors: no such file"),
    "truncated": (lambda f: truncate(f / UNET), "cut short"),
    "text file": (lambda f: (f / UNET).write_text("hello, I am a text file"), "no safetensors file"),
    "empty file": (lambda f: (f / VAE).write_bytes(b""), "no safetensors file"),
    "broken config": (lambda f: (f / "unet/config.json").write_text("{"), "not readable as JSON"),
    "config is a list": (lambda f: (f / "unet/config.json").write_text("[]"), "not a JSON object"),
    "config lacks": (lambda f: (f / "text_encoder/config.json").write_text("{}"), "lacks 'vocab_size'"),
    "one missing": (lambda f: edit_tensors(f / UNET, drop("conv_in.bias")), "1 missing (conv_in.bias)"),
    "all others": (lambda f: shutil.copy(f / VAE, f / UNET), "684 missing ("),
    "text missing": (
        lambda f: edit_tensors(f / TEXT, drop("text_model.final_layer_norm.bias")),
        "1 missing (final_layer_norm.bias)",
    ),
    "unexpected": (
        lambda f: edit_tensors(f / VAE, lambda tensors: tensors | {"lora.up": torch.ones(1)}),
        "1 unexpected (lora.up)",
    ),
    "shape": (
        lambda f: edit_tensors(f / UNET, lambda tensors: tensors | {"conv_in.bias": torch.ones(7)}),
        "1 of another shape (conv_in.bias is [7], not [32])",
    ),
    "another size": (lambda f: edit_json(f / "unet/config.json", block_out_channels=[32, 32, 32, 32]), "..."),
    "indivisible": (lambda f: edit_json(f / "unet/config.json", block_out_channels=[30, 64, 64, 64]), "config"),
    "SDXL": (lambda f: edit_json(f / "unet/config.json", addition_embed_type="text_time"), "addition_embed_type"),
    "inpainting": (lambda f: edit_json(f / "unet/config.json", in_channels=9), "in_channels is 9"),
    "block type": (lambda f: edit_json(f / "unet/config.json", down_block_types=["AttnDownBlock2D"] * 4), "Attn"),
    "SD-3 vae": (lambda f: edit_json(f / "vae/config.json", latent_channels=16), "latent_channels is 16"),
    "activation": (lambda f: edit_json(f / "text_encoder/config.json", hidden_act="relu"), "hidden_act is 'relu'"),
    "spacing": (lambda f: edit_json(f / "scheduler/scheduler_config.json", timestep_spacing="trailing"), "trailing"),
    "schedule": (lambda f: edit_json(f / "scheduler/scheduler_config.json", beta_schedule="cosine"), "cosine"),
    "prediction": (lambda f: edit_json(f / "scheduler/scheduler_config.json", prediction_type="sample"), "sample"),
    "small vocabulary": (lambda f: edit_json(f / "text_encoder/config.json", vocab_size=100), "49408 tokens"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_are_one_line_that_names_the_file(case, copy):
    damage, expected = REFUSALS[case]
    damage(copy)
    with pytest.raises(InputError) as error:
        weights.load(copy)
    message = str(error.value)
    assert expected in message and str(copy) in message
    assert "\n" not in message and len(message) < 700
    assert message.count(".weight") + message.count(".bias") <= 15  # five names of each kind


CONFIGS = {  # one wrong value each; the answer is a line, not a traceback
    "unet/config.json": [
        {"block_out_channels": []},
        {"block_out_channels": [-32, 64, 64, 64]},
        {"attention_head_dim": [8, 8]},
        {"attention_head_dim": "8"},
        {"attention_head_dim": 5},
        {"attention_head_dim": 0},
        {"norm_num_groups": 0},
        {"down_block_types": ["DownBlock2D"]},
        {"up_block_types": ["UpBlock2D"] * 5},
        {"sample_size": [8, 8]},
    ],
    "text_encoder/config.json": [{"num_attention_heads": 3}, {"hidden_size": 0}, {"num_hidden_layers": 0}],
    "vae/config.json": [{"block_out_channels": None}, {"down_block_types": ["AttnDownEncoderBlock2D"] * 4}],
    "scheduler/scheduler_config.json": [{"num_train_timesteps": 0}, {"steps_offset": None}, {"beta_start": "a"}],
}


@pytest.mark.parametrize("file, change", [(file, change) for file, changes in CONFIGS.items() for change in changes])
def test_impossible_configs(file, change, copy):
    edit_json(copy / file, **change)
    with pytest.raises(InputError) as error:
        weights.load(copy)
    assert str(copy / file.split("/")[0]) in str(error.value) and "\n" not in str(error.value)


def test_values_that_mean_the_default(copy, sd):
    edit_json(copy / "unet/config.json", only_cross_attention=[False] * 4, transformer_layers_per_block=[1] * 4)
    edit_json(copy / "vae/config.json", scaling_factor=None)
    assert_same(weights.load(copy), sd)


@pytest.mark.parametrize(
    "file, content",
    [
        ("tokenizer.json", {"model": None}),
        ("tokenizer.json", {"model": {"vocab": {}, "merges": [1, 2]}}),
        ("tokenizer_config.json", {"pad_token": {}}),
        ("tokenizer_config.json", {"pad_token": ["!"]}),
        ("tokenizer_config.json", {"pad_token": "no such token"}),
        ("vocab.json", {"a": 0}),  # without its merges
    ],
)
def test_impossible_tokenizers(file, content, tmp_path):
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(InputError) as error:
        weights.load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_tensor_under_two_names(copy):
    twice = {"final_layer_norm.bias": torch.zeros(32)}
    edit_tensors(copy / TEXT, lambda tensors: tensors | twice)
    with pytest.raises(InputError, match="holds some tensors twice"):
        weights.load(copy)


def test_vocabulary_that_its_merges_do_not_make(tmp_path):
    (tmp_path / "merges.txt").write_text("\n".join(SMALL))
    (tmp_path / "vocab.json").write_text(json.dumps(small_vocabulary() | {"re": 900}))
    with pytest.raises(InputError, match="its vocabulary is not the one its merges make.*: re"):
        weights.load_tokenizer(tmp_path)


def test_no_such_folder(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        weights.load(tmp_path / "missing")


def test_hash_tells_checkpoints_apart(copy, tiny_folder):
    assert weights.checkpoint_hash(copy) == weights.checkpoint_hash(tiny_folder)
    edit_tensors(copy / UNET, lambda tensors: tensors | {"conv_in.bias": tensors["conv_in.bias"] + 1e-6})
    assert weights.checkpoint_hash(copy) != weights.checkpoint_hash(tiny_folder)
    assert weights.checkpoint_hash(copy / "unet") != weights.checkpoint_hash(tiny_folder / "unet")


def test_hash_follows_links(tiny_folder, tmp_path):
    (tmp_path / "unet").symlink_to(tiny_folder / "unet")
    assert weights.checkpoint_hash(tmp_path) == weights.checkpoint_hash(tiny_folder / "unet")
