"""Specification of tutorial/variants.py: each control is what it says, and leaves nothing behind."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from spin import pairs, sampler, step, toy
from spin.checkpoint import load_pipeline
from spin.infra.shards import LatentShards
from spin.loss import per_image_error, spin_bounded_loss, spin_loss
from spin.sampler import decode_latents
from spin.scheduler import add_noise
from tutorial import evidence, variants

SMALL = "--preset toy --iterations 1 --steps 2 --batch-size 4 --sampler-steps 2 --warmup 0"
QUIET = "--score none --grid-prompts 0 --device cpu"


def run(flags: str, out: Path) -> Path:
    train.main([*SMALL.split(), *QUIET.split(), *flags.split(), "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline(toy.BASE).freeze()


# ---- Losses --------------------------------------------------------------------------------------

ERRORS = [torch.tensor(values) for values in ([1.0, 1.5], [2.0, 1.0], [1.2, 1.2], [1.7, 1.3])]
BETA = 3.0


def test_correlation_has_the_bounded_losss_scale_and_no_bound():
    gap = torch.tensor([0.3, 0.4])
    losses, metrics = variants.correlation_loss(*ERRORS, gap, BETA)
    delta_data = torch.tensor([-0.2, 0.3])
    delta_gen = torch.tensor([0.3, -0.3])
    torch.testing.assert_close(losses, BETA / 4 * (delta_data - delta_gen))
    bounded, same_metrics = spin_bounded_loss(*ERRORS, gap, BETA)
    torch.testing.assert_close(bounded - losses, BETA / 2 * gap)
    torch.testing.assert_close(metrics, same_metrics)


def test_a_charge_counts_rises_of_the_error_five_times():
    losses, metrics = variants.charged_loss(*ERRORS, BETA)
    delta_data = torch.tensor([-0.2, 5 * 0.3])
    delta_gen = torch.tensor([0.3, -0.3])
    torch.testing.assert_close(losses, -torch.sigmoid(BETA / 2 * (delta_gen - delta_data)).log())
    _, same_metrics = spin_loss(*ERRORS, BETA)
    torch.testing.assert_close(metrics, same_metrics)


@pytest.mark.parametrize("name, flags", [("correlation", "spin-bounded"), ("charge", "spin")])
def test_a_run_trains_by_the_variants_loss(tmp_path, name, flags):
    """The first steps agree: at theta_k the losses and their gradients are the same."""
    command = f"--loss {flags} --lr 1e-3 --steps 3"
    run(command, tmp_path / "plain")
    with variants.VARIANTS[name]():
        run(command, tmp_path / "variant")
    plain = train.Run(tmp_path / "plain").read_log()
    variant = train.Run(tmp_path / "variant").read_log()
    assert variant[0]["loss"] == plain[0]["loss"]
    assert variant[1]["loss"] != plain[1]["loss"]


# ---- How opponents draw --------------------------------------------------------------------------


def generated(folder: Path) -> torch.Tensor:
    rows = train.rows_of_steps(0, [(1, 1), (1, 2)], 4, toy.NUM_ROWS)
    return LatentShards(folder / "iter1/generated", rows).read("x0", rows)


def test_through_pixels_images_have_eight_bits(tmp_path, pipe):
    plain = generated(run("--loss spin", tmp_path / "plain"))
    with variants.pixels():
        variant = generated(run("--loss spin", tmp_path / "variant"))
    distance = {}
    with torch.no_grad():
        images = decode_latents(pipe, plain)
        for name, values in {"exact": images, "rounded": (images * 255).round() / 255}.items():
            latents = pipe.vae.encode(2 * values - 1)[0] * pipe.vae.scaling_factor
            distance[name] = (variant - latents).abs().mean()
    assert distance["rounded"] < 0.3 * distance["exact"]
    assert distance["exact"] < 0.1 * (variant - plain).abs().mean()


@pytest.fixture(scope="module")
def batches(tmp_path_factory) -> dict[str, tuple[dict, dict]]:
    """{variant: the first step's batch and its metrics}."""
    found = {}
    call = step.LossStep.__call__
    for name in ("path", "guided-path"):

        def record(loss_step, policy, batch, name=name):
            loss, metrics = call(loss_step, policy, batch)
            found.setdefault(name, (batch, metrics))
            return loss, metrics

        with pytest.MonkeyPatch.context() as patch, variants.VARIANTS[name]():
            patch.setattr(step.LossStep, "__call__", record)
            run("--loss spin --sampler-steps 5", tmp_path_factory.mktemp("path") / name)
    return found


def noised(pipe, batch: dict) -> torch.Tensor:
    alpha_bar = pipe.scheduler.alphas_cumprod[batch["t"]]
    return add_noise(batch["x0_gen"], batch["eps_gen"], alpha_bar)


def test_on_its_path_the_opponents_own_error_is_zero(pipe, batches):
    batch, metrics = batches["path"]
    with torch.no_grad():
        prediction = pipe.unet(noised(pipe, batch), batch["t"], batch["context"])
    assert per_image_error(prediction, batch["eps_gen"]).max() < 1e-6
    assert metrics["delta_gen"].abs().max() < 1e-6  # theta = theta_k
    assert set(batch["t"].tolist()) <= set(pipe.scheduler.timesteps(5).tolist())
    assert len(set(batch["t"].tolist())) > 1
    assert (batch["eps"] - batch["eps_gen"]).abs().mean() > 0.1


def test_both_readings_are_of_the_same_path(pipe, batches):
    """The guided noise is further from the empty prompt's prediction, by the guidance."""
    own, _ = batches["path"]
    guided, _ = batches["guided-path"]
    assert torch.equal(own["t"], guided["t"])
    x_t = noised(pipe, own)
    torch.testing.assert_close(noised(pipe, guided), x_t, atol=1e-4, rtol=0)
    empty = pipe.encode_prompts([""] * len(x_t))
    with torch.no_grad():
        unprompted = pipe.unet(x_t, own["t"], empty)
    expected = unprompted + 7.5 * (own["eps_gen"] - unprompted)
    torch.testing.assert_close(guided["eps_gen"], expected, atol=1e-3, rtol=0)


def test_a_path_begins_at_noise_and_ends_at_the_image(tmp_path, pipe, batches):
    """At the last timestep the image is nearly what was drawn, at the first it is far from it."""
    batch, _ = batches["guided-path"]
    rows = train.rows_of_steps(0, [(1, 1)], 4, toy.NUM_ROWS)
    order = pairs.batch_rows(0, 1, 1, 4, toy.NUM_ROWS)
    assert sorted(order) == rows
    folder = run("--loss spin --sampler-steps 5", tmp_path / "plain")
    all_rows = train.rows_of_steps(0, [(1, 1), (1, 2)], 4, toy.NUM_ROWS)
    drawn = LatentShards(folder / "iter1/generated", all_rows).read("x0", order)
    distance = (batch["x0_gen"] - drawn).square().mean((1, 2, 3))
    by_time = distance[batch["t"].argsort()]
    assert by_time[0] < by_time[-1]


# ---- Which player is promoted --------------------------------------------------------------------


def test_the_state_with_the_least_error_is_promoted(tmp_path, monkeypatch):
    errors = []
    measure = variants.denoising_error

    def recorded(pipe, split: str) -> np.ndarray:
        errors.append(measure(pipe, split).mean())
        return np.array(errors[-1])

    monkeypatch.setattr(variants, "denoising_error", recorded)
    with variants.best_promoted():
        flags = "--loss spin --iterations 2 --steps 3 --lr 1e-3 --save-every 1"
        out = run(flags, tmp_path / "run")
    first, second = errors[:3], errors[3:]
    assert min(first) < first[-1], "it is not the last one"
    assert min(first) < min(second), "the first iteration's best is not in question any more"
    for k, found in enumerate([first, second], start=1):
        saved = measure(load_pipeline(out / f"iter{k}/checkpoint").freeze(), "validation").mean()
        assert math.isclose(saved, min(found), rel_tol=1e-4)


# ---- All of them ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_nothing_stays_replaced(name):
    places = [
        (train, "generate_images"),
        (train, "save_state"),
        (train, "save_model"),
        (train, "load_players"),
        (pairs, "sample"),
        (pairs.PairLoader, "load"),
        (sampler, "GuidedUNet"),
        (step, "spin_loss"),
        (step, "spin_bounded_loss"),
    ]
    before = [getattr(place, attribute) for place, attribute in places]
    with pytest.raises(ZeroDivisionError), variants.VARIANTS[name]():
        assert [getattr(place, attribute) for place, attribute in places] != before
        raise ZeroDivisionError
    assert [getattr(place, attribute) for place, attribute in places] == before


def test_every_variant_is_a_run_of_the_evidence():
    used = []
    for runs in evidence.POINTS.values():
        for flags in runs.values():
            words = flags.split()
            if "--variant" in words:
                used.append(words[words.index("--variant") + 1])
    assert set(used) == set(variants.VARIANTS)
