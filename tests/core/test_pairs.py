"""Specification of spin/pairs.py: real images encoded, the opponent's generated, both loaded."""

import math
from types import SimpleNamespace

import helpers
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import default_collate

from spin.data import CaptionedImages, batch_rows, noise_generator, random_draws
from spin.infra.errors import InputError
from spin.infra.shards import LatentShards
from spin.pairs import (
    PairLoader,
    encode_images,
    generate_images,
    load_preferences,
    rows_of_steps,
)
from spin.sampler import SamplingOptions, sample

NUM_ROWS = 12
SHAPE = (4, 2, 2)  # of a latent
SCALING_FACTOR = 0.5


# -----------------------------------------------------------------------------
# PairLoader, on made-up latents


class CaptionPipe:
    """Stands for a pipeline: a prompt is encoded as its length, so that a dropped one is 0."""

    vae = SimpleNamespace(scaling_factor=SCALING_FACTOR)
    scheduler = SimpleNamespace(num_train_timesteps=1000)
    reads_sizes = False

    def encode_prompts(self, prompts: list[str | None], sizes: Tensor | None = None) -> Tensor:
        lengths = [float(len(prompt or "")) for prompt in prompts]
        return torch.tensor(lengths)[:, None, None]


@pytest.fixture(scope="module")
def images(image_folder) -> CaptionedImages:
    return CaptionedImages(image_folder, 64)


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> LatentShards:
    """Latents of real images. Means are random, below zero where mirrored; variances are 1."""
    latents = LatentShards(tmp_path_factory.mktemp("real"), range(NUM_ROWS))
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for prefix in ("", "rejected_"):
        mean = 20 + torch.rand(NUM_ROWS, *SHAPE, generator=generator)
        tensors[f"{prefix}mean"] = mean
        tensors[f"{prefix}mean_flipped"] = -mean
        tensors[f"{prefix}logvar"] = torch.zeros(NUM_ROWS, *SHAPE)
        tensors[f"{prefix}logvar_flipped"] = torch.zeros(NUM_ROWS, *SHAPE)
    latents.write(0, [tensors])
    return latents


@pytest.fixture(scope="module")
def generated(tmp_path_factory) -> LatentShards:
    latents = LatentShards(tmp_path_factory.mktemp("generated"), range(NUM_ROWS))
    generator = torch.Generator().manual_seed(2)
    latents.write(0, [{"x0": torch.randn(NUM_ROWS, *SHAPE, generator=generator)}])
    return latents


@pytest.fixture
def make_loader(images, real, generated):
    """Return a function that makes a loader; its arguments replace the usual ones."""

    def make(**changes) -> PairLoader:
        arguments = {
            "loss": "spin",
            "pipe": CaptionPipe(),
            "images": images,
            "real": real,
            "generated": generated,
            "preferences": None,
            "seed": 3,
            "batch_size": NUM_ROWS,
            "flip": 0.0,
            "prompt_dropout": 0.0,
            "independent_noise": False,
            "dtype": torch.float32,
            "device": "cpu",
        }
        return PairLoader(**arguments | changes)

    return make


def expected_rows(loader: PairLoader, iteration: int, step: int) -> list[int]:
    return batch_rows(loader.seed, iteration, step, loader.batch_size, NUM_ROWS)


def expected_draws(loader: PairLoader, iteration: int, step: int) -> dict[str, Tensor]:
    draws = []
    for position in range(loader.batch_size):
        draws.append(random_draws(loader.seed, iteration, step, position, SHAPE, 1000, True))
    return default_collate(draws)


def test_a_batch_is_made_of_its_rows_and_its_draws(make_loader, images, real, generated):
    loader = make_loader()
    batch = loader.load(iteration=2, step=5, start=0, end=NUM_ROWS)
    rows = expected_rows(loader, 2, 5)
    draws = expected_draws(loader, 2, 5)

    assert batch.keys() == {"x0_data", "x0_gen", "eps", "t", "context"}
    posterior_sample = real.read("mean", rows) + draws["posterior_noise"]  # of variance 1
    torch.testing.assert_close(batch["x0_data"], SCALING_FACTOR * posterior_sample)
    assert torch.equal(batch["x0_gen"], generated.read("x0", rows))
    assert torch.equal(batch["eps"], draws["eps"])
    assert torch.equal(batch["t"], draws["t"])
    lengths = [len(images.caption(row)) for row in rows]
    assert batch["context"].flatten().tolist() == lengths


def test_the_posterior_is_sampled_with_its_own_standard_deviation(make_loader, tmp_path):
    """logvar = 2 log 3 is a standard deviation of 3."""
    latents = LatentShards(tmp_path, range(NUM_ROWS))
    mean = torch.zeros(NUM_ROWS, *SHAPE)
    logvar = torch.full((NUM_ROWS, *SHAPE), 9.0).log()
    latents.write(0, [{"mean": mean, "logvar": logvar}])
    loader = make_loader(real=latents)
    batch = loader.load(1, 1, 0, NUM_ROWS)
    expected = SCALING_FACTOR * 3 * expected_draws(loader, 1, 1)["posterior_noise"]
    torch.testing.assert_close(batch["x0_data"], expected, rtol=1e-3, atol=1e-3)  # float16 latents


@pytest.mark.parametrize("loss", ["spin", "dpo", "sft"])
@pytest.mark.parametrize("micro_batch", [1, 5])
def test_micro_batches_are_parts_of_the_batch(make_loader, loss, micro_batch):
    loader = make_loader(loss=loss, flip=0.5, prompt_dropout=0.5, independent_noise=True)
    batch = loader.load(1, 4, 0, NUM_ROWS)
    for start in range(0, NUM_ROWS, micro_batch):
        end = min(start + micro_batch, NUM_ROWS)
        part = loader.load(1, 4, start, end)
        assert part.keys() == batch.keys()
        for name in batch:
            assert torch.equal(part[name], batch[name][start:end])


def test_in_dpo_the_rejected_image_takes_the_place_of_the_generated_one(make_loader, real):
    """It shares the draw from the posterior and the mirroring with the preferred one."""
    loader = make_loader(loss="dpo", generated=None, flip=0.5)
    batch = loader.load(1, 1, 0, NUM_ROWS)
    rows = expected_rows(loader, 1, 1)
    draws = expected_draws(loader, 1, 1)
    sign = torch.where(draws["flip"] < 0.5, -1, 1)[:, None, None, None]
    expected = sign * real.read("rejected_mean", rows) + draws["posterior_noise"]
    torch.testing.assert_close(batch["x0_gen"], SCALING_FACTOR * expected)
    assert torch.equal(batch["x0_data"] < 0, batch["x0_gen"] < 0)


@pytest.fixture(scope="module")
def preferences() -> dict[str, Tensor]:
    """A pair of generated images for each row, as float16 latents."""
    generator = torch.Generator().manual_seed(4)
    return {
        "preferred": torch.randn(NUM_ROWS, *SHAPE, generator=generator).half(),
        "rejected": torch.randn(NUM_ROWS, *SHAPE, generator=generator).half(),
    }


def test_in_dpo_with_preferences_both_images_of_a_row_are_its_pair(make_loader, preferences):
    """They are generated images: not mirrored, and not drawn from the VAE's posterior."""
    loader = make_loader(loss="dpo", generated=None, preferences=preferences, flip=0.5)
    batch = loader.load(1, 1, 0, NUM_ROWS)
    rows = expected_rows(loader, 1, 1)
    assert rows != sorted(rows)
    assert batch["x0_data"].dtype == batch["x0_gen"].dtype == torch.float32
    for position, row in enumerate(rows):
        assert torch.equal(batch["x0_data"][position], preferences["preferred"][row].float())
        assert torch.equal(batch["x0_gen"][position], preferences["rejected"][row].float())


@pytest.mark.parametrize("loss", ["spin", "sft"])
def test_preferences_are_of_dpo_alone(make_loader, preferences, loss):
    batch = make_loader(loss=loss).load(1, 1, 0, NUM_ROWS)
    with_preferences = make_loader(loss=loss, preferences=preferences).load(1, 1, 0, NUM_ROWS)
    assert batch.keys() == with_preferences.keys()
    for name in batch:
        assert torch.equal(batch[name], with_preferences[name])


def test_preferences_are_read_as_they_were_saved(preferences, tmp_path):
    path = tmp_path / "preferences.safetensors"
    save_file(preferences, path, {"model_hash": "0123"})
    loaded = load_preferences(path, (NUM_ROWS, *SHAPE), "0123")
    assert loaded.keys() == preferences.keys()
    for name in preferences:
        assert torch.equal(loaded[name], preferences[name])


def of_fewer_rows(preferences):
    return {name: tensor[1:] for name, tensor in preferences.items()}


def of_other_channels(preferences):
    return {name: tensor[:, :2].clone() for name, tensor in preferences.items()}


def without_the_rejected(preferences):
    return {"preferred": preferences["preferred"]}


def with_another_tensor(preferences):
    return {**preferences, "third": preferences["preferred"].clone()}


def with_nan(preferences):
    tensor = preferences["rejected"].clone()
    tensor[3, 0, 0, 0] = math.nan
    return {**preferences, "rejected": tensor}


FOREIGN = {
    of_fewer_rows: "must hold two tensors, preferred and rejected, of shape",
    of_other_channels: "must hold two tensors, preferred and rejected, of shape",
    without_the_rejected: "must hold two tensors, preferred and rejected, of shape",
    with_another_tensor: "must hold two tensors, preferred and rejected, of shape",
    with_nan: "rejected holds NaN or infinity",
}


@pytest.mark.parametrize("change", FOREIGN)
def test_other_preferences_are_refused_by_name(preferences, tmp_path, change):
    path = tmp_path / "preferences.safetensors"
    save_file(change(preferences), path, {"model_hash": "0123"})
    with pytest.raises(InputError, match=f"preferences.safetensors: {FOREIGN[change]}"):
        load_preferences(path, (NUM_ROWS, *SHAPE), "0123")


@pytest.mark.parametrize("metadata", [None, {"model_hash": "4567"}])
def test_preferences_of_another_model_are_refused_by_name(preferences, tmp_path, metadata):
    path = tmp_path / "preferences.safetensors"
    save_file(preferences, path, metadata)
    with pytest.raises(InputError, match="preferences.safetensors: not generated by the model"):
        load_preferences(path, (NUM_ROWS, *SHAPE), "0123")


def test_sft_has_no_second_image(make_loader):
    batch = make_loader(loss="sft", generated=None, independent_noise=True).load(1, 1, 0, 4)
    assert batch.keys() == {"x0_data", "eps", "t", "context"}


@pytest.mark.parametrize("loss", ["spin", "dpo"])
def test_independent_noise_is_the_pairs_third_draw(make_loader, loss):
    loader = make_loader(loss=loss, independent_noise=True)
    batch = loader.load(1, 1, 0, NUM_ROWS)
    draws = expected_draws(loader, 1, 1)
    assert torch.equal(batch["eps"], draws["eps"])
    assert torch.equal(batch["eps_gen"], draws["eps_gen"])


def test_an_unknown_loss_is_refused(make_loader):
    with pytest.raises(ValueError, match="loss 'ipo'"):
        make_loader(loss="ipo").load(1, 1, 0, 4)


def load_flips_and_drops(loader: PairLoader, num_steps: int) -> tuple[Tensor, Tensor]:
    """Return which pairs of the first steps are mirrored, and which have the empty prompt."""
    mirrored = []
    dropped = []
    for step in range(1, num_steps + 1):
        batch = loader.load(1, step, 0, NUM_ROWS)
        mirrored.append(batch["x0_data"].mean((1, 2, 3)) < 0)
        dropped.append(batch["context"].flatten() == 0)
    return torch.cat(mirrored).double(), torch.cat(dropped).double()


@pytest.mark.parametrize("probability", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_images_are_mirrored_and_prompts_dropped_with_the_probability_that_is_given(
    make_loader, probability
):
    """The share among 1200 pairs is within 4.5 standard errors."""
    bound = 4.5 * (probability * (1 - probability) / 1200) ** 0.5
    mirrored, _ = load_flips_and_drops(make_loader(flip=probability), 100)
    _, dropped = load_flips_and_drops(make_loader(prompt_dropout=probability), 100)
    assert abs(mirrored.mean() - probability) <= bound
    assert abs(dropped.mean() - probability) <= bound


def test_mirroring_and_dropping_are_independent(make_loader):
    loader = make_loader(flip=0.5, prompt_dropout=0.5)
    mirrored, dropped = load_flips_and_drops(loader, 100)
    both = (mirrored * dropped).mean()
    assert abs(both - 0.25) < 4.5 * (0.25 * 0.75 / 1200) ** 0.5


def test_dropping_a_prompt_changes_nothing_else(make_loader):
    batch = make_loader().load(1, 1, 0, NUM_ROWS)
    other = make_loader(prompt_dropout=1.0).load(1, 1, 0, NUM_ROWS)
    for name in ("x0_data", "x0_gen", "eps", "t"):
        assert torch.equal(batch[name], other[name])
    assert not other["context"].any()


# -----------------------------------------------------------------------------
# encode_images and generate_images, on the tiny networks


@torch.no_grad()
@pytest.mark.parametrize("mirrored", [False, True])
def test_real_images_are_stored_as_mean_and_log_variance(pipe, image_folder, tmp_path, mirrored):
    images = CaptionedImages(image_folder, 64, limit=5)
    latents = LatentShards(tmp_path, range(5))
    encode_images(pipe.vae, images, latents, mirrored, "cpu")
    assert latents.count_missing() == 0
    for row in range(5):
        pixels = images.image(row)[None]
        mean, logvar = pipe.vae.encode(pixels)
        stored = {"rtol": 2e-3, "atol": 2e-3}  # float16
        torch.testing.assert_close(latents.read("mean", [row]), mean, **stored)
        torch.testing.assert_close(latents.read("logvar", [row]), logvar, **stored)
        if mirrored:
            mean, logvar = pipe.vae.encode(pixels.flip(3))
            torch.testing.assert_close(latents.read("mean_flipped", [row]), mean, **stored)
            torch.testing.assert_close(latents.read("logvar_flipped", [row]), logvar, **stored)


@torch.no_grad()
def test_rejected_images_are_stored_beside_the_preferred_ones(pipe, tmp_path):
    Image.new("RGB", (16, 16), "white").save(tmp_path / "preferred.png")
    Image.new("RGB", (16, 16), "black").save(tmp_path / "rejected.png")
    row = {"file_name": "preferred.png", "rejected_file_name": "rejected.png", "text": "a"}
    helpers.write_metadata(tmp_path, [row])
    images = CaptionedImages(tmp_path, 16, with_rejected=True)
    latents = LatentShards(tmp_path / "cache", range(1))
    encode_images(pipe.vae, images, latents, mirrored=False, device="cpu")
    mean, _ = pipe.vae.encode(torch.ones(1, 3, 16, 16))
    rejected_mean, _ = pipe.vae.encode(-torch.ones(1, 3, 16, 16))
    torch.testing.assert_close(latents.read("mean", [0]), mean, rtol=2e-3, atol=2e-3)
    stored = latents.read("rejected_mean", [0])
    torch.testing.assert_close(stored, rejected_mean, rtol=2e-3, atol=2e-3)


def test_a_generated_image_is_the_opponents_sample_for_its_caption_and_its_noise(
    pipe, image_folder, tmp_path
):
    """Whatever the rows it is generated together with."""
    images = CaptionedImages(image_folder, 64)
    options = SamplingOptions(steps=2, guidance=2.0, height=64, width=64)
    rows = [1, 4, 6, 7, 10]
    real = LatentShards(tmp_path / "real", rows)  # its sizes are for SDXL alone
    latents = LatentShards(tmp_path / "generated", rows)
    generate_images(pipe, images, real, latents, 3, 2, options, batch_size=2)
    for row in rows:
        generator = noise_generator(seed=3, iteration=2, row=row)
        expected = sample(pipe, [images.caption(row)], generators=[generator], **vars(options))
        torch.testing.assert_close(latents.read("x0", [row]), expected, rtol=2e-3, atol=2e-3)


def test_files_that_are_there_are_not_made_again(pipe, image_folder, tmp_path):
    images = CaptionedImages(image_folder, 64, limit=2)
    kept = torch.ones(2, 4, 8, 8)
    real = LatentShards(tmp_path / "real", range(2))
    real.write(0, [{"mean": kept, "logvar": kept}])
    generated = LatentShards(tmp_path / "generated", range(2))
    generated.write(0, [{"x0": kept}])
    encode_images(pipe.vae, images, real, mirrored=False, device="cpu")
    generate_images(pipe, images, real, generated, 3, 1, SamplingOptions(), batch_size=2)
    assert torch.equal(real.read("mean", [0, 1]), kept)
    assert torch.equal(generated.read("x0", [0, 1]), kept)


def test_rows_of_steps_are_those_that_training_draws():
    steps = [(1, 1), (1, 2), (2, 1)]
    rows = rows_of_steps(seed=3, steps=steps, batch_size=4, num_rows=1000)
    drawn = set()
    for iteration, step in steps:
        drawn.update(batch_rows(3, iteration, step, 4, 1000))
    assert rows == sorted(drawn)
    assert len(rows) > 8
