"""What a network predicts is stated in several places: all are read, and they agree, or the user is
asked. The parts of a model must agree on all else that they share.
"""

import json
import shutil
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import MANIFEST, write_json
from safetensors.torch import load_file, save_file
from torch import Tensor

from spin.checkpoint import (
    Pipeline,
    load_pipeline,
    load_unet,
    save_pipeline,
    save_single_file,
    single_file,
)
from spin.checkpoint.configs import SD_1, SD_2
from spin.checkpoint.single_file import SingleFile
from spin.infra.errors import InputError
from spin.scheduler import Scheduler

EPS = "epsilon"
V = "v_prediction"
ZERO_SNR = "rescale_betas_zero_snr"
SCHEDULER_FILE = "scheduler/scheduler_config.json"

# the beginning of v2-inference-v.yaml, as published with SD-2.x at 768 px
YAML = """
model:
  base_learning_rate: 1.0e-4
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    parameterization: "v"
    linear_start: 0.00085
    linear_end: 0.0120
    num_timesteps_cond: 1
    log_every_t: 200
    timesteps: 1000
    first_stage_key: "jpg"
    cond_stage_key: "txt"
    image_size: 64
    channels: 4
    scale_factor: 0.18215
    use_ema: False # we set this to false because this is an inference only config
"""
DISCRETIZER = "sgm.modules.diffusionmodules.discretizer"
SCALING = "sgm.modules.diffusionmodules.denoiser_scaling"
YAML_EPS = YAML.replace('    parameterization: "v"\n', "")


def edit_json(path: Path, **changes) -> None:
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps(config))


def assert_refused(source: Path, *expected: str, **arguments) -> None:
    """Assert that loading ends in one short line that holds each of `expected`."""
    with pytest.raises(InputError) as error:
        load_pipeline(source, **arguments)
    check_message(str(error.value), expected)


def assert_file_refused(path: Path, *expected: str, prediction_type: str | None = None) -> None:
    """Assert the same of what a single file's network predicts."""
    with pytest.raises(InputError) as error:
        SingleFile(path).read_scheduler(prediction_type)
    check_message(str(error.value), expected)


def check_message(message: str, expected: tuple[str, ...]) -> None:
    for part in expected:
        assert part in message
    assert "\n" not in message
    assert len(message) < 500


# -----------------------------------------------------------------------------
# single files


@pytest.fixture(scope="module")
def pipes(tiny_folder, tiny2_folder) -> dict[str, Pipeline]:
    return {"SD-1": load_pipeline(tiny_folder), "SD-2": load_pipeline(tiny2_folder)}


def expect_tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make single files have the tiny models' configs in place of Stable Diffusion's."""
    for name, tag, published in (("SD_1", "tiny", SD_1), ("SD_2", "tiny2", SD_2)):
        config = dict(MANIFEST[f"{tag}.config"])
        config["scheduler"] = published["scheduler"]
        monkeypatch.setattr(single_file, name, config)


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch) -> None:
    expect_tiny_models(monkeypatch)


@pytest.fixture(scope="module")
def plain_tensors(pipes, tmp_path_factory) -> dict[str, dict[str, Tensor]]:
    """The tensors of a single file of each family, without a marker."""
    path = tmp_path_factory.mktemp("plain") / "model.safetensors"
    tensors = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        expect_tiny_models(monkeypatch)
        for family, pipe in pipes.items():
            save_single_file(pipe, path)
            tensors[family] = load_file(path)
            tensors[family].pop("v_pred", None)
    return tensors


@pytest.fixture
def write_file(plain_tensors, tmp_path):
    """Return a function that writes a single file which states nothing but what it is given."""

    def write(family: str, markers=(), metadata=None, yaml=None, suffix=".safetensors") -> Path:
        tensors = dict(plain_tensors[family])
        for name in markers:
            tensors[name] = torch.tensor([])

        path = tmp_path / f"model{suffix}"
        if suffix == ".ckpt":
            torch.save({"state_dict": tensors}, path)
        else:
            save_file(tensors, path, metadata)
        if yaml is not None:
            path.with_suffix(".yaml").write_text(yaml)
        return path

    return write


def metadata(key: str, value: str) -> dict:
    return {"metadata": {key: value}}


@pytest.mark.parametrize(
    "family, stated, expected",
    [
        ("SD-1", {}, EPS),
        ("SD-1", {"markers": ["v_pred"]}, V),
        ("SD-1", {"markers": ["v_pred"], "suffix": ".ckpt"}, V),
        ("SD-1", metadata("modelspec.prediction_type", "v"), V),
        ("SD-1", metadata("modelspec.prediction_type", "epsilon"), EPS),
        ("SD-1", metadata("modelspec.predict_key", "v"), V),
        ("SD-1", metadata("modelspec.prediction_type", "V_Prediction"), V),
        ("SD-1", metadata("prediction_type", "v_prediction"), V),
        ("SD-1", metadata("ss_v_parameterization", "True"), V),
        ("SD-1", metadata("ss_v_parameterization", "true"), V),
        ("SD-1", metadata("ss_v_parameterization", "1"), V),
        ("SD-1", metadata("ss_v_parameterization", "None"), EPS),
        ("SD-1", metadata("ss_base_model_version", "sd_v1_v"), V),
        ("SD-1", metadata("ss_base_model_version", "sd_v1"), EPS),
        ("SD-1", metadata("sd_merge_recipe", "{}"), EPS),
        ("SD-1", {"yaml": "prediction_type: v_prediction"}, V),
        ("SD-1", metadata("modelspec.architecture", "stable-diffusion-v1"), EPS),
        ("SD-1", {"yaml": YAML, "suffix": ".ckpt"}, V),
        ("SD-1", {"yaml": YAML_EPS}, EPS),
        ("SD-1", {"yaml": "learning_rate: 1.0e-5"}, EPS),  # somebody's notes
        ("SD-1", {"yaml": "# parameterization: v"}, EPS),
        ("SD-1", {"yaml": "model: {params: {parameterization: v}}"}, V),
        ("SD-1", {"yaml": YAML, "markers": ["v_pred"]}, V),
        ("SD-2", metadata("modelspec.prediction_type", "v"), V),
        ("SD-2", metadata("modelspec.architecture", "stable-diffusion-v2-512"), EPS),
        ("SD-2", metadata("modelspec.architecture", "stable-diffusion-v2-768-v"), V),
        ("SD-2", metadata("ss_v_parameterization", "False"), EPS),
        ("SD-2", {"yaml": YAML, "suffix": ".ckpt"}, V),
        ("SD-2", {"yaml": YAML_EPS, "suffix": ".ckpt"}, EPS),
        ("SD-2", metadata("ss_base_model_version", "sd_v2_v"), V),
        ("SD-2", {"yaml": f"scaling_config:\n  target: {SCALING}.VScaling"}, V),
        ("SD-2", {"yaml": f"{YAML}\n      layer: penultimate"}, V),
        ("SD-2", {"yaml": f"{YAML}\n  target: {DISCRETIZER}.LegacyDDPMDiscretization"}, V),
    ],
)
def test_a_file_says_what_its_network_predicts(family, stated, expected, write_file):
    scheduler = SingleFile(write_file(family, **stated)).read_scheduler()
    assert scheduler.prediction_type == expected
    assert scheduler.alphas_cumprod[-1] > 0


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_the_user_is_asked_what_a_silent_file_of_sd_2_predicts(suffix, write_file):
    """At 768 px it is v, at 512 px the noise, and the tensors are of the same shapes."""
    path = write_file("SD-2", suffix=suffix)
    assert_file_refused(path, f"model{suffix}: does not say", "--prediction-type")
    for prediction_type in (EPS, V):
        pipe = load_pipeline(path, prediction_type=prediction_type)
        assert pipe.scheduler.prediction_type == prediction_type


@pytest.mark.parametrize(
    "stated, places",
    [
        (
            {"markers": ["v_pred"]} | metadata("modelspec.prediction_type", "epsilon"),
            ["tensor v_pred says v_prediction", "modelspec.prediction_type says epsilon"],
        ),
        (
            {"yaml": YAML} | metadata("modelspec.architecture", "stable-diffusion-v2-512"),
            ["model.yaml says v_prediction", "modelspec.architecture says epsilon"],
        ),
        (
            {"yaml": YAML_EPS, "markers": ["v_pred"], "suffix": ".ckpt"},
            ["model.yaml says epsilon", "tensor v_pred says v_prediction"],
        ),
        (
            {"metadata": {"modelspec.prediction_type": "v", "modelspec.predict_key": "epsilon"}},
            ["modelspec.prediction_type says v_prediction", "modelspec.predict_key says epsilon"],
        ),
        ({"yaml": YAML + "    parameterization: eps"}, ["says v_prediction", "says epsilon"]),
    ],
    ids=lambda value: " but ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.parametrize("family", ["SD-1", "SD-2"])
def test_files_that_contradict_themselves_are_refused_until_the_user_decides(
    family, stated, places, write_file
):
    path = write_file(family, **stated)
    assert_file_refused(path, *places, "--prediction-type")
    for prediction_type in (EPS, V):
        scheduler = SingleFile(path).read_scheduler(prediction_type)
        assert scheduler.prediction_type == prediction_type


@pytest.mark.parametrize(
    "stated, word",
    [
        (metadata("modelspec.prediction_type", "vague"), "vague"),
        (metadata("modelspec.predict_key", "x0"), "x0"),
        (metadata("ss_v_parameterization", "maybe"), "maybe"),
        ({"yaml": "prediction_type: sample"}, "sample"),
        ({"yaml": YAML.replace('"v"', "x0")}, "x0"),
        ({"yaml": f"target: {SCALING}.OddScaling"}, "OddScaling"),
    ],
)
def test_unknown_predictions_are_refused(stated, word, write_file):
    path = write_file("SD-1", **stated)
    assert_file_refused(path, f"says '{word}', not epsilon or v_prediction", "--prediction-type")


@pytest.mark.parametrize("name", ["edm_mean", "edm_vpred.sigma_max"])
def test_files_of_edm_are_refused(name, write_file):
    path = write_file("SD-1", markers=[name])
    for prediction_type in (None, V):
        expected = (f"its tensor {name}", "EDM")
        assert_file_refused(path, *expected, prediction_type=prediction_type)


@pytest.mark.parametrize("scaling", ["EDMScaling", "VScalingWithEDMcNoise"])
def test_a_yaml_of_edm_is_refused_whatever_the_user_says(scaling, write_file):
    path = write_file("SD-1", yaml=f"target: {SCALING}.{scaling}")
    for prediction_type in (None, V):
        assert_file_refused(path, "model.yaml", scaling, prediction_type=prediction_type)


@pytest.mark.parametrize(
    "key, value, built_in",
    [
        ("linear_start", "0.0001", "0.00085"),
        ("linear_end", "2e-2", "0.012"),
        ("timesteps", "100", "1000"),
        ("scale_factor", "0.13025", "0.18215"),
        ("beta_schedule", "cosine", "linear"),
    ],
)
def test_a_yaml_of_another_schedule_is_refused(key, value, built_in, write_file):
    path = write_file("SD-1", yaml=f"{YAML}\n    {key}: {value}")
    for prediction_type in (None, V):
        expected = (f"model.yaml: {key} is {value}", f"it is {built_in}")
        assert_file_refused(path, *expected, prediction_type=prediction_type)


@pytest.mark.parametrize(
    "stated",
    [
        {"markers": ["v_pred", "ztsnr"]},
        {"markers": ["v_pred", "ztsnr"], "suffix": ".ckpt"},
        {"metadata": {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}},
        {"metadata": {"ss_v_parameterization": "true", "ss_zero_terminal_snr": "1"}},
        {"yaml": YAML + "    rescale_betas_zero_snr: True"},
        {"yaml": YAML + "    zsnr: true"},
        {"yaml": YAML + "    zero_terminal_snr: on"},
    ],
)
@pytest.mark.parametrize("family", ["SD-1", "SD-2"])
def test_a_file_says_that_its_schedule_ends_at_pure_noise(family, stated, write_file):
    scheduler = SingleFile(write_file(family, **stated)).read_scheduler()
    assert scheduler.alphas_cumprod[-1] == 0
    assert scheduler.prediction_type == V


@pytest.mark.parametrize(
    "stated", [metadata("ss_zero_terminal_snr", "half"), {"yaml": "zsnr: half"}], ids=str
)
def test_neither_yes_nor_no_is_refused(stated, write_file):
    path = write_file("SD-1", **stated)
    assert_file_refused(path, "snr is 'half', neither true nor false", prediction_type=V)


@pytest.mark.parametrize(
    "key, value",
    [
        ("modelspec.architecture", "stable-diffusion-xl-v1-base"),
        ("modelspec.architecture", "stable-diffusion-v1-inpainting"),
        ("ss_base_model_version", "sdxl_base_v1-0"),
    ],
)
def test_metadata_of_another_architecture_is_refused(key, value, write_file):
    path = write_file("SD-1", **metadata(key, value))
    assert_file_refused(path, f"its metadata {key} says {value}", "not Stable Diffusion 1.x")


@pytest.mark.parametrize(
    "family, line",
    [
        ("SD-1", "layer: penultimate"),
        ("SD-1", "params: {layer: hidden, layer_idx: -2}"),
        ("SD-2", 'layer: "last"'),
        ("SD-1", f"target: {DISCRETIZER}.EDMDiscretization"),
        ("SD-1", f"target: {DISCRETIZER}.ZeroSNRDDPMDiscretization"),
        ("SD-1", "given_betas: [0.1, 0.2]"),
        ("SD-2", "num_idx: 500"),
    ],
)
def test_a_yaml_of_another_model_is_refused(family, line, write_file):
    path = write_file(family, yaml=f"{YAML}\n    {line}")
    assert_file_refused(path, "model.yaml: ", prediction_type=V)


@pytest.mark.parametrize("line", ["layer: last", "given_betas: null"])
def test_a_yaml_may_state_what_is_assumed(line, write_file):
    path = write_file("SD-1", yaml=f"{YAML_EPS}\n    {line}")
    assert SingleFile(path).read_scheduler().prediction_type == EPS


def test_a_folder_keeps_that_its_schedule_ends_at_pure_noise(write_file, tmp_path):
    path = write_file("SD-1", markers=["v_pred", "ztsnr"])
    save_pipeline(load_pipeline(path), tmp_path / "folder")
    scheduler = load_pipeline(tmp_path / "folder").scheduler
    assert scheduler.alphas_cumprod[-1] == 0
    assert scheduler.prediction_type == V


def test_the_user_is_asked_what_is_predicted_at_pure_noise(write_file):
    path = write_file("SD-1", markers=["ztsnr"])
    assert_file_refused(path, "does not say", "--prediction-type")
    assert SingleFile(path).read_scheduler(V).alphas_cumprod[-1] == 0


# -----------------------------------------------------------------------------
# the schedule among a file's tensors


def training_buffers(alphas_cumprod: Tensor) -> dict[str, Tensor]:
    """Return what the original code and that of SD-2.1's successors store of a schedule."""
    alpha_bar = alphas_cumprod.double()
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    betas = 1 - alpha_bar / previous
    variance = betas * (1 - previous) / (1 - alpha_bar)
    buffers = {
        "betas": betas,
        "alphas_cumprod": alpha_bar,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": alpha_bar.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - alpha_bar).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - alpha_bar).log(),
        "sqrt_recip_alphas_cumprod": (1 / alpha_bar).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / alpha_bar - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * previous.sqrt() / (1 - alpha_bar),
        "posterior_mean_coef2": (1 - previous) * (1 - betas).sqrt() / (1 - alpha_bar),
        "logvar": torch.zeros(1000),
        "lvlb_weights": torch.ones(1000),
        "scale_factor": torch.tensor(0.18215),
        "denoiser.sigmas": (1 / alpha_bar - 1).sqrt(),
        "model_ema.decay": torch.tensor(0.9999),
    }
    return {name: buffer.float() for name, buffer in buffers.items()}


@pytest.fixture
def write_buffers(plain_tensors, tmp_path):
    """Return a function that writes a single file of SD-1.x with these tensors besides."""

    def write(buffers: dict[str, Tensor]) -> Path:
        save_file(plain_tensors["SD-1"] | buffers, tmp_path / "buffers.safetensors")
        return tmp_path / "buffers.safetensors"

    return write


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_buffers_of_a_training_change_nothing(
    dtype, write_buffers, pipes, assert_same_pipelines
):
    buffers = training_buffers(pipes["SD-1"].scheduler.alphas_cumprod)
    path = write_buffers({name: buffer.to(dtype) for name, buffer in buffers.items()})
    assert_same_pipelines(load_pipeline(path), pipes["SD-1"])


@pytest.mark.parametrize("name", ["betas", "alphas_cumprod", "denoiser.sigmas"])
def test_buffers_in_float8_are_too_coarse_to_say_anything(name, write_buffers, pipes):
    alphas_cumprod = pipes["SD-1"].scheduler.alphas_cumprod
    buffer = training_buffers(alphas_cumprod)[name].to(torch.float8_e4m3fn)
    scheduler = SingleFile(write_buffers({name: buffer})).read_scheduler()
    assert torch.equal(scheduler.alphas_cumprod, alphas_cumprod)


@pytest.mark.parametrize("name", ["betas", "alphas_cumprod", "denoiser.sigmas"])
@pytest.mark.parametrize("changes", [{"beta_schedule": "linear"}, {"beta_end": 0.02}], ids=str)
def test_the_buffers_of_another_schedule_are_refused(name, changes, write_buffers):
    other = Scheduler(SD_1["scheduler"] | changes).alphas_cumprod
    path = write_buffers({name: training_buffers(other)[name]})
    for prediction_type in (None, V):
        expected = f"its tensor {name} is of another noise schedule"
        assert_file_refused(path, expected, prediction_type=prediction_type)


@pytest.mark.parametrize("name", ["betas", "alphas_cumprod", "denoiser.sigmas"])
@pytest.mark.parametrize(
    "values", [torch.ones(1), torch.zeros(1000), torch.full((1000,), torch.nan)]
)
def test_broken_buffers_are_refused(name, values, write_buffers):
    assert_file_refused(write_buffers({name: values}), f"its tensor {name} is of another")


def test_another_scale_factor_is_refused(write_buffers):
    path = write_buffers({"scale_factor": torch.tensor(0.13025)})
    assert_file_refused(path, "its tensor scale_factor is not 0.18215")


@pytest.mark.parametrize("name", ["betas", "alphas_cumprod", "denoiser.sigmas"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_buffers_of_a_schedule_that_ends_at_pure_noise_say_so(name, dtype, write_buffers):
    expected = Scheduler(SD_1["scheduler"] | {ZERO_SNR: True}).alphas_cumprod
    buffer = training_buffers(expected)[name].to(dtype)
    path = write_buffers({name: buffer})
    assert_file_refused(path, "does not say", "--prediction-type")
    assert torch.equal(SingleFile(path).read_scheduler(V).alphas_cumprod, expected)


def test_a_statement_outlives_the_buffers_of_the_model_before(write_buffers, pipes):
    """As in files of kohya's, which keep the tensors of the file that a training began with."""
    buffers = training_buffers(pipes["SD-1"].scheduler.alphas_cumprod)
    path = write_buffers(buffers | {"ztsnr": torch.empty(0), "v_pred": torch.empty(0)})
    scheduler = SingleFile(path).read_scheduler()
    assert scheduler.alphas_cumprod[-1] == 0
    assert scheduler.prediction_type == V


@pytest.mark.parametrize("value", [True, 1, torch.tensor([]), np.bool_(True)], ids=repr)
@pytest.mark.parametrize("is_beside", [True, False])
def test_statements_in_a_pickle_need_not_be_tensors(value, is_beside, plain_tensors, tmp_path):
    content = {"state_dict": dict(plain_tensors["SD-1"])}
    place = content if is_beside else content["state_dict"]
    place["v_pred"] = value
    place["ztsnr"] = value
    torch.save(content, tmp_path / "model.ckpt")
    scheduler = SingleFile(tmp_path / "model.ckpt").read_scheduler()
    assert scheduler.prediction_type == V
    assert scheduler.alphas_cumprod[-1] == 0


@pytest.mark.parametrize("value", [False, None])
def test_a_statement_in_a_pickle_may_be_a_denial(value, plain_tensors, tmp_path):
    content = {"state_dict": plain_tensors["SD-1"], "v_pred": value, "ztsnr": value}
    torch.save(content, tmp_path / "model.ckpt")
    scheduler = SingleFile(tmp_path / "model.ckpt").read_scheduler()
    assert scheduler.prediction_type == EPS
    assert scheduler.alphas_cumprod[-1] > 0


# -----------------------------------------------------------------------------
# saved files


@pytest.mark.parametrize("family", ["SD-1", "SD-2"])
@pytest.mark.parametrize("prediction_type", [EPS, V])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_a_saved_file_states_what_it_predicts(
    family, prediction_type, zero_snr, pipes, tmp_path
):
    config = SD_1["scheduler"] | {"prediction_type": prediction_type, ZERO_SNR: zero_snr}
    pipe = replace(pipes[family], scheduler=Scheduler(config))
    path = tmp_path / "saved.safetensors"
    save_single_file(pipe, path)
    loaded = SingleFile(path).read_scheduler()
    assert torch.equal(loaded.alphas_cumprod, pipe.scheduler.alphas_cumprod)
    assert loaded.prediction_type == prediction_type

    names = load_file(path).keys()
    assert ("v_pred" in names) == (prediction_type == V)
    assert ("ztsnr" in names) == zero_snr


@pytest.mark.parametrize(
    "changes", [{"beta_schedule": "linear"}, {"beta_end": 0.02}, {"num_train_timesteps": 500}]
)
def test_a_schedule_that_a_file_cannot_state_is_not_saved(changes, pipes, tmp_path):
    pipe = replace(pipes["SD-1"], scheduler=Scheduler(SD_1["scheduler"] | changes))
    with pytest.raises(InputError, match="saved.safetensors: a single file states no betas"):
        save_single_file(pipe, tmp_path / "saved.safetensors")
    assert not (tmp_path / "saved.safetensors").exists()


def test_a_scaling_factor_that_a_file_cannot_state_is_not_saved(model_copy, tmp_path):
    edit_json(model_copy / "vae/config.json", scaling_factor=0.13025)
    with pytest.raises(InputError, match="a single file states no scaling_factor.* 0.13025"):
        save_single_file(load_pipeline(model_copy), tmp_path / "saved.safetensors")


# -----------------------------------------------------------------------------
# folders, and the UNet of another checkpoint


def test_the_user_overrides_what_a_folder_says(tiny_folder, tiny2_folder, tmp_path):
    assert load_pipeline(tiny2_folder, prediction_type=EPS).scheduler.prediction_type == EPS
    pipe = load_pipeline(tiny_folder, prediction_type=V)
    assert pipe.scheduler.prediction_type == V
    save_pipeline(pipe, tmp_path)
    assert load_pipeline(tmp_path).scheduler.prediction_type == V
    assert_refused(tiny_folder, "prediction_type 'sample'", prediction_type="sample")


@pytest.mark.parametrize("part", ["", "unet"])
def test_a_unet_that_predicts_something_else_is_refused_until_the_user_decides(
    part, tiny_folder, model_copy
):
    edit_json(model_copy / SCHEDULER_FILE, prediction_type=V)
    unet = model_copy / part
    expected = [f"the UNet of {unet} predicts v_prediction", f"{tiny_folder} states epsilon"]
    assert_refused(tiny_folder, *expected, "--prediction-type", unet=unet)
    for prediction_type in (EPS, V):
        pipe = load_pipeline(tiny_folder, unet=unet, prediction_type=prediction_type)
        assert pipe.scheduler.prediction_type == prediction_type


@pytest.mark.parametrize("part", ["", "unet"])
@pytest.mark.parametrize(
    "changes",
    [{"beta_schedule": "linear"}, {"num_train_timesteps": 500}, {ZERO_SNR: True}],
    ids=str,
)
def test_a_unet_of_another_noise_schedule_is_refused(changes, part, tiny_folder, model_copy):
    edit_json(model_copy / SCHEDULER_FILE, **changes)
    unet = model_copy / part
    for prediction_type in (None, EPS):
        arguments = {"unet": unet, "prediction_type": prediction_type}
        assert_refused(tiny_folder, str(unet), str(tiny_folder), "noise schedule", **arguments)


def test_a_unet_of_flow_matching_is_refused(tiny_folder, model_copy):
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    write_json(model_copy / SCHEDULER_FILE, flow)
    for unet in (model_copy, model_copy / "unet"):
        assert_refused(tiny_folder, str(model_copy), "velocity", unet=unet)


def test_a_unet_of_the_same_schedule_in_other_words_is_taken(tiny_folder, model_copy):
    """Another sampler, and its betas written out."""
    roots = torch.linspace(0.00085**0.5, 0.012**0.5, 1000)
    config = {
        "_class_name": "EulerDiscreteScheduler",
        "trained_betas": [round(beta, 8) for beta in (roots**2).tolist()],
        "use_karras_sigmas": True,
    }
    write_json(model_copy / SCHEDULER_FILE, config)
    load_pipeline(tiny_folder, unet=model_copy)


def test_a_folder_unet_without_a_scheduler_states_nothing(tiny2_folder, tmp_path):
    shutil.copytree(tiny2_folder / "unet", tmp_path / "unet")
    pipe = load_pipeline(tiny2_folder, unet=tmp_path / "unet")
    assert pipe.scheduler.prediction_type == V


def test_the_unet_of_a_single_file_must_agree_with_a_folder(tiny_folder, write_file):
    path = write_file("SD-1", markers=["v_pred"])
    expected = [f"the UNet of {path} predicts v_prediction", f"{tiny_folder} states epsilon"]
    assert_refused(tiny_folder, *expected, unet=path)
    assert_refused(path, str(tiny_folder), str(path), unet=tiny_folder)
    load_pipeline(tiny_folder, unet=path, prediction_type=V)


def test_the_scheduler_of_a_unet_from_the_hub_is_downloaded(tiny_folder, model_copy, monkeypatch):
    edit_json(model_copy / SCHEDULER_FILE, prediction_type=V)
    asked = []

    def snapshot_download(repository: str, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(model_copy)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert_refused(tiny_folder, "the UNet of org/name predicts v_prediction", unet="org/name")
    assert any(fnmatch(SCHEDULER_FILE, pattern) for pattern in asked)
    assert not any(pattern.startswith(("vae/", "text_encoder/")) for pattern in asked)
    load_unet("org/name")


# -----------------------------------------------------------------------------
# widths, and parts of other models


def test_a_text_encoder_of_another_width_is_refused(model_copy, tiny2_folder):
    shutil.rmtree(model_copy / "text_encoder")
    shutil.copytree(tiny2_folder / "text_encoder", model_copy / "text_encoder")
    expected = ["32 channels (cross_attention_dim)", "64 (hidden_size)", str(model_copy)]
    assert_refused(model_copy, *expected)


def test_a_unet_of_another_width_is_refused(tiny_folder, tiny2_folder, write_file):
    sources = [(tiny2_folder, 64), (tiny2_folder / "unet", 64), (write_file("SD-2"), 64)]
    for unet, width in sources:
        expected = [f"the UNet of {unet}", f"{width} channels", f"of {tiny_folder} makes 32"]
        assert_refused(tiny_folder, *expected, unet=unet, prediction_type=EPS)


@pytest.mark.parametrize(
    "part, changes",
    [
        ("unet", {"_class_name": "UNet2DModel"}),
        ("unet", {"_class_name": "UNetSpatioTemporalConditionModel"}),
        ("unet", {"resnet_out_scale_factor": 1.4142}),
        ("vae", {"_class_name": "AutoencoderTiny"}),
        ("vae", {"_class_name": "AutoencoderKLTemporalDecoder"}),
        ("vae", {"_class_name": "VQModel"}),
        ("vae", {"out_channels": 4}),
        ("text_encoder", {"model_type": "t5"}),
        ("text_encoder", {"model_type": "roberta_series"}),
    ],
    ids=str,
)
def test_networks_of_other_classes_are_refused_by_name(part, changes, model_copy):
    edit_json(model_copy / part / "config.json", **changes)
    [(key, value)] = changes.items()
    assert_refused(model_copy, str(model_copy / part), f"{key} is {value!r}")
