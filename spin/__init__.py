"""Self-play fine-tuning of Stable Diffusion (SPIN-Diffusion, arXiv 2402.10210), from scratch.

The method, in the order to read it: loss.py, scheduler.py, step.py, ../train.py, pairs.py, sampler.py.
The networks: unet.py and vae.py, which share blocks.py; text.py; checkpoints in and out: weights.py, original.py.
A run: data.py, run.py, ranks.py, cost.py before it, report.py after it, with viz.py.
Judging: judge.py with rewards.py, blip.py and stats.py. The miniature world: toy.py, toy_base/ and toy_set/.

A module imports only from modules of a lower level (tests/test_imports.py has the levels)."""
