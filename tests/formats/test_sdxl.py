"""SDXL's checkpoints: folders and single files, in and out, and what is not SDXL base.

diffusers 0.42.1 was once given what is saved here: StableDiffusionXLPipeline opens the folder (the
goldens in tests/data are made with it) and, by from_single_file, the file, and both make the same
bits.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import MANIFEST, write_json
from safetensors.torch import load_file, save_file

from spin.checkpoint import (
    Pipeline,
    hash_checkpoint,
    load_pipeline,
    load_unet,
    save_pipeline,
    save_single_file,
    single_file,
)
from spin.checkpoint.configs import LEFTOVERS, SDXL
from spin.infra.errors import InputError

UNET = "model.diffusion_model."
FIRST = "conditioner.embedders.0.transformer.text_model."
SECOND = "conditioner.embedders.1.model."


@pytest.fixture(scope="module")
def pipe_xl(tinyxl_folder) -> Pipeline:
    return load_pipeline(tinyxl_folder)


@pytest.fixture
def copy_xl(tinyxl_folder, tmp_path) -> Path:
    return Path(shutil.copytree(tinyxl_folder, tmp_path / "model"))


@pytest.fixture
def tiny_sizes(monkeypatch) -> None:
    """Make single files of SDXL have the tiny model's configs."""
    configs = {**MANIFEST["tinyxl.config"], "scheduler": SDXL["scheduler"]}
    monkeypatch.setattr(single_file, "SDXL", configs)


@pytest.fixture
def file_xl(pipe_xl, tiny_sizes, tmp_path) -> Path:
    save_single_file(pipe_xl, tmp_path / "xl.safetensors")
    return tmp_path / "xl.safetensors"


def edit_json(path: Path, **changes) -> None:
    write_json(path, json.loads(path.read_text()) | changes)


# -----------------------------------------------------------------------------
# folders


def test_a_saved_folder_is_loaded_to_the_bit(pipe_xl, tmp_path, assert_same_pipelines):
    save_pipeline(pipe_xl, tmp_path / "saved")
    loaded = load_pipeline(tmp_path / "saved")
    assert_same_pipelines(loaded, pipe_xl)
    assert loaded.text_encoder.tokenizer.pad_token == "<|endoftext|>"
    assert loaded.text_encoder_2.tokenizer.pad_token == "!"
    index = json.loads((tmp_path / "saved/model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLPipeline"
    assert index["scheduler"] == ["diffusers", "EulerDiscreteScheduler"]
    assert index["force_zeros_for_empty_prompt"] is True


@pytest.mark.parametrize("part", ["unet", "text_encoder_2", "tokenizer_2"])
def test_the_hash_covers_both_text_encoders(part, pipe_xl, tmp_path):
    save_pipeline(pipe_xl, tmp_path)
    before = hash_checkpoint(tmp_path)
    path = next((tmp_path / part).glob("*config.json"))
    path.write_text(path.read_text() + " ")
    assert hash_checkpoint(tmp_path) != before


def test_a_folder_without_a_part_is_refused(copy_xl):
    index = {"_class_name": "StableDiffusionXLPipeline"}
    index["text_encoder_2"] = ["transformers", "CLIPTextModelWithProjection"]
    write_json(copy_xl / "model_index.json", index)
    shutil.rmtree(copy_xl / "text_encoder_2")
    with pytest.raises(InputError, match="text_encoder_2/config.json: no such file"):
        load_pipeline(copy_xl)
    (copy_xl / "model_index.json").unlink()
    with pytest.raises(InputError, match="pooled text of 40 channels, .* makes 0"):
        load_pipeline(copy_xl)


def test_networks_of_another_family_are_refused(copy_xl, tiny_folder, tinyxl_folder, tmp_path):
    """A UNet of SD-1.x may read text as wide as one of SDXL's towers makes."""
    for name, folder in (("one", tiny_folder), ("xl", tinyxl_folder)):  # without what is beside it
        shutil.copytree(folder / "unet", tmp_path / name / "unet")
    with pytest.raises(InputError, match="pooled text of 0 channels, .* makes 40"):
        load_pipeline(tinyxl_folder, unet=tmp_path / "one")
    with pytest.raises(InputError, match="pooled text of 40 channels, .* makes 0"):
        load_pipeline(tiny_folder, unet=tmp_path / "xl")
    shutil.rmtree(copy_xl / "text_encoder")
    shutil.copytree(copy_xl / "text_encoder_2", copy_xl / "text_encoder")
    with pytest.raises(InputError, match="unexpected .text_projection.weight"):
        load_pipeline(copy_xl)


def test_the_vae_of_another_family_is_refused(tiny_folder, tinyxl_folder, tmp_path):
    model = shutil.copytree(tinyxl_folder, tmp_path / "model")
    shutil.rmtree(model / "vae")
    shutil.copytree(tiny_folder / "vae", model / "vae")
    with pytest.raises(InputError, match="0.13025, but its VAE's scaling_factor is 0.18215"):
        load_pipeline(model)


def test_text_encoders_of_other_lengths_are_refused(copy_xl):
    write_json(copy_xl / "tokenizer" / "tokenizer_config.json", {"model_max_length": 20})
    with pytest.raises(InputError, match="prompts of 20 tokens"):
        load_pipeline(copy_xl)


@pytest.mark.parametrize(
    "index, message",
    [
        ({"_class_name": "StableDiffusionXLImg2ImgPipeline"}, "refiner"),
        ({"_class_name": "StableDiffusionXLInpaintPipeline"}, "an inpainting model"),
        ({"_class_name": "StableDiffusionXLInstructPix2PixPipeline"}, "an edit model"),
        ({"force_zeros_for_empty_prompt": False}, "force_zeros_for_empty_prompt is false"),
    ],
    ids=str,
)
def test_pipelines_besides_the_base_are_refused_by_name(index, message, copy_xl):
    write_json(copy_xl / "model_index.json", index)
    with pytest.raises(InputError, match=message):
        load_pipeline(copy_xl)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"in_channels": 9}, "an inpainting model"),
        ({"in_channels": 8}, "an edit model"),
        ({"reverse_transformer_layers_per_block": [3, 2, 1]}, "reverse_transformer_layers"),
        ({"projection_class_embeddings_input_dim": 96}, "pooled text of 48 channels"),
    ],
    ids=str,
)
def test_other_unets_are_refused(changes, message, copy_xl):
    edit_json(copy_xl / "unet/config.json", **changes)
    if "projection_class_embeddings_input_dim" in changes:
        path = copy_xl / "unet/diffusion_pytorch_model.safetensors"
        tensors = load_file(path)
        tensors["add_embedding.linear_1.weight"] = torch.zeros(64, 96)
        save_file(tensors, path)
    with pytest.raises(InputError, match=message):
        load_pipeline(copy_xl)


# -----------------------------------------------------------------------------
# single files


def test_a_saved_file_is_loaded_to_the_bit(file_xl, pipe_xl, assert_same_pipelines):
    loaded = load_pipeline(file_xl)
    assert_same_pipelines(loaded, pipe_xl)
    assert loaded.vae.scaling_factor == 0.13025
    assert loaded.text_encoder_2.tokenizer.pad_token == "!"


def test_only_the_file_has_the_projection_of_the_original(file_xl, copy_xl):
    in_folder = load_file(copy_xl / "text_encoder_2/model.safetensors")["text_projection.weight"]
    in_file = load_file(file_xl)[f"{SECOND}text_projection"]
    assert in_folder.shape == (40, 48)
    assert torch.equal(in_file, in_folder.T)


def test_names_of_the_full_size_are_a_bijection():
    names = single_file.original_unet_names(SDXL["unet"])
    assert len(names) == len(set(names.values())) == 1680
    assert names["add_embedding.linear_1.weight"] == f"{UNET}label_emb.0.0.weight"
    assert names["add_embedding.linear_2.bias"] == f"{UNET}label_emb.0.2.bias"
    block = "output_blocks.2.1.transformer_blocks.9.attn2.to_k.weight"
    ours = "up_blocks.0.attentions.2.transformer_blocks.9.attn2.to_k.weight"
    assert names[ours] == UNET + block
    assert names["up_blocks.1.upsamplers.0.conv.bias"] == f"{UNET}output_blocks.5.2.conv.bias"


def test_a_file_with_a_unet_alone_is_enough_for_a_unet(file_xl, pipe_xl, tmp_path):
    tensors = load_file(file_xl)
    path = tmp_path / "unet.safetensors"
    save_file({name: value for name, value in tensors.items() if name.startswith(UNET)}, path)
    assert torch.equal(load_unet(path).conv_in.bias, pipe_xl.unet.conv_in.bias)
    with pytest.raises(InputError, match="holds no VAE"):
        load_pipeline(path)


@pytest.mark.parametrize("part", [FIRST, SECOND])
def test_a_file_without_a_text_tower_is_refused(part, file_xl):
    tensors = load_file(file_xl)
    save_file({name: value for name, value in tensors.items() if part not in name}, file_xl)
    with pytest.raises(InputError, match=r"holds no (second )?text tower .conditioner.embedders"):
        load_pipeline(file_xl)


def test_leftovers_and_statements_of_published_files_are_read_past(file_xl, pipe_xl):
    tensors = load_file(file_xl)
    for name in LEFTOVERS:
        if name.startswith("conditioner."):
            tensors[f"{name}x" if name.endswith(".") else name] = torch.tensor(4.6)
    assert len(tensors) > len(load_file(file_xl)) + 9
    metadata = {"modelspec.architecture": "stable-diffusion-xl-v1-base"}
    save_file(tensors, file_xl, metadata)
    yaml = """
      scale_factor: 0.13025
      num_idx: 1000
      layer: hidden
      layer_idx: 11
      layer: penultimate
    """
    file_xl.with_suffix(".yaml").write_text(yaml)
    assert torch.equal(load_pipeline(file_xl).unet.conv_in.bias, pipe_xl.unet.conv_in.bias)


@pytest.mark.parametrize(
    "metadata, yaml, message",
    [
        ({"modelspec.architecture": "stable-diffusion-xl-v1-refiner"}, "", "refiner: not"),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-inpainting"}, "", "inpainting: not"),
        ({}, "scale_factor: 0.18215", "in Stable Diffusion XL it is 0.13025"),
        ({}, "layer: last", "in Stable Diffusion XL it is hidden or penultimate"),
        ({}, "layer_idx: 10", "layer_idx is 10"),
    ],
    ids=str,
)
def test_statements_of_another_model_are_refused(metadata, yaml, message, file_xl):
    save_file(load_file(file_xl), file_xl, metadata)
    file_xl.with_suffix(".yaml").write_text(yaml)
    with pytest.raises(InputError, match=message):
        load_pipeline(file_xl)


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({f"{UNET}input_blocks.0.0.weight": (320, 9, 3, 3)}, "an inpainting model"),
        ({f"{UNET}input_blocks.0.0.weight": (320, 8, 3, 3)}, "an edit model"),
        ({"conditioner.embedders.0.model.ln_final.bias": (1280,)}, "SDXL's refiner"),
        ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": (8, 8)}, "LoRA weights"),
    ],
    ids=str,
)
def test_other_files_are_refused_by_name(tensors, message, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, path)
    with pytest.raises(InputError, match=message):
        load_pipeline(path)


@pytest.mark.parametrize(
    "file, changes",
    [
        ("unet/config.json", {"freq_shift": 1}),
        ("unet/config.json", {"attention_head_dim": [2, 4, 8]}),
        ("text_encoder_2/config.json", {"num_attention_heads": 3}),
        ("vae/config.json", {"scaling_factor": 0.5}),
    ],
    ids=str,
)
def test_a_setting_that_a_file_cannot_state_is_not_saved(
    file, changes, copy_xl, tmp_path, tiny_sizes
):
    edit_json(copy_xl / file, **changes)
    [key] = changes
    with pytest.raises(InputError, match=f"a single file states no {key}; it would mean"):
        save_single_file(load_pipeline(copy_xl), tmp_path / "model.safetensors")
