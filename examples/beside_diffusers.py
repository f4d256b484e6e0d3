"""The same drawing by this library and by the parts of diffusers, line by line, with the same small random weights.

    python examples/beside_diffusers.py

Every intermediate is compared: embeddings, noise, each step's prediction and latents, and the picture. The largest
difference of each is printed. It needs diffusers (`pip install -e ".[compare]"`), no network, and a few seconds.
"""

import torch

import sd
from sd.compare.reference import (
    diffusers_scheduler,
    diffusers_unet,
    diffusers_vae,
    random_model,
    transformers_text,
    transformers_tokenizer,
)

PROMPT, STEPS, GUIDANCE, SEED = "a red star", 3, 7.5, 3


def show(what: str, ours: torch.Tensor, theirs: torch.Tensor) -> float:
    difference = (ours.double() - theirs.double()).abs().max().item()
    print(f"{what:24} {difference:.3g}")
    return difference


@torch.no_grad()
def main() -> float:
    """Draws twice. Returns the largest difference."""
    model = random_model()  # the same weights for both: diffusers' modules hold the very same memory
    unet, vae, solver = diffusers_unet(model), diffusers_vae(model), diffusers_scheduler("pndm")
    worst = []

    # The text. diffusers has no encoder of its own: it calls the one of transformers.
    texts = ["", PROMPT]  # the negative half first, in both libraries
    ours = model.encode_prompt(texts)
    tokenizer, encoder = transformers_tokenizer(model.text), transformers_text(model.text)
    tokens = tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    theirs = encoder(tokens.input_ids)[0]
    worst.append(show("embeddings", ours, theirs))
    context = theirs

    # The noise. Image i of a call starts from the generator of seed + i.
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(SEED))
    x = torch.randn((1, 4, 8, 8), generator=torch.manual_seed(SEED))  # diffusers' randn_tensor
    worst.append(show("noise", noise, x))

    # The loop. Ours is a generator over steps; theirs is written out, as in StableDiffusionPipeline.__call__.
    sampler = sd.SimpleSampler(model)
    call = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "scheduler": "pndm", "latents": noise}
    solver.set_timesteps(STEPS)
    x = x * solver.init_noise_sigma
    for t, step in zip(solver.timesteps, sampler.stream(PROMPT, **call), strict=True):
        inputs = solver.scale_model_input(torch.cat([x, x]), t)
        away, towards = unet(inputs, t, encoder_hidden_states=context, return_dict=False)[0].chunk(2)
        prediction = away + GUIDANCE * (towards - away)
        x = solver.step(prediction, t, x, return_dict=False)[0]
        worst.append(show(f"step {step.index}: prediction", step.noise, prediction))
        worst.append(show(f"step {step.index}: latents", step.latents, x))

    # The picture, from 0 to 1.
    image = sampler.decode(step.latents, "pt")
    decoded = vae.decode(x / vae.config.scaling_factor, return_dict=False)[0]
    worst.append(show("picture", image, (decoded / 2 + 0.5).clamp(0, 1)))
    return max(worst)


if __name__ == "__main__":
    main()
