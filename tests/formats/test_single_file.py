"""Single files in the original layout, and files that are something else.

The name tables were compared once, name by name, with diffusers' own conversion of SD-1.x and 2.x.
"""

import json
import re
import shutil
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers import MANIFEST, write_json
from safetensors.torch import load_file, save_file

import sample
import train
from spin.checkpoint import (
    Pipeline,
    hash_checkpoint,
    load_pipeline,
    load_unet,
    save_single_file,
    single_file,
)
from spin.checkpoint.configs import SD_1, SD_2
from spin.infra.errors import InputError
from spin.text import Tokenizer


@dataclass
class Example:
    """A tiny model and the single file that it was saved to."""

    tag: str  # "tiny" (as SD-1.x) or "tiny2" (as SD-2.x)
    pipe: Pipeline
    path: Path


@pytest.fixture(scope="module")
def examples(tiny_folder, tiny2_folder, tmp_path_factory) -> dict[str, Example]:
    examples = {}
    for tag, folder in (("tiny", tiny_folder), ("tiny2", tiny2_folder)):
        path = tmp_path_factory.mktemp(tag) / "model.safetensors"
        pipe = load_pipeline(folder)
        with pytest.MonkeyPatch.context() as patch:
            expect_sizes(patch, tag)
            save_single_file(pipe, path)
        examples[tag] = Example(tag, pipe, path)
    return examples


@pytest.fixture(params=["tiny", "tiny2"])
def example(request, examples, monkeypatch) -> Example:
    """One of the two, while files are taken to have its sizes. Copy what you change."""
    expect_sizes(monkeypatch, request.param)
    return examples[request.param]


def expect_sizes(monkeypatch: pytest.MonkeyPatch, tag: str) -> None:
    """Make single files have the tiny model's configs in place of Stable Diffusion's."""
    for name, published in (("SD_1", SD_1), ("SD_2", SD_2)):
        config = dict(MANIFEST[f"{tag}.config"])
        config["scheduler"] = published["scheduler"]
        monkeypatch.setattr(single_file, name, config)


# -----------------------------------------------------------------------------
# the original layout


def test_a_saved_file_is_loaded_to_the_bit(example, assert_same_pipelines):
    loaded = load_pipeline(example.path)
    assert_same_pipelines(loaded, example.pipe)
    pad_token = example.pipe.text_encoder.tokenizer.pad_token
    assert loaded.text_encoder.tokenizer.pad_token == pad_token


@pytest.mark.parametrize(
    "file, changes",
    [
        ("unet/config.json", {"downsample_padding": 0}),
        ("unet/config.json", {"norm_num_groups": 16}),
        ("unet/config.json", {"norm_eps": 1e-6}),
        ("unet/config.json", {"attention_head_dim": 4}),
        ("unet/config.json", {"attention_head_dim": [8, 8, 8, 4]}),
        ("unet/config.json", {"freq_shift": 1}),
        ("unet/config.json", {"flip_sin_to_cos": False}),
        ("text_encoder/config.json", {"num_attention_heads": 2}),
        ("vae/config.json", {"norm_num_groups": 16}),
        ("scheduler/scheduler_config.json", {"steps_offset": 0}),
        ("scheduler/scheduler_config.json", {"set_alpha_to_one": True}),
    ],
    ids=str,
)
def test_a_setting_that_a_file_cannot_state_is_not_saved(
    file, changes, model_copy, tmp_path, monkeypatch
):
    expect_sizes(monkeypatch, "tiny")
    path = model_copy / file
    write_json(path, json.loads(path.read_text()) | changes)
    [key] = changes
    with pytest.raises(InputError, match=f"a single file states no {key}; it would mean"):
        save_single_file(load_pipeline(model_copy), tmp_path / "model.safetensors")
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(
    "file, changes",
    [
        ("unet/config.json", {"attention_head_dim": [8, 8, 8, 8]}),
        ("unet/config.json", {"sample_size": 8}),
        ("unet/config.json", {"upcast_attention": True}),
        ("vae/config.json", {"scaling_factor": 0.18215}),
        ("scheduler/scheduler_config.json", {"_class_name": "EulerDiscreteScheduler"}),
    ],
    ids=str,
)
def test_the_same_settings_in_other_words_are_saved(
    file, changes, model_copy, tmp_path, monkeypatch, assert_same_pipelines
):
    """So is another sample_size: it is a default for users, and fixes nothing."""
    expect_sizes(monkeypatch, "tiny")
    path = model_copy / file
    write_json(path, json.loads(path.read_text()) | changes)
    pipe = load_pipeline(model_copy)
    save_single_file(pipe, tmp_path / "model.safetensors")
    assert_same_pipelines(load_pipeline(tmp_path / "model.safetensors"), pipe)


@pytest.mark.parametrize("changes", [{"pad_token": "a"}, {"length": 70}], ids=str)
def test_a_file_states_no_tokenizer_so_only_the_usual_one_is_saved(changes, example, tmp_path):
    pipe = load_pipeline(example.path)
    usual = pipe.text_encoder.tokenizer
    settings = {"pad_token": usual.pad_token, "length": usual.length, **changes}
    pipe.text_encoder.tokenizer = Tokenizer(None, **settings)
    path = tmp_path / "model.safetensors"
    with pytest.raises(InputError, match="states no tokenizer; it would mean CLIP's, padded with"):
        save_single_file(pipe, path)
    assert not path.exists()


def test_half_precision_is_kept(example, tmp_path, assert_same_weights):
    halves = load_pipeline(example.path, torch.float16)
    save_single_file(halves, tmp_path / "model.safetensors")
    dtypes = {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()}
    assert dtypes == {torch.float16}
    assert_same_weights(load_pipeline(tmp_path / "model.safetensors", torch.float16), halves)


def test_other_tensors_of_a_training_checkpoint_are_not_read(
    example, tmp_path, assert_same_weights
):
    tensors = load_file(example.path)
    for name, tensor in load_file(example.path).items():
        if name.startswith("model.diffusion_model."):
            averaged = name.replace("model.diffusion_model.", "model_ema.diffusion_model")
            tensors[averaged] = tensor + 1
    tensors["model_ema.decay"] = torch.tensor(0.9999)
    if example.tag == "tiny":
        position_ids = "cond_stage_model.transformer.text_model.embeddings.position_ids"
        tensors[position_ids] = torch.arange(77)[None]
    else:
        tensors["cond_stage_model.model.transformer.resblocks.23.ln_1.weight"] = torch.zeros(3)
        tensors["cond_stage_model.model.logit_scale"] = torch.zeros(())
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": tensors, "global_step": 470000}, path)
    assert_same_weights(load_pipeline(path), example.pipe)
    assert hash_checkpoint(path) != hash_checkpoint(example.path)


def test_a_checkpoint_of_pytorch_lightning(example, tmp_path, monkeypatch, assert_same_weights):
    """Published .ckpt files name one of its classes, as the key of a callback's state.

    Keys may be numbers, too.
    """
    module_name = "pytorch_lightning.callbacks.model_checkpoint"
    callback = type("ModelCheckpoint", (), {"__module__": module_name})
    module = types.ModuleType(module_name)
    module.ModelCheckpoint = callback
    tensors = load_file(example.path)
    tensors[7] = torch.zeros(1)
    content = {"state_dict": tensors, "callbacks": {callback: {"monitor": "loss"}}}
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
        patch.setitem(sys.modules, "pytorch_lightning.callbacks", types.ModuleType("callbacks"))
        patch.setitem(sys.modules, module_name, module)
        torch.save(content, tmp_path / "model.ckpt")
    assert module_name not in sys.modules
    assert_same_weights(load_pipeline(tmp_path / "model.ckpt"), example.pipe)


@pytest.mark.parametrize("configs", [SD_1, SD_2], ids=["SD-1.x", "SD-2.x"])
def test_the_unets_names_are_a_bijection_at_full_size(configs):
    names = single_file.original_unet_names(configs["unet"])
    assert len(names) == len(set(names.values())) == 686
    published = {
        "time_embedding.linear_1.weight": "time_embed.0.weight",
        "conv_in.bias": "input_blocks.0.0.bias",
        "down_blocks.0.attentions.1.proj_in.weight": "input_blocks.2.1.proj_in.weight",
        "down_blocks.0.downsamplers.0.conv.weight": "input_blocks.3.0.op.weight",
        "down_blocks.1.resnets.0.conv_shortcut.weight": "input_blocks.4.0.skip_connection.weight",
        "down_blocks.3.resnets.1.conv2.bias": "input_blocks.11.0.out_layers.3.bias",
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight": (
            "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
        ),
        "mid_block.resnets.1.time_emb_proj.weight": "middle_block.2.emb_layers.1.weight",
        "up_blocks.0.upsamplers.0.conv.weight": "output_blocks.2.1.conv.weight",
        "up_blocks.1.upsamplers.0.conv.weight": "output_blocks.5.2.conv.weight",
        "up_blocks.3.attentions.2.norm.weight": "output_blocks.11.1.norm.weight",
        "conv_out.weight": "out.2.weight",
    }
    for ours, original in published.items():
        assert names[ours] == "model.diffusion_model." + original


@pytest.mark.parametrize("configs", [SD_1, SD_2], ids=["SD-1.x", "SD-2.x"])
def test_the_vaes_names_are_a_bijection_at_full_size(configs):
    names = single_file.original_vae_names(configs["vae"])
    assert len(names) == len(set(names.values())) == 248
    published = {
        "encoder.down_blocks.1.resnets.0.conv_shortcut.weight": (
            "encoder.down.1.block.0.nin_shortcut.weight"
        ),
        "encoder.down_blocks.2.downsamplers.0.conv.bias": "encoder.down.2.downsample.conv.bias",
        "encoder.mid_block.attentions.0.to_q.weight": "encoder.mid.attn_1.q.weight",
        "decoder.mid_block.attentions.0.to_out.0.weight": "decoder.mid.attn_1.proj_out.weight",
        "decoder.mid_block.resnets.1.conv1.weight": "decoder.mid.block_2.conv1.weight",
        "decoder.up_blocks.0.resnets.2.norm1.weight": "decoder.up.3.block.2.norm1.weight",
        "decoder.up_blocks.2.upsamplers.0.conv.weight": "decoder.up.1.upsample.conv.weight",
        "decoder.conv_norm_out.bias": "decoder.norm_out.bias",
        "quant_conv.weight": "quant_conv.weight",
    }
    for ours, original in published.items():
        assert names[ours] == "first_stage_model." + original


def test_the_attention_of_a_files_vae_is_made_of_convolutions(example):
    tensors = load_file(example.path)
    linear = example.pipe.vae.encoder.mid_block.attentions[0].to_q
    convolution = tensors["first_stage_model.encoder.mid.attn_1.q.weight"]
    assert torch.equal(convolution, linear.weight[:, :, None, None])
    assert torch.equal(tensors["first_stage_model.encoder.mid.attn_1.q.bias"], linear.bias)


def test_the_unet_of_a_file_in_another_model(examples, tiny_folder, monkeypatch, tmp_path):
    expect_sizes(monkeypatch, "tiny")
    pipe = load_pipeline(examples["tiny"].path).freeze()
    pipe.unet.conv_in.bias += 1
    path = tmp_path / "changed.safetensors"
    save_single_file(pipe, path)
    bias = pipe.unet.conv_in.bias
    assert torch.equal(load_unet(path).conv_in.bias, bias)
    assert torch.equal(load_pipeline(tiny_folder, unet=path).unet.conv_in.bias, bias)
    assert torch.equal(load_pipeline(path, unet=tiny_folder).unet.conv_in.bias + 1, bias)


def test_sample_py_saves_a_single_file(
    tiny_folder, pipe, tmp_path, monkeypatch, assert_same_weights
):
    expect_sizes(monkeypatch, "tiny")
    out = tmp_path / "single" / "model.safetensors"
    flags = ["--model", str(tiny_folder), "--save-single", str(out), "--device", "cpu"]
    sample.main([*flags, "--out", str(tmp_path / "images")])
    assert_same_weights(load_pipeline(out), pipe)


def test_train_py_starts_from_a_single_file(examples, image_folder, tmp_path, monkeypatch):
    expect_sizes(monkeypatch, "tiny")
    flags = "--resolution 64 --iterations 1 --steps 1 --batch-size 1 --sampler-steps 2"
    flags += " --grid-prompts 0 --device cpu"
    paths = ["--model", str(examples["tiny"].path), "--data", str(image_folder)]
    train.main([*paths, "--out", str(tmp_path / "run"), *flags.split()])
    load_unet(tmp_path / "run/iter1/checkpoint")


# -----------------------------------------------------------------------------
# other generations of files

TEXT_PREFIX = "cond_stage_model.transformer.text_model."
OLD_TEXT_PREFIX = "cond_stage_model.transformer."  # NovelAI's, and of merges with it


@pytest.fixture
def sd_1(examples, monkeypatch) -> Example:
    expect_sizes(monkeypatch, "tiny")
    return examples["tiny"]


def without_text_model(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace(TEXT_PREFIX, OLD_TEXT_PREFIX): value for name, value in tensors.items()}


def test_a_text_tower_without_text_model_in_its_names_is_read(sd_1, tmp_path, assert_same_weights):
    path = tmp_path / "merge.safetensors"
    tensors = without_text_model(load_file(sd_1.path))
    tensors[OLD_TEXT_PREFIX + "embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors, path)
    assert_same_weights(load_pipeline(path), sd_1.pipe)


def test_a_text_tower_with_both_names_is_read_if_they_say_the_same(
    sd_1, tmp_path, assert_same_weights
):
    path = tmp_path / "merge.ckpt"
    tensors = load_file(sd_1.path)
    older = without_text_model(tensors)
    tensors[TEXT_PREFIX + "embeddings.position_ids"] = torch.arange(77)[None]
    older[OLD_TEXT_PREFIX + "embeddings.position_ids"] = torch.arange(77.0)[None]
    torch.save(tensors | older, path)
    assert_same_weights(load_pipeline(path), sd_1.pipe)

    bias = OLD_TEXT_PREFIX + "final_layer_norm.bias"
    older[bias] = older[bias] + 1
    torch.save(tensors | older, path)
    with pytest.raises(InputError, match="two different tensors.*: final_layer_norm.bias"):
        load_pipeline(path)


@pytest.mark.parametrize(
    "position_ids",
    [
        torch.arange(77.0)[None] + 0.3,  # merged as if they were weights
        torch.arange(77).half()[None],
        torch.zeros(1, 77, dtype=torch.int64),
        torch.arange(77),
    ],
)
def test_broken_position_ids_change_nothing(position_ids, sd_1, tmp_path, assert_same_pipelines):
    path = tmp_path / "merge.safetensors"
    tensors = load_file(sd_1.path)
    tensors[TEXT_PREFIX + "embeddings.position_ids"] = position_ids
    save_file(tensors, path)
    assert_same_pipelines(load_pipeline(path), sd_1.pipe)


@pytest.mark.parametrize(
    "name",
    [
        "first_stage_model.loss.logvar",
        "first_stage_model.loss.discriminator.main.0.weight",
        "first_stage_model.model_ema.decay",
        "model_ema.num_updates",
        "global_step",
        "logvar",
        "cond_stage_model.logit_scale",
        "cond_stage_model.transformer.text_projection.weight",
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
        "cond_stage_model.model.text_projection",
        "cond_stage_model.model.visual.proj",
    ],
)
def test_leftovers_of_a_training_are_not_read(name, example, tmp_path, assert_same_weights):
    tensors = load_file(example.path)
    tensors[name] = torch.ones(1)
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same_weights(load_pipeline(tmp_path / "model.safetensors"), example.pipe)


@pytest.mark.parametrize(
    "name",
    [
        "first_stage_model.quantize.embedding.weight",
        "model.diffusion_model.label_emb.0.0.weight",
        "cond_stage_model.transformer.encoder.block.0.layer.0.SelfAttention.q.weight",
    ],
)
def test_unknown_tensors_of_a_network_are_refused(name, sd_1, tmp_path):
    tensors = load_file(sd_1.path)
    tensors[name] = torch.ones(1)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="model.safetensors: .*1 unexpected"):
        load_pipeline(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "name",
    [
        "bundle_emb.style.string_to_param.*",
        "embedding_manager.string_to_param_dict.style",
        "string_to_param.*",
        "hypernetwork.768.0.linear.weight",
        "cond_stage_model.foo",
        "cond_stage_model.transformer.foo",
        "cond_stage_model.model.foo",
        "cond_stage_model.model.transformer.resblocks.0.foo",
        "cond_stage_model.model.transformer.resblocks.24.ln_1.weight",
        "conditioner.x",
        "clip_g.transformer.text_model.final_layer_norm.bias",
        "control_tensor",
        "depth_model.model.pretrained.cls_token",
        "alphas",
        "denoiser.foo",
    ],
)
def test_tensors_of_no_network_are_refused_by_name(name, example, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(load_file(example.path) | {name: torch.ones(1)}, path)
    expected = f"model.safetensors: holds tensors of no network .*{re.escape(name)}"
    with pytest.raises(InputError, match=expected):
        load_pipeline(path)
    with pytest.raises(InputError, match=expected):
        load_unet(path)


def test_an_average_of_the_weights_is_not_taken_for_a_unet(example, tmp_path):
    path = tmp_path / "model.safetensors"
    averaged = {}
    others = {}
    for name, tensor in load_file(example.path).items():
        if name.startswith("model.diffusion_model."):
            averaged[name.replace("model.diffusion_model.", "model_ema.diffusion_model")] = tensor
        else:
            others[name] = tensor
    save_file(averaged | others, path)
    with pytest.raises(InputError, match=r"holds no UNet .*, only an average .*model_ema\.\*"):
        load_pipeline(path, prediction_type="epsilon")
    save_file(averaged, path)
    with pytest.raises(InputError, match=r"holds only an average .*model_ema\.\*"):
        load_unet(path)


@pytest.mark.parametrize(
    "prefix, network",
    [
        ("model.diffusion_model.", "UNet"),
        ("first_stage_model.", "VAE"),
        ("cond_stage_model.", "text tower"),
    ],
)
def test_the_network_that_a_file_lacks_is_named(prefix, network, example, tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = load_file(example.path)
    kept = {name: value for name, value in tensors.items() if not name.startswith(prefix)}
    save_file(kept, path)
    with pytest.raises(InputError, match=f"model.safetensors: holds no {network}"):
        load_pipeline(path, prediction_type="epsilon")


@pytest.mark.parametrize("tag", ["tiny", "tiny2"])
def test_a_file_with_a_unet_alone_is_enough_for_a_unet(tag, examples, monkeypatch, tmp_path):
    """The width of its context shows whether it is an SD-1.x or an SD-2.x."""
    for name, its_tag in (("SD_1", "tiny"), ("SD_2", "tiny2")):
        monkeypatch.setattr(single_file, name, MANIFEST[f"{its_tag}.config"])
    path = tmp_path / "unet.safetensors"
    tensors = load_file(examples[tag].path)
    prefix = "model.diffusion_model."
    save_file({name: value for name, value in tensors.items() if name.startswith(prefix)}, path)
    assert torch.equal(load_unet(path).conv_in.bias, examples[tag].pipe.unet.conv_in.bias)


# -----------------------------------------------------------------------------
# files that are something else

FOREIGN = {  # what the message says -> the name of a tensor
    "SDXL's refiner": "conditioner.embedders.0.model.ln_final.bias",
    "SD-3": "model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight",
    "FLUX": "double_blocks.0.img_attn.norm.key_norm.scale",
    "LoRA": "lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight",
    "LoRA weights": "unet.down_blocks.0.attentions.0.to_q.lora.up.weight",
    "textual inversion": "emb_params",
    "complete Stable Diffusion; put a network alone": "encoder.conv_in.weight",
    "ControlNet": "control_model.input_blocks.0.0.weight",
}


@pytest.mark.parametrize("model", FOREIGN)
def test_other_models_are_named(model, tmp_path):
    save_file({FOREIGN[model]: torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=f"model.safetensors: not .*{model}"):
        load_pipeline(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt", "model.txt"])
@pytest.mark.parametrize(
    "content", [b"hello, I am a text file", b"", bytes(3000)], ids=["text", "empty", "zeros"]
)
def test_files_without_tensors_are_refused(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}: "):
        load_pipeline(tmp_path / name)


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
def test_truncated_files_are_refused(name, example, tmp_path):
    path = tmp_path / name
    if name == "model.ckpt":
        torch.save(load_file(example.path), path)
    else:
        shutil.copy(example.path, path)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(InputError, match=f"{name}: truncated"):
        load_pipeline(path)


def test_a_file_of_another_size_is_refused(examples, tmp_path):
    """A file has no config: the shapes of its tensors show that they are not SD-1.x's."""
    message = "model.safetensors: its tensors do not match its config: .*another shape"
    with pytest.raises(InputError, match=message):
        load_pipeline(examples["tiny"].path)
    message = "other.safetensors: a single file states no block_out_channels"
    with pytest.raises(InputError, match=message):
        save_single_file(examples["tiny"].pipe, tmp_path / "other.safetensors")
