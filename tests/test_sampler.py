"""Sampling on the tiny networks: what an image depends on, and what it does not."""

import pytest
import torch

from spin.sampler import decode, sample


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


SMALL = {"height": 64, "width": 64}


@pytest.mark.parametrize("settings", [{"eta": 0.0}, {"eta": 0.7}, {"sampler": "ddpm"}, {"guidance": 1.0}])
def test_an_image_does_not_depend_on_the_batch_it_is_drawn_in(sd, settings):
    prompts = ["a red circle", "a blue square", ""]
    together = sample(sd, prompts, steps=5, generators=generators(7, 8, 9), **SMALL, **settings)
    assert together.shape == (3, 4, 8, 8) and together.dtype == torch.float32
    for i, prompt in enumerate(prompts):
        alone = sample(sd, [prompt], steps=5, generators=generators(7 + i), **SMALL, **settings)
        torch.testing.assert_close(alone[0], together[i], atol=2e-4, rtol=1e-3)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_the_first_latent_is_the_generators_first_draw(sd):
    """As in diffusers, so that the same seed draws the same picture there and here."""
    seen = []

    class Spy(torch.nn.Module):
        conv_in, config = sd.unet.conv_in, sd.unet.config

        def forward(self, latents, timesteps, context):
            seen.append(latents.clone())
            return sd.unet(latents, timesteps, context)

    spied = type(sd)(Spy(), sd.vae, sd.text_encoder, sd.scheduler)
    sample(spied, ["a"], steps=2, generators=generators(5), **SMALL)
    first = torch.randn((1, 4, 8, 8), generator=torch.Generator("cpu").manual_seed(5))
    assert torch.equal(seen[0], torch.cat([first, first]))  # one batch of 2B under guidance


def test_guidance_extrapolates_from_the_empty_prompt(sd):
    def one(prompt, guidance, **kwargs):
        return sample(sd, [prompt], steps=1, guidance=guidance, generators=generators(1), **SMALL, **kwargs)

    empty, prompt = one("", 1.0), one("a red circle", 1.0)
    torch.testing.assert_close(one("a red circle", 3.0), empty + 3 * (prompt - empty), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(one("a red circle", 0.0), empty, atol=1e-4, rtol=1e-4)
    other = one("a blue square", 1.0)
    guided = one("a red circle", 3.0, negative_prompts="a blue square")
    torch.testing.assert_close(guided, other + 3 * (prompt - other), atol=1e-3, rtol=1e-3)


def test_default_size_and_seeds(sd):
    latents = sample(sd, ["a", "b"], steps=1)
    assert latents.shape == (2, 4, 16, 16)  # sample_size of the UNet's config
    assert torch.equal(latents, sample(sd, ["a", "b"], steps=1, generators=generators(0, 1)))


def test_decode_is_a_picture(sd):
    latents = sample(sd, ["a", "b"], steps=1, **SMALL)
    pictures = decode(sd, latents)
    assert pictures.shape == (2, 3, 64, 64) and pictures.min() >= 0 and pictures.max() <= 1
    raw = sd.vae.decode(latents / sd.vae.scaling_factor)
    torch.testing.assert_close(pictures, (raw / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"height": 60, "width": 64}, "multiples of 8"),
        ({"height": -64, "width": 64}, "multiples of 8"),
        ({"sampler": "euler"}, "sampler 'euler'"),
        ({"guidance": 1e38}, "not finite"),
        ({"steps": 1000}, "1000 sampling steps"),
        ({"generators": generators(1)}, "2 prompts, 1 generators"),
        ({"negative_prompts": ["a"]}, "1 negative prompts"),
    ],
)
def test_arguments_out_of_range(sd, settings, message):
    with pytest.raises(ValueError, match=message):
        sample(sd, ["a", "b"], **{"steps": 2} | settings)


@pytest.mark.parametrize("prompts", ["a red circle", []])
def test_prompts_are_a_list(sd, prompts):
    with pytest.raises(ValueError, match="list of at least one prompt"):
        sample(sd, prompts, steps=1)
