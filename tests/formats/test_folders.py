"""Checkpoint folders: load_pipeline reads to the bit what save_pipeline wrote, and folders of other
generations. Anything else is refused in one line.
"""

import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import spin
from spin.checkpoint import hash_checkpoint, load_pipeline, load_unet, save_pipeline
from spin.checkpoint.pipeline import check_same_scaling
from spin.checkpoint.single_file import SingleFile
from spin.infra.errors import InputError

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


def edit_json(path: Path, **changes) -> None:
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps(config))


def set_tensor(path: Path, name: str, tensor: Tensor) -> None:
    tensors = load_file(path)
    tensors[name] = tensor
    save_file(tensors, path)


def delete_tensor(path: Path, name: str) -> None:
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path)


def file_contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -----------------------------------------------------------------------------
# written and read


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tag", ["tiny", "tiny2"])
def test_a_saved_pipeline_is_loaded_to_the_bit(
    tag, dtype, tiny_folder, tiny2_folder, tmp_path, assert_same_pipelines
):
    pipe = load_pipeline(tiny_folder if tag == "tiny" else tiny2_folder, dtype)
    save_pipeline(pipe, tmp_path / "saved")
    assert_same_pipelines(pipe, load_pipeline(tmp_path / "saved", dtype))


def test_a_saved_folder_has_every_file_of_the_diffusers_layout(pipe, tmp_path):
    save_pipeline(pipe, tmp_path)
    assert {str(path.relative_to(tmp_path)) for path in file_contents(tmp_path)} == {
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
    tokenizer_config = json.loads((tmp_path / "tokenizer/tokenizer_config.json").read_text())
    assert tokenizer_config["model_max_length"] == 77
    # a newline at the end would count as a merge
    assert not (tmp_path / "tokenizer/merges.txt").read_text().endswith("\n")

    (tmp_path / "plain").touch()
    modes = {path.stat().st_mode for path in file_contents(tmp_path)}
    assert len(modes) == 1, "every file is as readable as the umask says"


def test_changing_loaded_weights_leaves_the_files_unchanged(model_copy):
    before = file_contents(model_copy)
    pipe = load_pipeline(model_copy).freeze()
    for network in (pipe.unet, pipe.vae, pipe.text_encoder):
        for parameter in network.parameters():
            parameter.add_(1.0)
    assert file_contents(model_copy) == before


def test_networks_are_loaded_in_eval_mode_and_trainable_until_frozen(tiny_folder):
    pipe = load_pipeline(tiny_folder)
    for network in (pipe.unet, pipe.vae, pipe.text_encoder):
        assert not any(module.training for module in network.modules())
        assert all(parameter.requires_grad for parameter in network.parameters())
    assert pipe.freeze() is pipe
    for network in (pipe.unet, pipe.vae, pipe.text_encoder):
        assert not any(parameter.requires_grad for parameter in network.parameters())


def test_a_half_precision_label_is_not_saved(model_copy, tmp_path):
    """The saved weights are float32. Diffusers would load the text encoder in half, and fail."""
    edit_json(model_copy / "text_encoder/config.json", torch_dtype="float16", dtype="float16")
    save_pipeline(load_pipeline(model_copy), tmp_path / "saved")
    config = json.loads((tmp_path / "saved/text_encoder/config.json").read_text())
    assert "torch_dtype" not in config
    assert "dtype" not in config


def test_the_unet_of_another_checkpoint(tiny_folder, model_copy, pipe):
    bias = load_file(model_copy / UNET)["conv_in.bias"] + 1
    set_tensor(model_copy / UNET, "conv_in.bias", bias)
    set_tensor(model_copy / VAE, "quant_conv.bias", torch.zeros(8))
    for source in (model_copy, model_copy / "unet"):
        mixed = load_pipeline(tiny_folder, unet=source)
        assert torch.equal(mixed.unet.conv_in.bias, bias)
        assert torch.equal(mixed.vae.quant_conv.bias, pipe.vae.quant_conv.bias)
        assert torch.equal(load_unet(source).conv_in.bias, bias)


# -----------------------------------------------------------------------------
# folders of other generations of diffusers and transformers


def test_text_tensors_without_their_prefix(model_copy, pipe, assert_same_pipelines):
    tensors = load_file(model_copy / TEXT)
    renamed = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    save_file(renamed, model_copy / TEXT)
    assert_same_pipelines(load_pipeline(model_copy), pipe)


def test_stored_position_ids_are_ignored(model_copy, pipe, assert_same_pipelines):
    ids = torch.arange(77)[None]
    set_tensor(model_copy / TEXT, "text_model.embeddings.position_ids", ids)
    assert_same_pipelines(load_pipeline(model_copy), pipe)


def test_old_attention_names_of_the_vae(model_copy, pipe, assert_same_pipelines):
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in load_file(model_copy / VAE).items():
        for new, old in old_names.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        renamed[name] = tensor
    assert "decoder.mid_block.attentions.0.query.weight" in renamed
    save_file(renamed, model_copy / VAE)
    assert_same_pipelines(load_pipeline(model_copy), pipe)


def test_half_precision_files(model_copy, tiny_folder, assert_same_weights):
    for name in (UNET, VAE, TEXT):
        tensors = load_file(model_copy / name)
        halves = {tensor_name: tensor.half() for tensor_name, tensor in tensors.items()}
        save_file(halves, model_copy / name.replace(".safetensors", ".fp16.safetensors"))
        (model_copy / name).unlink()

    expected = load_pipeline(tiny_folder, torch.float16)
    for network in (expected.unet, expected.vae, expected.text_encoder):
        network.float()
    assert_same_weights(load_pipeline(model_copy), expected)


def test_a_vae_without_scaling_factor_has_0_18215(model_copy):
    path = model_copy / "vae/config.json"
    assert "scaling_factor" not in json.loads(path.read_text())
    assert load_pipeline(model_copy).vae.scaling_factor == 0.18215
    edit_json(path, scaling_factor=0.5)
    assert load_pipeline(model_copy).vae.scaling_factor == 0.5


def test_values_that_mean_the_default(model_copy, pipe, assert_same_pipelines):
    edit_json(
        model_copy / "unet/config.json",
        only_cross_attention=[False] * 4,
        transformer_layers_per_block=[1] * 4,
    )
    edit_json(model_copy / "vae/config.json", scaling_factor=None)
    assert_same_pipelines(load_pipeline(model_copy), pipe)


@pytest.mark.parametrize(
    "file, setting",
    [
        ("unet/config.json", {"freq_shift": 5}),
        ("unet/config.json", {"downsample_padding": 0}),
        ("unet/config.json", {"class_embed_type": "timestep"}),
        ("vae/config.json", {"scaling_factor": 5.0}),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}),
    ],
)
def test_settings_that_are_listed_as_defaults_have_the_default(
    file, setting, model_copy, pipe, assert_same_pipelines
):
    """diffusers drops the settings that a config lists under _use_default_values."""
    [key] = setting
    edit_json(model_copy / file, **setting, _use_default_values=[key])
    loaded = load_pipeline(model_copy)
    assert_same_pipelines(loaded, pipe)
    assert loaded.vae.scaling_factor == 0.18215
    assert key not in loaded.unet.config


def test_transformers_knows_no_list_of_defaults(model_copy):
    path = model_copy / "text_encoder/config.json"
    edit_json(path, hidden_act="gelu", _use_default_values=["hidden_act"])
    assert load_pipeline(model_copy).text_encoder.config["hidden_act"] == "gelu"


def test_a_list_of_defaults_that_is_none_is_refused(model_copy):
    edit_json(model_copy / "unet/config.json", _use_default_values="freq_shift")
    assert_refused(model_copy, "_use_default_values is 'freq_shift', not a list")


# -----------------------------------------------------------------------------
# model_index.json

# as published with Stable Diffusion
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.6.0",
    "requires_safety_checker": True,
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "image_encoder": [None, None],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "PNDMScheduler"],
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"feature_extractor": ["transformers", "CLIPFeatureExtractor"]},
        {"feature_extractor": [None, None], "safety_checker": None},
        {"tokenizer": ["transformers", "CLIPTokenizerFast"]},
        {"scheduler": ["diffusers", "EulerAncestralDiscreteScheduler"]},
        {"_class_name": "StableDiffusionImg2ImgPipeline"},
        {"_class_name": "StableDiffusionInpaintPipelineLegacy"},
        {"_class_name": ["my_pipeline", "MyPipeline"], "_name_or_path": "org/name"},
    ],
    ids=str,
)
def test_the_index_of_a_stable_diffusion_changes_nothing(
    changes, model_copy, pipe, assert_same_pipelines
):
    before = hash_checkpoint(model_copy)
    (model_copy / "model_index.json").write_text(json.dumps(INDEX | changes))
    assert_same_pipelines(load_pipeline(model_copy), pipe)
    assert hash_checkpoint(model_copy) == before


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"_class_name": "AltDiffusionPipeline"}, "AltDiffusionPipeline: its text encoder is not"),
        ({"_class_name": "LatentConsistencyModelPipeline"}, "without classifier-free guidance"),
        ({"_class_name": "StableDiffusionGLIGENPipeline"}, "its UNet has boxes as an input"),
        ({"controlnet": ["diffusers", "ControlNetModel"]}, "a part controlnet (ControlNetModel)"),
        ({"controlnet": ["diffusers", ["ControlNetModel"] * 2]}, "a part controlnet (['Control"),
        ({"image_encoder": ["transformers", "CLIPVisionModelWithProjection"]}, "image_encoder"),
        ({"text_encoder_2": ["transformers", "CLIPTextModel"]}, "CLIPTextModelWithProjection"),
        ({"text_encoder_3": ["transformers", "T5EncoderModel"]}, "a part text_encoder_3"),
        ({"motion_adapter": ["diffusers", "MotionAdapter"]}, "a part motion_adapter"),
        ({"unet": ["diffusers", "UNetMotionModel"]}, "its unet is UNetMotionModel"),
        ({"vae": ["diffusers", "AsymmetricAutoencoderKL"]}, "its vae is AsymmetricAuto"),
        ({"text_encoder": ["alt", "RobertaSeriesModel"]}, "it is CLIPTextModel"),
        ({"tokenizer": ["transformers", "XLMRobertaTokenizer"]}, "CLIPTokenizer or CLIPTokenizer"),
    ],
    ids=str,
)
def test_an_index_of_another_model_is_refused(changes, expected, model_copy):
    (model_copy / "model_index.json").write_text(json.dumps(INDEX | changes))
    assert_refused(model_copy, expected)
    with pytest.raises(InputError, match="model_index.json: "):
        load_unet(model_copy)


def test_a_saved_folder_has_an_index_that_is_accepted(pipe, tmp_path, assert_same_pipelines):
    save_pipeline(pipe, tmp_path)
    assert (tmp_path / "model_index.json").exists()
    assert_same_pipelines(load_pipeline(tmp_path), pipe)


# -----------------------------------------------------------------------------
# folders that are taken for a model


def remove_parts(folder: Path, *parts: str) -> None:
    for part in parts:
        shutil.rmtree(folder / part)


@pytest.mark.parametrize("beside", ["optimizer.bin", "random_states_0.pkl", "unet_ema"])
def test_a_training_state_holds_only_a_unet(beside, model_copy, tiny_folder):
    remove_parts(model_copy, "vae", "text_encoder", "scheduler")
    (model_copy / beside).touch()
    assert_refused(model_copy, "holds only a UNet: pass it as --unet, and its base as --model")
    load_pipeline(tiny_folder, unet=model_copy)


def test_a_training_state_with_a_text_encoder_is_not_called_a_unet(model_copy):
    """With --unet, the trained text encoder would be lost."""
    remove_parts(model_copy, "vae", "scheduler")
    (model_copy / "random_states_0.pkl").touch()
    assert_refused(model_copy, "vae/config.json: no such file")


def test_a_folder_unet_alone_is_no_model(tiny_folder):
    assert_refused(tiny_folder / "unet", "holds only a UNet: pass it as --unet")


@pytest.mark.parametrize(
    "model", ["iter1/checkpoint", "checkpoint", "checkpoint-500", "snapshots/0a1b2c"]
)
def test_a_folder_of_models_says_where_they_are(model, model_copy, tmp_path):
    """A run of train.py, an iteration of it, a training by diffusers, the cache of the hub."""
    folder = tmp_path / "folder"
    shutil.move(model_copy, folder / model)
    (folder / "config.json").write_text("{}")
    assert_refused(folder, f"no model itself, but folders in it are: choose one ({model})")
    with pytest.raises(InputError, match="choose one"):
        load_unet(folder)


@pytest.mark.parametrize(
    "files, expected",
    [
        (["pytorch_lora_weights.safetensors"], "LoRA weights: merge them"),
        (["adapter_config.json", "adapter_model.safetensors"], "LoRA weights: merge them"),
        (["pytorch_lora_weights.safetensors", "random_states_0.pkl"], "LoRA weights: merge them"),
        (["learned_embeds.bin"], "a textual inversion"),
        (["pytorch_model.bin", "random_states_0.pkl"], "a training state of accelerate"),
        (["model.safetensors", "optimizer.bin", "random_states_0.pkl"], "a training state of"),
        (["b.ckpt", "a.safetensors", "a.yaml"], "choose one (a.safetensors, b.ckpt)"),
        ([], "unet/config.json: no such file"),
    ],
    ids=str,
)
def test_other_folders_are_called_what_they_are(files, expected, tmp_path):
    for file in files:
        (tmp_path / file).touch()
    assert_refused(tmp_path, expected)


# -----------------------------------------------------------------------------
# a UNet of latents of another scale


def test_a_unet_of_latents_of_another_scale_is_refused(tiny_folder, model_copy):
    edit_json(model_copy / "vae/config.json", scaling_factor=0.13025)
    for source in (model_copy, model_copy / "unet"):
        with pytest.raises(InputError, match=f"UNet of {source} is for latents times 0.13025"):
            load_pipeline(tiny_folder, unet=source)
    load_pipeline(model_copy)
    edit_json(model_copy / "vae/config.json", _use_default_values=["scaling_factor"])
    load_pipeline(tiny_folder, unet=model_copy)


def test_a_unet_of_a_single_file_is_of_latents_of_the_usual_scale(model_copy):
    file = Mock(spec=SingleFile, read_scaling_factor_of_unet=lambda: 0.18215)
    check_same_scaling(load_pipeline(model_copy).vae, file, "model", "file.ckpt")
    edit_json(model_copy / "vae/config.json", scaling_factor=0.5)
    with pytest.raises(InputError, match="of file.ckpt is for latents times 0.18215 .*states 0.5:"):
        check_same_scaling(load_pipeline(model_copy).vae, file, "model", "file.ckpt")


def test_a_unet_without_a_vae_beside_it_may_have_any_scale(tiny_folder, model_copy, tmp_path):
    shutil.copytree(tiny_folder / "unet", tmp_path / "alone/unet")
    edit_json(model_copy / "vae/config.json", scaling_factor=0.5)
    assert load_pipeline(model_copy, unet=tmp_path / "alone").vae.scaling_factor == 0.5


# -----------------------------------------------------------------------------
# refusals


def assert_refused(folder: Path, expected: str) -> None:
    """Assert that loading ends in one short line that holds `expected` and names the folder."""
    with pytest.raises(InputError) as error:
        load_pipeline(folder)
    message = str(error.value)
    assert expected in message
    assert str(folder) in message
    assert "\n" not in message
    assert len(message) < 700
    # five names of each kind of difference
    assert message.count(".weight") + message.count(".bias") <= 15


@pytest.mark.parametrize(
    "file, content, expected",
    [
        (UNET, b"hello, I am a text file", "not a safetensors file"),
        (VAE, b"", "not a safetensors file"),
        ("unet/config.json", b"{", "not readable as JSON"),
        ("unet/config.json", b"[]", "not a JSON object"),
        ("text_encoder/config.json", b"{}", "lacks 'vocab_size'"),
    ],
)
def test_a_file_with_other_content_is_refused(file, content, expected, model_copy):
    (model_copy / file).write_bytes(content)
    assert_refused(model_copy, expected)


def test_a_truncated_file_is_refused(model_copy):
    content = (model_copy / UNET).read_bytes()
    (model_copy / UNET).write_bytes(content[:-1000])
    assert_refused(model_copy, "truncated")


def test_missing_files_are_refused(model_copy):
    (model_copy / UNET).unlink()
    assert_refused(model_copy, "diffusion_pytorch_model.safetensors: no such file")
    shutil.rmtree(model_copy / "unet")
    assert_refused(model_copy, "unet/config.json: no such file")
    shutil.rmtree(model_copy)
    assert_refused(model_copy, "no such folder")


def test_missing_tensors_are_refused(model_copy):
    delete_tensor(model_copy / TEXT, "text_model.final_layer_norm.bias")
    assert_refused(model_copy, "1 missing (final_layer_norm.bias)")
    delete_tensor(model_copy / UNET, "conv_in.bias")
    assert_refused(model_copy, "1 missing (conv_in.bias)")


def test_unexpected_tensors_are_refused(model_copy):
    set_tensor(model_copy / VAE, "lora.up", torch.ones(1))
    assert_refused(model_copy, "1 unexpected (lora.up)")
    shutil.copy(model_copy / VAE, model_copy / UNET)
    assert_refused(model_copy, "684 missing (")


def test_tensors_of_another_shape_are_refused(model_copy):
    set_tensor(model_copy / UNET, "conv_in.bias", torch.ones(7))
    assert_refused(model_copy, "1 of another shape (conv_in.bias is [7], not [32])")
    edit_json(model_copy / "unet/config.json", block_out_channels=[32, 32, 32, 32])
    assert_refused(model_copy, ", ...")  # there are more than five


def test_a_tensor_under_two_names_is_refused(model_copy):
    set_tensor(model_copy / TEXT, "final_layer_norm.bias", torch.zeros(32))
    assert_refused(model_copy, "holds some tensors twice")


@pytest.mark.parametrize(
    "file, changes, expected",
    [
        ("unet/config.json", {"block_out_channels": [30, 64, 64, 64]}, "config"),
        ("unet/config.json", {"addition_embed_type": "image"}, "addition_embed_type"),
        ("unet/config.json", {"in_channels": 9}, "in_channels is 9"),  # inpainting
        ("unet/config.json", {"down_block_types": ["AttnDownBlock2D"] * 4}, "AttnDownBlock2D"),
        ("vae/config.json", {"latent_channels": 16}, "latent_channels is 16"),  # SD-3
        ("text_encoder/config.json", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("text_encoder/config.json", {"vocab_size": 100}, "49408 tokens"),
    ],
)
def test_configs_of_other_models_are_refused(file, changes, expected, model_copy):
    edit_json(model_copy / file, **changes)
    assert_refused(model_copy, expected)


@pytest.mark.parametrize(
    "part, changes",
    [
        ("unet", {"block_out_channels": []}),
        ("unet", {"block_out_channels": [-32, 64, 64, 64]}),
        ("unet", {"attention_head_dim": [8, 8]}),
        ("unet", {"attention_head_dim": "8"}),
        ("unet", {"attention_head_dim": 5}),
        ("unet", {"attention_head_dim": 0}),
        ("unet", {"norm_num_groups": 0}),
        ("unet", {"down_block_types": ["DownBlock2D"]}),
        ("unet", {"up_block_types": ["UpBlock2D"] * 5}),
        ("unet", {"sample_size": [8, 8, 8]}),
        ("text_encoder", {"num_attention_heads": 3}),
        ("text_encoder", {"hidden_size": 0}),
        ("text_encoder", {"num_hidden_layers": 0}),
        ("vae", {"block_out_channels": None}),
        ("vae", {"scaling_factor": 0}),
        ("vae", {"scaling_factor": -0.5}),
        ("vae", {"scaling_factor": float("nan")}),
        ("vae", {"scaling_factor": "0.18215"}),
        ("vae", {"down_block_types": ["AttnDownEncoderBlock2D"] * 4}),
    ],
)
def test_impossible_configs_are_refused(part, changes, model_copy):
    edit_json(model_copy / part / "config.json", **changes)
    assert_refused(model_copy, str(model_copy / part))


@pytest.mark.parametrize(
    "version, stated, expected", [("0.8.1", 32, 64), ("0.9.0", 32, 32), ("0.8.1", 96, 96)]
)
def test_the_sample_size_of_folders_from_before_diffusers_0_9_is_corrected(
    version, stated, expected, model_copy
):
    path = model_copy / "unet" / "config.json"
    edit_json(path, _diffusers_version=version, sample_size=stated)
    assert load_unet(model_copy).sample_size == expected


# -----------------------------------------------------------------------------
# hashes


def test_the_hash_changes_with_the_weights(model_copy, tiny_folder):
    assert hash_checkpoint(model_copy) == hash_checkpoint(tiny_folder)
    bias = load_file(model_copy / UNET)["conv_in.bias"] + 1e-6
    set_tensor(model_copy / UNET, "conv_in.bias", bias)
    assert hash_checkpoint(model_copy) != hash_checkpoint(tiny_folder)
    assert hash_checkpoint(model_copy / "unet") != hash_checkpoint(tiny_folder / "unet")


def test_the_hash_follows_links(tiny_folder, tmp_path):
    (tmp_path / "unet").symlink_to(tiny_folder / "unet")
    assert hash_checkpoint(tmp_path) == hash_checkpoint(tiny_folder / "unet")


def test_the_hash_of_the_toys_checkpoint():
    """A run's folder holds its model's hash: another way to hash would break every older run."""
    base = Path(spin.__file__).parent / "toy/base"
    assert hash_checkpoint(base) == "6f959b324ee7689c"
