"""Checkpoints as they are in the wild: single original files, pickles, hub ids; and what is refused.

The name tables were compared once, name by name, with diffusers' own conversion of SD-1.x and 2.x.
"""

import pickle
import shutil
import sys
import types
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pytest
import helpers
import torch
from safetensors.torch import load_file, save_file
from test_folders import UNET, assert_same, states

import sample
import train
from spin.checkpoint import single_file as original
from spin.checkpoint import pipeline as weights
from spin.infra.run import InputError
from spin.scheduler import Scheduler
from spin.unet import UNet
from spin.vae import AutoencoderKL


@pytest.fixture(params=["tiny", "tiny2"])
def model(request, monkeypatch) -> weights.StableDiffusion:
    """The tiny checkpoints, and their configs in place of those that files of SD-1.x and 2.x are taken to have."""
    folder = request.getfixturevalue("tiny_folder" if request.param == "tiny" else "tiny2_folder")
    config = helpers.MANIFEST[f"{request.param}.config"]
    for kind in ("SD_1", "SD_2"):
        monkeypatch.setattr(original, kind, config | {"scheduler": getattr(original, kind)["scheduler"]})
    return weights.load(folder)


# ---------------------------------------------------------------------------------------------------------------------
# the original layout


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_single_file_and_back_is_bit_equal(model, dtype, tmp_path):
    sd = weights.StableDiffusion(
        model.unet.to(dtype), model.vae.to(dtype), model.text_encoder.to(dtype), model.scheduler
    )
    weights.save_single(sd, tmp_path / "model.safetensors")
    back = weights.load(tmp_path / "model.safetensors", dtype)
    ours, theirs = states(sd), states(back)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert back.scheduler.prediction_type == sd.scheduler.prediction_type
    assert back.text_encoder.tokenizer.pad_token == sd.text_encoder.tokenizer.pad_token
    if dtype == torch.float32:
        assert_same(sd, back)


def test_a_training_checkpoint(model, tmp_path):
    """A pickle with averaged weights, the schedule, position ids, a step count, and layers that SD-2.x does not use."""
    weights.save_single(model, tmp_path / "model.safetensors")
    tensors = load_file(tmp_path / "model.safetensors")
    other = {name.replace("model.diffusion_model.", "model_ema.diffusion_model"): t + 1 for name, t in tensors.items()}
    other = {name: tensor for name, tensor in other.items() if name.startswith("model_ema")}
    other |= {"betas": torch.zeros(1000), "model_ema.decay": torch.tensor(0.9999)}
    if any(name.startswith(original.TEXT_1) for name in tensors):
        other[original.TEXT_1 + "embeddings.position_ids"] = torch.arange(77)[None]
    else:
        other |= {original.TEXT_2 + "transformer.resblocks.23.ln_1.weight": torch.zeros(3)}
        other |= {original.TEXT_2 + "logit_scale": torch.zeros(())}
    torch.save({"state_dict": tensors | other, "global_step": 470000}, tmp_path / "model.ckpt")
    read = weights.load(tmp_path / "model.ckpt")
    assert all(torch.equal(tensor, states(model)[name]) for name, tensor in states(read).items())
    assert weights.checkpoint_hash(tmp_path / "model.ckpt") != weights.checkpoint_hash(tmp_path / "model.safetensors")


def test_a_file_says_what_its_network_predicts(model, tmp_path):
    """SD-2.x at 512 px predicts noise; a file that does not say so is taken for one that predicts v."""
    if model.scheduler.prediction_type == "v_prediction":
        noise = Scheduler(model.scheduler.config | {"prediction_type": "epsilon"})
        weights.save_single(replace(model, scheduler=noise), tmp_path / "model.safetensors")
        assert weights.load(tmp_path / "model.safetensors").scheduler.prediction_type == "epsilon"
        save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "silent.safetensors")
        assert weights.load(tmp_path / "silent.safetensors").scheduler.prediction_type == "v_prediction"


def test_a_checkpoint_of_pytorch_lightning(model, tmp_path, monkeypatch):
    """The published .ckpt files name one of its classes, as the key of a callback's state; and keys may be numbers."""
    weights.save_single(model, tmp_path / "model.safetensors")
    name = "pytorch_lightning.callbacks.model_checkpoint"
    callback = type("ModelCheckpoint", (), {"__module__": name})
    with monkeypatch.context() as patch:
        for part in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
            patch.setitem(sys.modules, part, types.ModuleType(part))
        sys.modules[name].ModelCheckpoint = callback
        tensors = load_file(tmp_path / "model.safetensors") | {7: torch.zeros(1)}
        torch.save({"state_dict": tensors, "callbacks": {callback: {"monitor": "loss"}}}, tmp_path / "model.ckpt")
    assert name not in sys.modules
    read = weights.load(tmp_path / "model.ckpt")
    assert all(torch.equal(tensor, states(model)[name]) for name, tensor in states(read).items())


@pytest.mark.parametrize("kind", [original.SD_1, original.SD_2], ids=["SD-1.x", "SD-2.x"])
def test_the_name_table_is_a_bijection_at_full_size(kind):
    with torch.device("meta"):
        unet, vae = UNet(kind["unet"]).state_dict(), AutoencoderKL(kind["vae"]).state_dict()
    for network, state in (("unet", unet), ("vae", vae)):
        table = original.names(network, list(state), kind[network])
        assert len(table) == len(set(table.values())) == {"unet": 686, "vae": 248}[network]
        there = original.to_original(network, state, kind[network])
        back = original.from_original(network, there, list(state), kind[network])
        assert {name: t.shape for name, t in back.items()} == {name: t.shape for name, t in state.items()}
    published = {
        "time_embed.0.weight": "time_embedding.linear_1.weight",
        "input_blocks.0.0.bias": "conv_in.bias",
        "input_blocks.2.1.proj_in.weight": "down_blocks.0.attentions.1.proj_in.weight",
        "input_blocks.3.0.op.weight": "down_blocks.0.downsamplers.0.conv.weight",
        "input_blocks.4.0.skip_connection.weight": "down_blocks.1.resnets.0.conv_shortcut.weight",
        "input_blocks.11.0.out_layers.3.bias": "down_blocks.3.resnets.1.conv2.bias",
        "middle_block.1.transformer_blocks.0.attn2.to_k.weight":
            "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight",
        "middle_block.2.emb_layers.1.weight": "mid_block.resnets.1.time_emb_proj.weight",
        "output_blocks.2.1.conv.weight": "up_blocks.0.upsamplers.0.conv.weight",
        "output_blocks.5.2.conv.weight": "up_blocks.1.upsamplers.0.conv.weight",
        "output_blocks.11.1.norm.weight": "up_blocks.3.attentions.2.norm.weight",
        "out.2.weight": "conv_out.weight",
    }  # fmt: skip
    table = original.names("unet", list(unet), kind["unet"])
    assert {there: table[ours] for there, ours in published.items()} == {n: original.UNET + n for n in published}
    published = {
        "encoder.down.1.block.0.nin_shortcut.weight": "encoder.down_blocks.1.resnets.0.conv_shortcut.weight",
        "encoder.down.2.downsample.conv.bias": "encoder.down_blocks.2.downsamplers.0.conv.bias",
        "encoder.mid.attn_1.q.weight": "encoder.mid_block.attentions.0.to_q.weight",
        "decoder.mid.attn_1.proj_out.weight": "decoder.mid_block.attentions.0.to_out.0.weight",
        "decoder.mid.block_2.conv1.weight": "decoder.mid_block.resnets.1.conv1.weight",
        "decoder.up.3.block.2.norm1.weight": "decoder.up_blocks.0.resnets.2.norm1.weight",
        "decoder.up.1.upsample.conv.weight": "decoder.up_blocks.2.upsamplers.0.conv.weight",
        "decoder.norm_out.bias": "decoder.conv_norm_out.bias",
        "quant_conv.weight": "quant_conv.weight",
    }
    table = original.names("vae", list(vae), kind["vae"])
    assert {there: table[ours] for there, ours in published.items()} == {n: original.VAE + n for n in published}
    assert original.to_original("vae", vae, kind["vae"])[original.VAE + "encoder.mid.attn_1.q.weight"].ndim == 4


def test_a_files_unet_in_another_model_and_sample_py(model, tiny_folder, tmp_path, capsys):
    out = tmp_path / "single" / "model.safetensors"
    out.parent.mkdir()
    with torch.no_grad():
        model.unet.conv_in.bias += 1
    weights.save(model, tmp_path / "changed")
    sample.main(["--model", str(tmp_path / "changed"), "--save-single", str(out), "--out", str(tmp_path / "none")])
    assert torch.equal(weights.load_unet(out).conv_in.bias, model.unet.conv_in.bias)
    if model.scheduler.prediction_type == "epsilon":
        both = weights.load(tiny_folder, unet=out)
        assert torch.equal(both.unet.conv_in.bias, model.unet.conv_in.bias)
        assert torch.equal(weights.load(out, unet=tiny_folder).unet.conv_in.bias + 1, model.unet.conv_in.bias)


# ---------------------------------------------------------------------------------------------------------------------
# pickles


def as_bin(folder: Path) -> None:
    """The folder's weights as older versions of diffusers and transformers stored them."""
    for path in folder.rglob("*.safetensors"):
        name = "pytorch_model.bin" if path.parent.name == "text_encoder" else "diffusion_pytorch_model.bin"
        torch.save(load_file(path), path.with_name(name))
        path.unlink()


def test_bin_files(tiny_folder, sd, tmp_path):
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    as_bin(folder)
    assert_same(weights.load(folder), sd)


class Harmful:
    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return Path.touch, (self.proof,)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(save, tmp_path):
    proof, path = tmp_path / "it ran", tmp_path / "model.ckpt"
    save({"state_dict": Harmful(proof)}, path)
    with pytest.raises(InputError, match="model.ckpt: .*not read. A .safetensors file is safe"):
        weights.load(path)
    assert not proof.exists()


# ---------------------------------------------------------------------------------------------------------------------
# the hub


def test_a_hub_id(tiny_folder, sd, tmp_path, monkeypatch):
    asked = []

    def download(repository: str, allow_patterns: list[str]) -> str:
        asked.append((repository, allow_patterns))
        return str(tiny_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert_same(weights.load("org/name"), sd)
    weights.load_unet("UCLA-AGI/SPIN-Diffusion-iter1")
    assert {repository for repository, _ in asked} == {"org/name", "UCLA-AGI/SPIN-Diffusion-iter1"}
    whole, unet = asked[0][1], asked[-1][1]
    assert "vae/diffusion_pytorch_model.safetensors" in whole and "tokenizer/*.txt" in whole
    assert all(pattern.startswith("unet/") for pattern in unet) and not any(
        "fp16" in each or "bin" in each for each in whole
    )


def test_bin_files_are_downloaded_where_there_are_no_others(tiny_folder, tmp_path, monkeypatch):
    folder, asked = Path(shutil.copytree(tiny_folder, tmp_path / "hub")), []
    as_bin(folder)
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda _, allow_patterns: asked.append(allow_patterns) or folder
    )
    weights.load_unet("org/name")
    wanted = ["unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors"]
    for name in wanted:
        assert [any(fnmatch(name, pattern) for pattern in patterns) for patterns in asked] == [False, True]


@pytest.mark.parametrize("source", ["org/name", "no-such-folder", "no/such/folder", "./models/name", "model.ckpt"])
def test_what_is_neither_here_nor_there(source, tmp_path, monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no network\nand a long story")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as refusal:
        weights.load(source)
    assert str(refusal.value).startswith(source) and "\n" not in str(refusal.value)


# ---------------------------------------------------------------------------------------------------------------------
# what is something else


FOREIGN = {
    "SDXL": "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias",
    "SD-3": "model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight",
    "FLUX": "double_blocks.0.img_attn.norm.key_norm.scale",
    "LoRA": "lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight",
    "LoRA weights": "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora.up.weight",
    "textual inversion": "emb_params",
    "whole Stable Diffusion; a network alone": "encoder.conv_in.weight",
    "ControlNet": "control_model.input_blocks.0.0.weight",
}


@pytest.mark.parametrize("what", FOREIGN)
def test_other_models_are_named(what, tmp_path):
    save_file({FOREIGN[what]: torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=f"model.safetensors: no .*{what}"):
        weights.load(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt", "model.txt"])
@pytest.mark.parametrize("content", [b"hello, I am a text file", b"", bytes(3000)], ids=["text", "empty", "zeros"])
def test_files_that_hold_no_tensors(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}: "):
        weights.load(tmp_path / name)


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
def test_truncated_files(name, model, tmp_path):
    weights.save_single(model, tmp_path / "model.safetensors")
    if name == "model.ckpt":
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / name)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-5000])
    with pytest.raises(InputError, match=f"{name}: cut short"):
        weights.load(tmp_path / name)


def test_a_file_of_another_size_is_refused(sd, tmp_path, monkeypatch):
    """A file has no config: tensors that are not SD-1.x's are told by their shapes. And none such is written."""
    with monkeypatch.context() as patch:
        patch.setattr(original, "SD_1", helpers.MANIFEST["tiny.config"])
        weights.save_single(sd, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="other.safetensors: a single file says no sizes"):
        weights.save_single(sd, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="model.safetensors: its tensors are not those of its config: .*another shape"):
        weights.load(tmp_path / "model.safetensors")


def test_train_starts_from_a_single_file(sd, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(original, "SD_1", helpers.MANIFEST["tiny.config"] | {"scheduler": original.SD_1["scheduler"]})
    weights.save_single(sd, tmp_path / "model.safetensors")
    flags = "--resolution 64 --iterations 1 --steps 1 --batch-size 1 --sampler-steps 2 --grid-prompts 0 --device cpu"
    given = ["--model", str(tmp_path / "model.safetensors"), "--data", str(pictures), "--out", str(tmp_path / "run")]
    train.main([*given, *flags.split()])
    assert (tmp_path / "run/iter1/checkpoint" / UNET).exists()
