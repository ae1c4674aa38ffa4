"""The files of a network's weights: which of several is read, in shards, from the hub, in pickles,
and what is no such file at all.
"""

import argparse
import datetime
import json
import pickle
import re
import shutil
import sys
import types
from collections import defaultdict
from fnmatch import fnmatch
from pathlib import Path, PureWindowsPath

import numpy as np
import pytest
import torch
from helpers import DATA
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spin.checkpoint import hash_checkpoint, load_pipeline, load_unet
from spin.checkpoint.tensors import fill, read_tensors
from spin.checkpoint.tokenizer import write_tokenizer
from spin.checkpoint.weights import find_weights, read_weights
from spin.infra.errors import InputError

# files in a folder -> the one of them that diffusers or transformers reads, null if none
READ_BY_THE_REFERENCE = json.loads((DATA / "weight_files.json").read_text())
CASES = []
for reference_part, cases in READ_BY_THE_REFERENCE.items():
    for files, file_read in cases:
        CASES.append(pytest.param(reference_part, files, file_read, id="+".join(files)))

STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
STEMS["text_encoder"] = "model"


def usual_file(folder: Path, part: str) -> Path:
    return folder / part / f"{STEMS[part]}.safetensors"


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    if path.suffix == ".bin":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)


def split(folder: Path, part: str, index_name: str, shard_pattern: str) -> Path:
    """Replace a network's usual file by two shards and an index, and return the index's path."""
    tensors = load_file(usual_file(folder, part))
    usual_file(folder, part).unlink()
    names = sorted(tensors)
    halves = [names[::2], names[1::2]]
    weight_map = {}
    for number, half in enumerate(halves, start=1):
        shard = shard_pattern.format(number)
        write_tensors(folder / part / shard, {name: tensors[name] for name in half})
        weight_map.update({name: shard for name in half})
    index = folder / part / index_name
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


@pytest.fixture
def sharded(model_copy) -> Path:
    """A checkpoint whose UNet comes in two shards."""
    stem = STEMS["unet"]
    split(model_copy, "unet", f"{stem}.safetensors.index.json", stem + "-{}-of-2.safetensors")
    return model_copy


# -----------------------------------------------------------------------------
# several files of one network


@pytest.mark.parametrize("part, files, read", CASES)
def test_of_several_files_the_one_that_the_reference_reads_is_read(part, files, read, tmp_path):
    """The reference reads no half precision unless asked to. Here it is read if it is alone."""
    for file in files:
        (tmp_path / file).touch()
    found = find_weights(tmp_path, part)
    if read is not None:
        assert found == tmp_path / read
    elif all("non_ema" in file for file in files):
        assert found is None
    else:
        assert found.name in files
        assert "non_ema" not in found.name


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_full_precision_in_a_bin_file_is_read_and_not_an_older_half(part, model_copy):
    tensors = load_file(usual_file(model_copy, part))
    usual_file(model_copy, part).unlink()
    torch.save(tensors, model_copy / part / f"{STEMS[part]}.bin")
    halves = {name: tensor.half() + 1 for name, tensor in tensors.items()}
    save_file(halves, model_copy / part / f"{STEMS[part]}.fp16.safetensors")
    assert read_weights(model_copy / part, part).keys() == tensors.keys()
    for name, tensor in read_weights(model_copy / part, part).items():
        assert torch.equal(tensor, tensors[name])


def test_a_config_beside_the_folders_is_not_taken_for_the_unets(model_copy, pipe):
    (model_copy / "config.json").write_text("{}")
    assert torch.equal(load_unet(model_copy).conv_in.bias, pipe.unet.conv_in.bias)


def test_a_folder_with_a_variant_that_nobody_asked_for_is_refused(model_copy):
    path = usual_file(model_copy, "unet")
    path.rename(path.with_name("diffusion_pytorch_model.non_ema.safetensors"))
    with pytest.raises(InputError, match="diffusion_pytorch_model.safetensors: no such file, nor"):
        load_unet(model_copy)


# -----------------------------------------------------------------------------
# shards


@pytest.mark.parametrize(
    "part, index, shard",
    [
        ("unet", "diffusion_pytorch_model.safetensors.index.json", "a-0000{}-of-2.safetensors"),
        ("vae", "diffusion_pytorch_model.safetensors.index.fp16.json", "a.fp16-{}.safetensors"),
        ("unet", "diffusion_pytorch_model.safetensors.fp16.index.json", "a-{}.fp16.safetensors"),
        ("unet", "diffusion_pytorch_model.bin.index.json", "a-0000{}-of-2.bin"),
        ("text_encoder", "model.safetensors.index.json", "model-0000{}-of-2.safetensors"),
        ("text_encoder", "pytorch_model.bin.index.json", "pytorch_model-0000{}-of-2.bin"),
    ],
)
def test_shards_are_read_to_the_bit(part, index, shard, model_copy):
    tensors = load_file(usual_file(model_copy, part))
    split(model_copy, part, index, shard)
    stored = read_weights(model_copy / part, part)
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(stored[name], tensor)


def test_a_sharded_model_is_loaded(sharded, pipe, assert_same_pipelines):
    assert_same_pipelines(load_pipeline(sharded), pipe)


def test_a_missing_shard_is_refused(sharded):
    (sharded / "unet/diffusion_pytorch_model-2-of-2.safetensors").unlink()
    hash_checkpoint(sharded)  # may come first, and leaves the refusal to the reader
    with pytest.raises(InputError, match="-2-of-2.safetensors: no such file, but .*lists it"):
        load_unet(sharded)


def test_a_tensor_that_is_in_no_shard_is_refused(sharded):
    path = sharded / "unet/diffusion_pytorch_model-1-of-2.safetensors"
    tensors = load_file(path)
    del tensors["conv_in.bias"]
    save_file(tensors, path)
    with pytest.raises(InputError, match="-1-of-2.safetensors: .*lists other.*: conv_in.bias$"):
        load_unet(sharded)


def test_a_tensor_that_is_in_two_shards_is_refused(sharded):
    path = sharded / "unet/diffusion_pytorch_model-2-of-2.safetensors"
    tensors = load_file(path)
    tensors["conv_in.bias"] = torch.zeros(32)
    save_file(tensors, path)
    with pytest.raises(InputError, match="-2-of-2.safetensors: .*lists other.*: conv_in.bias$"):
        load_unet(sharded)


@pytest.mark.parametrize("shard", ["../vae/a.bin", "/etc/passwd", "sub/a.bin", "..", "", 3, None])
def test_a_shard_outside_of_the_folder_is_refused(shard, sharded):
    path = sharded / "unet/diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"conv_in.bias": shard}}))
    with pytest.raises(InputError, match="which is not a file beside it"):
        load_unet(sharded)


@pytest.mark.parametrize("content", [{}, {"weight_map": {}}, {"weight_map": ["a"]}])
def test_an_index_without_a_map_is_refused(content, sharded):
    path = sharded / "unet/diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="index.json: has no weight_map"):
        load_unet(sharded)


# -----------------------------------------------------------------------------
# the hub


class FakeHub:
    """Takes the place of huggingface_hub.snapshot_download: copies the files asked for."""

    def __init__(self, repository: Path, cache: Path):
        self.repository = repository
        self.cache = cache
        self.names = []  # the hub ids of all calls

    def snapshot_download(self, repository: str, allow_patterns: list[str]) -> str:
        self.names.append(repository)
        for path in self.repository.rglob("*"):
            name = str(path.relative_to(self.repository))
            if path.is_file() and any(fnmatch(name, pattern) for pattern in allow_patterns):
                (self.cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, self.cache / name)
        return str(self.cache)

    def downloaded(self) -> set[str]:
        """Return the weights that have been downloaded."""
        files = {str(path.relative_to(self.cache)) for path in self.cache.rglob("*.*")}
        return {file for file in files if file.endswith((".safetensors", ".bin"))}


@pytest.fixture
def hub(model_copy, tmp_path, monkeypatch) -> FakeHub:
    hub = FakeHub(model_copy, tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    monkeypatch.chdir(tmp_path)
    return hub


def test_a_model_is_loaded_from_the_hub(hub, pipe, assert_same_pipelines):
    """All at once, without the files beside those that are read."""
    unet = usual_file(hub.repository, "unet")
    for name in ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors"):
        shutil.copy(unet, unet.with_name(name))
    shutil.copy(unet, hub.repository / "v1-5-pruned.safetensors")
    assert_same_pipelines(load_pipeline("org/name"), pipe)
    assert hub.downloaded() == {f"{part}/{stem}.safetensors" for part, stem in STEMS.items()}
    assert (hub.cache / "scheduler/scheduler_config.json").exists()
    assert hub.names == ["org/name"]


def test_both_text_encoders_of_sdxl_are_downloaded(hub, tinyxl_folder, assert_same_pipelines):
    shutil.rmtree(hub.repository)
    shutil.copytree(tinyxl_folder, hub.repository)
    assert_same_pipelines(load_pipeline("org/name"), load_pipeline(tinyxl_folder))
    stems = STEMS | {"text_encoder_2": "model"}
    assert hub.downloaded() == {f"{part}/{stem}.safetensors" for part, stem in stems.items()}


def test_a_unet_is_loaded_from_the_hub(hub, pipe):
    unet = load_unet("UCLA-AGI/SPIN-Diffusion-iter1")
    assert torch.equal(unet.conv_in.bias, pipe.unet.conv_in.bias)
    assert hub.downloaded() == {"unet/diffusion_pytorch_model.safetensors"}
    assert hub.names == ["UCLA-AGI/SPIN-Diffusion-iter1"]


def test_the_model_index_is_downloaded_and_heeded(hub):
    index = {"_class_name": "LatentConsistencyModelPipeline"}
    (hub.repository / "model_index.json").write_text(json.dumps(index))
    for load in (load_pipeline, load_unet):
        with pytest.raises(InputError, match="model_index.json: LatentConsistencyModelPipeline: "):
            load("org/name")


def test_the_scale_of_the_latents_of_a_unet_from_the_hub_is_compared(hub, tiny_folder):
    path = hub.repository / "vae/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scaling_factor": 0.13025}))
    with pytest.raises(InputError, match="the UNet of org/name is for latents times 0.13025"):
        load_pipeline(tiny_folder, unet="org/name")
    assert "vae/diffusion_pytorch_model.safetensors" not in hub.downloaded()


def test_a_tokenizer_is_downloaded_from_the_hub(hub, pipe):
    write_tokenizer(hub.repository / "tokenizer", pipe.text_encoder.tokenizer)
    load_pipeline("org/name")
    assert (hub.cache / "tokenizer/merges.txt").exists()


def test_parts_in_different_formats_are_downloaded(hub, pipe):
    """The UNet as usual, with other files beside it; the VAE in halves; the text tower as .bin."""
    model = hub.repository
    for name in ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors"):
        shutil.copy(usual_file(model, "unet"), model / "unet" / name)
    vae = usual_file(model, "vae")
    vae.rename(vae.with_name("diffusion_pytorch_model.fp16.safetensors"))
    text = usual_file(model, "text_encoder")
    torch.save(load_file(text), text.with_name("pytorch_model.bin"))
    text.unlink()

    loaded = load_pipeline("org/name")
    assert torch.equal(loaded.vae.quant_conv.bias, pipe.vae.quant_conv.bias)
    assert hub.downloaded() == {
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/pytorch_model.bin",
    }


def test_shards_are_downloaded(hub, pipe):
    stem = STEMS["unet"]
    split(hub.repository, "unet", f"{stem}.bin.index.json", stem + "-{}-of-2.bin")
    shutil.copy(usual_file(hub.repository, "vae"), hub.repository / f"unet/{stem}-9.safetensors")
    assert torch.equal(load_unet("org/name").conv_in.bias, pipe.unet.conv_in.bias)
    assert hub.downloaded() == {f"unet/{stem}-1-of-2.bin", f"unet/{stem}-2-of-2.bin"}


def test_half_precision_is_downloaded_only_if_there_is_nothing_else(hub):
    model = hub.repository
    unet = usual_file(model, "unet")
    torch.save(load_file(unet), unet.with_suffix(".bin"))
    unet.rename(unet.with_name("diffusion_pytorch_model.fp16.safetensors"))
    load_unet("org/name")
    assert hub.downloaded() == {"unet/diffusion_pytorch_model.bin"}
    (model / "unet/diffusion_pytorch_model.bin").unlink()
    shutil.rmtree(hub.cache)
    load_unet("org/name")
    assert hub.downloaded() == {"unet/diffusion_pytorch_model.fp16.safetensors"}


def test_a_repository_without_weights_is_refused(hub):
    usual_file(hub.repository, "unet").unlink()
    with pytest.raises(InputError, match="diffusion_pytorch_model.safetensors: no such file"):
        load_unet("org/name")


@pytest.mark.parametrize(
    "source", ["org/name", "no-such-folder", "no/such/folder", "./models/name", "model.ckpt"]
)
def test_a_source_that_is_nowhere_is_refused(source, tmp_path, monkeypatch):
    def raise_offline(*args, **kwargs):
        raise ConnectionError("no network\nand a long story")

    monkeypatch.setattr("huggingface_hub.snapshot_download", raise_offline)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        load_pipeline(source)
    assert str(error.value).startswith(source)
    assert "\n" not in str(error.value)


# -----------------------------------------------------------------------------
# pickles


@pytest.fixture
def folder_of_pickles(model_copy) -> Path:
    """A folder as older versions of diffusers and transformers wrote it."""
    for path in model_copy.rglob("*.safetensors"):
        is_text = path.parent.name == "text_encoder"
        name = "pytorch_model.bin" if is_text else "diffusion_pytorch_model.bin"
        torch.save(load_file(path), path.with_name(name))
        path.unlink()
    return model_copy


def test_bin_files_are_read(folder_of_pickles, pipe, assert_same_pipelines):
    assert_same_pipelines(load_pipeline(folder_of_pickles), pipe)


def save_legacy(content, path: Path, numpy_core: str) -> None:
    """Save as torch did before 1.6, with the names of one version of numpy."""
    torch.save(content, path, _use_new_zipfile_serialization=False)
    renamed = re.sub(rb"cnumpy\._?core", b"c" + numpy_core.encode(), path.read_bytes())
    path.write_bytes(renamed)


@pytest.mark.parametrize("numpy_core", ["numpy.core", "numpy._core"])
@pytest.mark.parametrize(
    "value", [np.float64(1e-4), np.int64(840000), np.bool_(True), np.arange(3), np.dtype("f4")]
)
def test_numbers_of_numpy_beside_the_tensors_are_no_obstacle(value, numpy_core, tmp_path):
    path = tmp_path / "model.ckpt"
    content = {"state_dict": {"a": torch.ones(2)}, "lr_schedulers": [{"_last_lr": [value]}]}
    save_legacy(content, path, numpy_core)
    if not isinstance(value, np.dtype):
        assert numpy_core.encode() + b".multiarray" in path.read_bytes()
    tensors = read_tensors(path)
    assert tensors.keys() == {"a"}
    assert torch.equal(tensors["a"], torch.ones(2))


def test_a_number_of_numpy_in_todays_format_is_no_obstacle(tmp_path):
    torch.save({"a": torch.ones(2), "global_step": np.int64(7)}, tmp_path / "model.ckpt")
    assert read_tensors(tmp_path / "model.ckpt").keys() == {"a"}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "value",
    [
        defaultdict(list, {"losses": [1.0, 2.0]}),
        defaultdict(dict, {"optimizer": {"lr": 1e-4}}),
        datetime.datetime(2023, 5, 1, tzinfo=datetime.timezone.utc),
        datetime.timedelta(hours=7),
        Path("/home/user/data"),
        PureWindowsPath("C:/data"),
        argparse.Namespace(lr=1e-4, paths=[Path("data")]),
        np.float32,
        float,
    ],
    ids=repr,
)
def test_the_settings_of_a_training_are_no_obstacle(value, zipped, tmp_path):
    path = tmp_path / "model.ckpt"
    content = {"state_dict": {"a": torch.ones(2)}, "settings": value}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert read_tensors(path).keys() == {"a"}


def test_a_state_dict_that_is_a_defaultdict_is_read(tmp_path):
    torch.save(defaultdict(list, {"a": torch.ones(2)}), tmp_path / "model.ckpt")
    assert read_tensors(tmp_path / "model.ckpt").keys() == {"a"}


def test_the_settings_of_lightning_are_no_obstacle(tmp_path, monkeypatch):
    """A dictionary of another type, with values of a training."""
    name = "pytorch_lightning.utilities.parsing"
    settings = type("AttributeDict", (dict,), {"__module__": name})
    module = types.ModuleType(name)
    module.AttributeDict = settings
    with monkeypatch.context() as patch:
        for parent in ("pytorch_lightning", "pytorch_lightning.utilities"):
            patch.setitem(sys.modules, parent, types.ModuleType(parent))
        patch.setitem(sys.modules, name, module)
        content = {"state_dict": {"a": torch.ones(2)}, "hyper_parameters": settings(lr=1e-4)}
        torch.save(content, tmp_path / "model.ckpt")
    assert read_tensors(tmp_path / "model.ckpt").keys() == {"a"}


def test_a_state_dict_in_a_state_dict_is_read(tmp_path):
    content = {"state_dict": {"state_dict": {"a": torch.ones(2)}}}
    torch.save(content, tmp_path / "model.ckpt")
    assert read_tensors(tmp_path / "model.ckpt").keys() == {"a"}


class Harmful:
    """An object whose pickle creates a file when it is read."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return Path.touch, (self.proof,)


class NumpyScalar:
    """Pickled as a number of numpy whose value is another object."""

    def __init__(self, value):
        self.value = value

    def __reduce__(self):
        function = np.float64(1).__reduce__()[0]
        return function, (np.dtype("O"), pickle.dumps(self.value))


def test_what_a_number_of_numpy_holds_does_not_run(tmp_path):
    path = tmp_path / "model.ckpt"
    proof = tmp_path / "it ran"
    torch.save({"a": torch.ones(2), "step": NumpyScalar(Harmful(proof))}, path)
    assert read_tensors(path).keys() == {"a"}
    assert not proof.exists()


@pytest.mark.parametrize("format", ["torch.save", "pickle"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(format, tmp_path):
    proof = tmp_path / "it ran"
    path = tmp_path / "model.ckpt"
    content = {"state_dict": Harmful(proof)}
    if format == "torch.save":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match="model.ckpt: .*not loaded. Use a .safetensors file"):
        load_pipeline(path)
    assert not proof.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_refused_pickle_is_called_by_what_it_holds(zipped, tmp_path):
    path = tmp_path / "model.ckpt"
    proof = tmp_path / "it ran"
    content = {"a": torch.ones(2), "step": np.float64(1), "code": Harmful(proof)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=r"holds more than tensors \(\S+\); not loaded") as error:
        read_tensors(path)
    assert "numpy" not in str(error.value)
    assert not proof.exists()


def test_the_message_names_what_is_not_allowed(tmp_path):
    torch.save({"layer": nn.Identity()}, tmp_path / "model.bin")
    match = r"more than tensors \(torch.nn.modules.linear.Identity\)"
    with pytest.raises(InputError, match=match):
        read_tensors(tmp_path / "model.bin")


# -----------------------------------------------------------------------------
# files that are not what their name says

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 3438167540\n"


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt", "model.bin"])
def test_a_git_lfs_pointer_is_called_by_its_name(name, tmp_path):
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(InputError, match=f"{name}: a Git LFS pointer.*git lfs pull"):
        load_pipeline(tmp_path / name)


@pytest.mark.parametrize(
    "file",
    ["unet/diffusion_pytorch_model.safetensors", "vae/config.json", "text_encoder/config.json"],
)
def test_a_git_lfs_pointer_in_a_folder_is_called_by_its_name(file, model_copy):
    (model_copy / file).write_text(POINTER)
    with pytest.raises(InputError, match=f"{file}: a Git LFS pointer.*git lfs pull"):
        load_pipeline(model_copy)


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"<!DOCTYPE html><html><head>", "a web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied", "error message"),
        (b"", "empty"),
        (b"GGUF" + bytes(40), "GGUF"),
        (b"Invalid username or password.", "not a safetensors file or a pickle"),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
def test_files_that_are_not_weights_are_called_what_they_are(name, content, expected, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}: .*{expected}"):
        load_pipeline(tmp_path / name)


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt", ""])
def test_safetensors_and_pickles_are_told_apart_by_content(suffix, tmp_path):
    tensors = {"a": torch.arange(3.0)}
    safetensors = tmp_path / f"safe{suffix}"
    pickled = tmp_path / f"pickled{suffix}"
    legacy = tmp_path / f"legacy{suffix}"
    save_file(tensors, safetensors)
    torch.save(tensors, pickled)
    torch.save(tensors, legacy, _use_new_zipfile_serialization=False)
    for path in (safetensors, pickled, legacy):
        assert torch.equal(read_tensors(path)["a"], tensors["a"])


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_is_called_safetensors_is_refused(zipped, tmp_path):
    path = tmp_path / "model.safetensors"
    torch.save({"a": torch.ones(1)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match="model.safetensors: a pickle, not a safetensors file"):
        load_pipeline(path)


# -----------------------------------------------------------------------------
# types and values of weights


def fill_linear(tensor: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the weight of a layer that is filled with a stored one."""
    with torch.device("meta"):
        layer = nn.Linear(2, 2, bias=False)
    return fill(layer, {"weight": tensor}, Path("model"), dtype, "cpu").weight.detach()


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_weights_of_any_floating_type_are_cast(dtype, tmp_path):
    stored = torch.tensor([[0.5, -1.0], [2.0, 0.0]])
    save_file({"weight": stored.to(dtype)}, tmp_path / "model.safetensors")
    weight = fill_linear(read_tensors(tmp_path / "model.safetensors")["weight"])
    assert weight.dtype == torch.float32
    assert torch.equal(weight, stored)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool])
def test_quantized_weights_are_refused(dtype):
    with pytest.raises(InputError, match="model: weight is torch.*: quantized weights"):
        fill_linear(torch.ones(2, 2, dtype=dtype))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(value):
    tensor = torch.ones(2, 2)
    tensor[1, 0] = value
    for stored in (tensor, tensor.half()):
        with pytest.raises(InputError, match="model: weight holds NaN or infinity"):
            fill_linear(stored)


def test_a_weight_that_float16_cannot_hold_is_refused_in_float16_only():
    tensor = torch.full((2, 2), 1e5)
    assert torch.equal(fill_linear(tensor), tensor)
    assert fill_linear(tensor, torch.bfloat16).isfinite().all()
    with pytest.raises(InputError, match="model: weight is too large for torch.float16"):
        fill_linear(tensor, torch.float16)


# -----------------------------------------------------------------------------
# hashes


def test_what_is_not_read_does_not_change_the_hash(model_copy, tiny_folder):
    unet = usual_file(model_copy, "unet")
    shutil.copy(unet, unet.with_name("diffusion_pytorch_model.fp16.safetensors"))
    shutil.copy(unet, unet.with_name("diffusion_pytorch_model.non_ema.safetensors"))
    shutil.copy(unet, unet.with_name("diffusion_pytorch_model.bin"))
    shutil.copy(unet, unet.with_name("diffusion_pytorch_model-00001-of-00002.safetensors"))
    text = usual_file(model_copy, "text_encoder")
    text.with_name("model.safetensors.index.json").write_text("{}")
    text.with_name("training_args.json").write_text("{}")
    (model_copy / "vae/README.txt").write_text("about this VAE")
    (model_copy / "scheduler/old_scheduler_config.json").write_text("{}")
    (model_copy / "scheduler/README.txt").write_text("about this scheduler")
    (model_copy / "model_index.json").write_text("{}")
    (model_copy / "README.md").write_text("about this model")
    assert hash_checkpoint(model_copy) == hash_checkpoint(tiny_folder)
    assert hash_checkpoint(model_copy / "unet") == hash_checkpoint(tiny_folder / "unet")


def test_the_hash_covers_each_file_of_a_tokenizer_that_is_read_and_no_other(tmp_path):
    read = [
        "vocab.json",
        "merges.txt",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
    ]
    hashes = {hash_checkpoint(tmp_path)}
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name in read:
        (folder / name).write_text("{}")
        hashes.add(hash_checkpoint(tmp_path))
    assert len(hashes) == len(read) + 1
    for name in ("README.txt", "special_tokens_map.old.json", "vocab.txt"):
        (folder / name).write_text("{}")
    assert hash_checkpoint(tmp_path) in hashes


@pytest.mark.parametrize("file", ["-1-of-2.safetensors", "-2-of-2.safetensors"])
def test_the_hash_changes_with_each_shard(file, sharded):
    before = hash_checkpoint(sharded)
    path = sharded / f"unet/diffusion_pytorch_model{file}"
    tensors = load_file(path)
    first = min(tensors)
    tensors[first] += 1
    save_file(tensors, path)
    assert hash_checkpoint(sharded) != before


def test_the_hash_changes_if_another_file_takes_precedence(model_copy):
    """An index of diffusers comes before the single file beside it."""
    before = hash_checkpoint(model_copy)
    unet = usual_file(model_copy, "unet")
    weight_map = {name: unet.name for name in load_file(unet)}
    index = unet.with_name("diffusion_pytorch_model.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert hash_checkpoint(model_copy) != before


@pytest.mark.parametrize(
    "file", ["unet/config.json", "scheduler/scheduler_config.json", "vae/config.json"]
)
def test_the_hash_changes_with_each_config(file, model_copy):
    before = hash_checkpoint(model_copy)
    path = model_copy / file
    path.write_text(path.read_text() + "\n")
    assert hash_checkpoint(model_copy) != before


def test_the_hash_of_a_single_file_covers_the_yaml_beside_it(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(1)}, path)
    before = hash_checkpoint(path)
    (tmp_path / "README.md").write_text("about this model")
    (tmp_path / "another.yaml").write_text("model: another")
    assert hash_checkpoint(path) == before
    (tmp_path / "model.yaml").write_text("model: this")
    assert hash_checkpoint(path) != before
