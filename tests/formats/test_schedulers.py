"""Schedulers of folders: the noise schedule and the prediction type are the model's, and are obeyed
or refused. The rest is a sampler's that is not used here, and is ignored.

tests/data/README.md says how the images of diffusers were made.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import DATA, SCHEDULER, write_json
from safetensors.torch import load_file

from spin.checkpoint import load_pipeline, save_pipeline
from spin.checkpoint.folder import Folder
from spin.infra.errors import InputError
from spin.sampler import SAMPLERS, decode_latents, sample
from spin.scheduler import Scheduler
from spin.step import sft_step

CASES = json.loads((DATA / "schedulers.json").read_text())  # name -> model and config
IMAGES = load_file(DATA / "schedulers.safetensors")

ZERO_SNR = SCHEDULER | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}


@pytest.fixture(scope="module")
def pipes(tiny_folder, tiny2_folder) -> dict:
    folders = {"tiny": tiny_folder, "tiny2": tiny2_folder}
    return {name: load_pipeline(folder).freeze() for name, folder in folders.items()}


def read_scheduler(folder: Path, config: dict) -> Scheduler:
    """Return the scheduler of a folder with this config."""
    write_json(folder / "scheduler/scheduler_config.json", config)
    return Folder(folder).read_scheduler()


def assert_refused(folder: Path, config: dict, *expected: str) -> None:
    """Assert that reading ends in one short line that names the folder and holds `expected`."""
    with pytest.raises(InputError) as error:
        read_scheduler(folder, config)
    message = str(error.value)
    for part in (str(folder / "scheduler"), *expected):
        assert part in message
    assert "\n" not in message
    assert len(message) < 400


# -----------------------------------------------------------------------------
# read


@pytest.mark.parametrize("case", CASES)
def test_the_image_is_that_of_diffusers_ddim_with_the_same_config(case, pipes, tmp_path):
    scheduler = read_scheduler(tmp_path, CASES[case]["config"])
    pipe = replace(pipes[CASES[case]["model"]], scheduler=scheduler)
    generators = [torch.Generator().manual_seed(1)]
    latents = sample(pipe, ["a red circle"], 5, 5.0, generators=generators, height=32, width=32)
    [image] = decode_latents(pipe, latents) * 255
    difference = image.round() - IMAGES[case].float()
    assert difference.abs().max() <= 1


@pytest.mark.parametrize(
    "setting",
    [
        {"clip_sample": True, "clip_sample_range": 0.5},
        {"dynamic_thresholding_ratio": 0.5, "sample_max_value": 0.1},  # of no thresholding
        {"timestep_spacing": "trailing"},
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True},
        {"interpolation_type": "log_linear"},
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 3, "solver_type": "heun"},
        {"predict_x0": False},
        {"variance_type": "fixed_large"},
        {"final_sigmas_type": "sigma_min", "lower_order_final": False},
        {"sigma_min": 0.03, "sigma_max": 14.6},
        {"lambda_min_clipped": -5.1},
        {"original_inference_steps": 50, "timestep_scaling": 10.0},
        {"skip_prk_steps": False},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_settings_of_samplers_say_nothing_about_the_model(setting, tmp_path):
    plain = read_scheduler(tmp_path, SCHEDULER)
    scheduler = read_scheduler(tmp_path, SCHEDULER | setting)
    assert torch.equal(scheduler.alphas_cumprod, plain.alphas_cumprod)
    assert torch.equal(scheduler.timesteps(50), plain.timesteps(50))
    assert torch.equal(scheduler.final_alpha_cumprod, plain.final_alpha_cumprod)


def test_trained_betas_replace_the_schedule(tmp_path):
    betas = [0.1, 0.5, 0.25, 0.5]
    config = SCHEDULER | {"trained_betas": betas, "num_train_timesteps": 4}
    scheduler = read_scheduler(tmp_path, config)
    torch.testing.assert_close(scheduler.alphas_cumprod, torch.tensor([0.9, 0.45, 0.3375, 0.16875]))


def test_a_missing_class_name_is_no_fault_if_the_betas_are_there(tmp_path):
    config = {key: value for key, value in SCHEDULER.items() if key != "_class_name"}
    scheduler = read_scheduler(tmp_path, config)
    assert torch.equal(scheduler.alphas_cumprod, Scheduler(SCHEDULER).alphas_cumprod)


def test_a_saved_folder_keeps_the_config_as_it_was(pipes, tmp_path):
    config = CASES["zero_snr"]["config"]
    pipe = replace(pipes["tiny2"], scheduler=read_scheduler(tmp_path / "read", config))
    save_pipeline(pipe, tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/scheduler/scheduler_config.json").read_text())
    assert saved == config


# -----------------------------------------------------------------------------
# refused


@pytest.mark.parametrize(
    "config, reason",
    [
        # as published with SD-3
        (
            {
                "_class_name": "FlowMatchEulerDiscreteScheduler",
                "num_train_timesteps": 1000,
                "shift": 3.0,
                "use_dynamic_shifting": False,
            },
            "velocity between data and noise",
        ),
        (SCHEDULER | {"_class_name": "FlowMatchHeunDiscreteScheduler"}, "velocity between data"),
        (SCHEDULER | {"_class_name": "EDMEulerScheduler", "sigma_data": 0.5}, "EDM"),
        (SCHEDULER | {"_class_name": "EDMDPMSolverMultistepScheduler"}, "EDM"),
        (SCHEDULER | {"_class_name": "CMStochasticIterativeScheduler"}, "consistency model"),
        (SCHEDULER | {"_class_name": "KarrasVeScheduler"}, "no alpha_bar"),
        (SCHEDULER | {"_class_name": "ScoreSdeVeScheduler"}, "no alpha_bar"),
        (SCHEDULER | {"_class_name": "VQDiffusionScheduler"}, "discrete"),
        (SCHEDULER | {"_class_name": "CogVideoXDDIMScheduler"}, "not a sampler that Stable"),
        (SCHEDULER | {"_class_name": "MyScheduler"}, "not a sampler that Stable"),
        (SCHEDULER | {"_class_name": ["DDIMScheduler"]}, "not a sampler that Stable"),
    ],
    ids=lambda value: str(value["_class_name"]) if isinstance(value, dict) else "",
)
def test_schedulers_of_another_family_are_refused_by_name(config, reason, tmp_path):
    assert_refused(tmp_path, config, str(config["_class_name"]), reason)


@pytest.mark.parametrize(
    "setting",
    [
        {"prediction_type": "sample"},
        {"prediction_type": "flow_prediction"},
        {"prediction_type": None},
        {"predict_epsilon": False},  # as diffusers 0.9 wrote "sample"
        {"use_flow_sigmas": True},  # makes DPMSolverMultistepScheduler one of flow matching
        {"timestep_type": "continuous"},  # EulerDiscreteScheduler of Stable Video Diffusion
    ],
    ids=str,
)
def test_networks_that_predict_something_else_are_refused(setting, tmp_path):
    [key] = setting
    assert_refused(tmp_path, SCHEDULER | setting, key, repr(setting[key]))


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule 'squaredcos_cap_v2'"),
        ({"beta_start": "a"}, "not usable"),
        ({"beta_start": -0.1}, "not usable"),
        ({"beta_end": 1.5}, "between 0 and 1"),
        ({"trained_betas": [0.1, 0.2]}, "[2] betas for 1000 timesteps"),
        ({"trained_betas": [[0.1] * 1000]}, "[1, 1000] betas for 1000 timesteps"),
        ({"trained_betas": [float("nan")] * 1000}, "between 0 and 1"),
        ({"num_train_timesteps": 0}, "for 0 timesteps"),
        ({"num_train_timesteps": -5}, "not usable"),
        ({"steps_offset": None}, "not usable"),
        ({"steps_offset": -1}, "steps_offset -1"),
    ],
    ids=str,
)
def test_impossible_schedules_are_refused(changes, expected, tmp_path):
    assert_refused(tmp_path, SCHEDULER | {"set_alpha_to_one": True} | changes, expected)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_thresholding_is_refused(name, tmp_path):
    """DDIMScheduler.from_config would bound what is predicted, whatever class wrote the config."""
    config = SCHEDULER | {"_class_name": name, "thresholding": True}
    assert_refused(tmp_path, config, "thresholding is True")
    read_scheduler(tmp_path, config | {"_use_default_values": ["thresholding"]})
    read_scheduler(tmp_path, config | {"thresholding": False})


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "LCMScheduler", None])
@pytest.mark.parametrize("key", ["beta_start", "beta_end", "beta_schedule"])
def test_betas_must_be_stated_unless_their_defaults_are_ddims(key, name, tmp_path):
    """What diffusers takes for missing betas depends on the class: 0.0001 or 0.00085, and so on."""
    config = SCHEDULER | {"_class_name": name}
    del config[key]
    if name is None:
        del config["_class_name"]
    assert_refused(tmp_path, config, f"lacks {key}")

    config["trained_betas"] = [0.01] * 1000
    read_scheduler(tmp_path, config)


# -----------------------------------------------------------------------------
# the class that model_index.json states, which diffusers obeys


def read_with_index(folder: Path, index_class: str | None, config: dict) -> Scheduler:
    index = {"_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", index_class]}
    write_json(folder / "model_index.json", index)
    return read_scheduler(folder, config)


@pytest.mark.parametrize(
    "name, reason",
    [
        ("FlowMatchEulerDiscreteScheduler", "velocity between data and noise"),
        ("EDMEulerScheduler", "noise levels sigma"),
        ("MyScheduler", "not a sampler that Stable"),
    ],
)
def test_a_scheduler_of_another_family_in_the_index_is_refused(name, reason, tmp_path):
    with pytest.raises(InputError, match=f"model_index.json: its scheduler is {name}: .*{reason}"):
        read_with_index(tmp_path, name, SCHEDULER)


@pytest.mark.parametrize("name", ["DDIMScheduler", "UniPCMultistepScheduler", "LCMScheduler", None])
def test_the_index_may_state_any_sampler_of_stable_diffusion(name, tmp_path):
    scheduler = read_with_index(tmp_path, name, SCHEDULER)
    assert torch.equal(scheduler.alphas_cumprod, Scheduler(SCHEDULER).alphas_cumprod)


def test_the_index_does_not_hide_a_foreign_config(tmp_path):
    config = SCHEDULER | {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    with pytest.raises(InputError, match="scheduler_config.json: .*velocity"):
        read_with_index(tmp_path, "DDIMScheduler", config)


def test_missing_betas_are_refused_if_their_defaults_depend_on_which_class_counts(tmp_path):
    config = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_end": 0.012}
    read_with_index(tmp_path, "PNDMScheduler", config)
    with pytest.raises(InputError, match="scheduler_config.json: lacks beta_start"):
        read_with_index(tmp_path, "HeunDiscreteScheduler", config)
    config["_class_name"] = "HeunDiscreteScheduler"
    with pytest.raises(InputError, match="scheduler_config.json: lacks beta_start"):
        read_with_index(tmp_path, "PNDMScheduler", config)


# -----------------------------------------------------------------------------
# zero-terminal SNR


def test_zero_terminal_snr_ends_at_pure_noise_and_begins_as_before():
    """arXiv 2305.08891: sqrt(alpha_bar) is an affine function of what it was."""
    before = Scheduler(SCHEDULER).alphas_cumprod.double().sqrt()
    after = Scheduler(ZERO_SNR).alphas_cumprod.double().sqrt()
    assert after[-1] == 0
    assert after[0].item() == pytest.approx(before[0].item(), abs=1e-6)
    slopes = after.diff() / before.diff()
    torch.testing.assert_close(slopes, slopes.mean().expand(999), rtol=2e-2, atol=0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_begins_at_pure_noise(sampler, pipes):
    """The first step is at alpha_bar = 0, where v is -x0: what follows is finite, and one step
    gives just that x0."""
    scheduler = Scheduler(ZERO_SNR | {"steps_offset": 199, "set_alpha_to_one": True})
    assert scheduler.alphas_cumprod[scheduler.timesteps(5)[0]] == 0
    pipe = replace(pipes["tiny2"], scheduler=scheduler)
    settings = {"sampler": sampler, "eta": 1.0, "height": 32, "width": 32}
    assert sample(pipe, ["a red circle"], 5, **settings).isfinite().all()

    pipe.scheduler = Scheduler(ZERO_SNR | {"steps_offset": 999, "set_alpha_to_one": True})
    latents = sample(pipe, ["a red circle"], 1, 1.0, **settings)
    noise = torch.randn((1, 4, 4, 4), generator=torch.Generator().manual_seed(0))
    v = pipe.unet(noise, torch.tensor([999]), pipe.encode_prompts(["a red circle"]))
    torch.testing.assert_close(latents, -v, rtol=0, atol=1e-5)


def test_a_prediction_of_the_noise_gives_no_image_from_pure_noise(pipes):
    config = ZERO_SNR | {"prediction_type": "epsilon", "steps_offset": 199}
    pipe = replace(pipes["tiny2"], scheduler=Scheduler(config))
    with pytest.raises(InputError, match="5 sampling steps: the first is at pure noise"):
        sample(pipe, ["a red circle"], 5, height=32, width=32)
    assert sample(pipe, ["a red circle"], 4, height=32, width=32).isfinite().all()


def test_training_at_pure_noise_is_finite(pipes):
    pipe = pipes["tiny2"]
    x0 = torch.ones(2, 4, 8, 8)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    loss, _ = sft_step(
        pipe.unet,
        x0_data=x0,
        eps=noise,
        t=torch.tensor([999, 998]),
        context=pipe.encode_prompts(["a red circle"] * 2),
        alphas_cumprod=Scheduler(ZERO_SNR).alphas_cumprod,
        prediction_type="v_prediction",
    )
    assert loss.isfinite()
