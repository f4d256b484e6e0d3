"""LoRA files with random numbers, in every dialect and of every kind, and the dense weights that they stand for.

What a kind does is written here once more, with whole matrices and torch.kron, so that the two can disagree.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from sd.weights import names

RANK, ALPHA = 3, 2.0


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) / max(shape[-1], 1) ** 0.5


# ---- kinds: of a weight, the tensors under LyCORIS' names, and what the weight becomes


def lora(w, seed=0):
    r, (o, i, *k) = RANK, w.shape
    up, down = randn(o, r, *[1] * len(k), seed=seed), randn(r, i, *k, seed=seed + 1)
    dense = (up.flatten(1) @ down.flatten(1)).view_as(w)
    tensors = {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(ALPHA)}
    return tensors, w + ALPHA / r * dense


def without_alpha(w, seed=0):
    tensors, _ = lora(w, seed)
    del tensors["alpha"]
    up, down = tensors["lora_up.weight"], tensors["lora_down.weight"]
    return tensors, w + (up.flatten(1) @ down.flatten(1)).view_as(w)


def tucker(w, seed=0):
    r, (o, i, *k) = RANK, w.shape
    up, down, mid = (
        randn(o, r, 1, 1, seed=seed),
        randn(r, i, 1, 1, seed=seed + 1),
        randn(r, r, *k, seed=seed + 2),
    )
    dense = torch.zeros_like(w)
    for a in range(r):
        for b in range(r):
            dense += up[:, a, 0, 0].view(-1, 1, 1, 1) * mid[a, b] * down[b, :, 0, 0].view(1, -1, 1, 1)
    tensors = {"lora_up.weight": up, "lora_down.weight": down, "lora_mid.weight": mid, "alpha": torch.tensor(ALPHA)}
    return tensors, w + ALPHA / r * dense


def loha(w, seed=0):
    r, o, i = RANK, len(w), w[0].numel()
    a1, b1, a2, b2 = (randn(*s, seed=seed + n) for n, s in enumerate([(o, r), (r, i), (o, r), (r, i)]))
    tensors = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": torch.tensor(ALPHA)}
    return tensors, w + ALPHA / r * ((a1 @ b1) * (a2 @ b2)).view_as(w)


def loha_tucker(w, seed=0):
    r, (o, i, *k) = RANK, w.shape
    sizes = [(r, o), (r, i), (r, r, *k)] * 2
    a1, b1, t1, a2, b2, t2 = (randn(*s, seed=seed + n) for n, s in enumerate(sizes))
    halves = [torch.einsum("ijkl,ip,jq->pqkl", t, a, b) for t, a, b in ((t1, a1, b1), (t2, a2, b2))]
    words = ("hada_w1_a", "hada_w1_b", "hada_t1", "hada_w2_a", "hada_w2_b", "hada_t2")
    tensors = dict(zip(words, (a1, b1, t1, a2, b2, t2), strict=True)) | {"alpha": torch.tensor(ALPHA)}
    return tensors, w + ALPHA / r * halves[0] * halves[1]


def lokr(whole1, whole2, with_core=False):
    def kind(w, seed=0):
        r, (o, i, *k) = 2, w.shape
        p, q = 4, 2
        tensors = {}
        if whole1:
            w1 = tensors["lokr_w1"] = randn(p, q, seed=seed)
        else:
            tensors["lokr_w1_a"], tensors["lokr_w1_b"] = randn(p, r, seed=seed), randn(r, q, seed=seed + 1)
            w1 = tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]
        s, t = o // p, i // q
        if whole2:
            w2 = tensors["lokr_w2"] = randn(s, t, *k, seed=seed + 2)
        elif with_core:
            tensors["lokr_w2_a"], tensors["lokr_w2_b"] = randn(r, s, seed=seed + 2), randn(r, t, seed=seed + 3)
            tensors["lokr_t2"] = randn(r, r, *k, seed=seed + 4)
            w2 = torch.einsum("ijkl,ip,jq->pqkl", *(tensors[f"lokr_{n}"] for n in ("t2", "w2_a", "w2_b")))
        else:
            inner = w[0, 0].numel() * t
            tensors["lokr_w2_a"], tensors["lokr_w2_b"] = randn(s, r, seed=seed + 2), randn(r, inner, seed=seed + 3)
            w2 = (tensors["lokr_w2_a"] @ tensors["lokr_w2_b"]).view(s, t, *k)
        scale = 1.0 if whole1 and whole2 else ALPHA / r
        tensors["alpha"] = torch.tensor(ALPHA)
        return tensors, w + scale * torch.kron(w1.view(p, q, *[1] * len(k)), w2.contiguous())

    return kind


def glora(w, seed=0):
    r, (o, i, *k) = RANK, w.shape
    one = [1] * len(k)
    sizes = {"a1.weight": (i, r, *one), "a2.weight": (r, i, *one), "b1.weight": (o, r, *one), "b2.weight": (r, i, *k)}
    tensors = {word: randn(*s, seed=seed + n) for n, (word, s) in enumerate(sizes.items())}
    a = tensors["a1.weight"].flatten(1) @ tensors["a2.weight"].flatten(1)
    b = tensors["b1.weight"].flatten(1) @ tensors["b2.weight"].flatten(1)
    dense = torch.einsum("oi...,ij->oj...", w, a) + b.view_as(w)
    return tensors | {"alpha": torch.tensor(ALPHA)}, w + ALPHA / r * dense


def glora_old(w, seed=0):
    tensors, wanted = glora(w, seed)
    pairs = {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1", "alpha": "alpha"}
    return {n.replace(n[:2], pairs[n[:2]]) if n != "alpha" else n: t for n, t in tensors.items()}, wanted


def ia3(on_input):
    def kind(w, seed=0):
        f = randn(w.shape[1 if on_input else 0], seed=seed)
        shape = [1, -1] if on_input else [-1, 1]
        dense = w * f.view(*shape, *[1] * (w.ndim - 2))
        stored = f if w.ndim == 2 else f.view(1, -1, 1, 1)
        return {"weight": stored, "on_input": torch.tensor(int(on_input))}, w + dense

    return kind


def difference(w, seed=0):
    diff = randn(*w.shape, seed=seed)
    return {"diff": diff}, w + diff


def dora(inner, on_input=False):
    def kind(w, seed=0):
        tensors, v = inner(w, seed)
        axes = [a for a in range(w.ndim) if a != (1 if on_input else 0)]
        norm = v.square().sum(axes, keepdim=True).sqrt()
        m = randn(norm.numel(), seed=seed + 9).abs().view_as(norm) + 1
        return tensors | {"dora_scale": m}, v * m / norm

    return kind


KINDS = {
    "LoRA": lora,
    "LoRA without alpha": without_alpha,
    "Tucker": tucker,
    "LoHa": loha,
    "LoHa Tucker": loha_tucker,
    "LoKr whole": lokr(True, True),
    "LoKr, second a product": lokr(True, False),
    "LoKr, first a product": lokr(False, True),
    "LoKr, both products": lokr(False, False),
    "LoKr Tucker": lokr(True, False, True),
    "GLoRA": glora,
    "GLoRA (old)": glora_old,
    "IA3": ia3(False),
    "IA3 on inputs": ia3(True),
    "difference": difference,
    "DoRA": dora(lora),
    "DoRA by columns": dora(lora, True),
    "DoRA of LoHa": dora(loha),
    "DoRA of LoKr": dora(lokr(True, False)),
    "DoRA of Tucker": dora(tucker),
}
OF_CONVOLUTIONS = ("Tucker", "LoHa Tucker", "LoKr Tucker", "DoRA of Tucker")

# ---- dialects: what a module, and its parts, are called

TEXT = "text_model."


def hub_name(model, part, module):
    if part == "text":
        return module
    return names.unet_to_hub([f"{module}.weight"], model.unet.config)[f"{module}.weight"].removesuffix(".weight")


def kohya(model, part, module):
    flat = hub_name(model, part, module).replace(".", "_")
    return f"lora_te_text_model_{flat}" if part == "text" else f"lora_unet_{flat}"


def kohya_compvis(model, part, module):
    return kohya(model, part, module) if part == "text" else f"lora_unet_{module.replace('.', '_')}"


def kohya_te1(model, part, module):
    return kohya(model, part, module).replace("lora_te_", "lora_te1_")


def simple_tuner(model, part, module):
    return (
        "lycoris_"
        + (TEXT if part == "text" else "").replace(".", "_")
        + hub_name(model, part, module).replace(".", "_")
    )


def dotted(model, part, module):
    return (f"text_encoder.{TEXT}" if part == "text" else "unet.") + hub_name(model, part, module)


def peft_alone(model, part, module):
    return f"base_model.model.{TEXT if part == 'text' else ''}{hub_name(model, part, module)}"


def new_text(model, part, module):
    """transformers 5.6 and later have no text_model."""
    return f"text_encoder.{module}" if part == "text" else dotted(model, part, module)


def bare(model, part, module):
    return TEXT + module if part == "text" else hub_name(model, part, module)


def comfy(model, part, module):
    return dotted(model, part, module) if part == "text" else f"diffusion_model.{module}"


def processor(model, part, module):
    """Of attention alone."""
    name = dotted(model, part, module).removesuffix(".0")
    name = re.sub(r"self_attn\.([qkv]|out)_proj$", r"self_attn.to_\1_lora", name)
    return re.sub(r"\.(to_q|to_k|to_v|to_out)$", r".processor.\1_lora", name) if part == "unet" else name


def as_kohya(word):
    return word


def as_peft(word):
    words = {"lora_up.weight": "lora_B.weight", "lora_down.weight": "lora_A.weight"}
    return words.get(word, word)


def as_peft_default(word):
    return as_peft(word).replace(".weight", ".default.weight")


def as_old(word):
    return word.removeprefix("lora_")


def as_lora(word):
    return word.replace("lora_", "lora.")


def as_layer(word):
    return word.replace("lora_", "lora_linear_layer.")


DIALECTS = {  # how modules are called, how their parts are, what we call it
    "kohya": (kohya, as_kohya, "kohya"),
    "kohya, CompVis names": (kohya_compvis, as_kohya, "kohya"),
    "kohya, te1": (kohya_te1, as_kohya, "kohya"),
    "SimpleTuner": (simple_tuner, as_kohya, "SimpleTuner"),
    "PEFT": (dotted, as_peft, "PEFT"),
    "PEFT, default": (dotted, as_peft_default, "PEFT"),
    "PEFT alone": (peft_alone, as_peft, "PEFT"),
    "PEFT, newer text": (new_text, as_peft, "PEFT"),
    "PEFT without prefix": (bare, as_peft, "PEFT"),
    "diffusers, processors": (processor, as_old, "diffusers (old)"),
    "diffusers, .lora": (dotted, as_lora, "diffusers (old)"),
    "diffusers, .lora_linear_layer": (dotted, as_layer, "diffusers (old)"),
    "ComfyUI": (comfy, as_kohya, "ComfyUI"),
}
ATTENTION = {"unet": ("to_q", "to_k", "to_v", "to_out.0"), "text": ("q_proj", "k_proj", "v_proj", "out_proj")}


def attention_of(model):
    """(part, module) of all projections of attention."""
    for part, root in (("unet", model.unet), ("text", model.text.model)):
        for name, module in root.named_modules():
            if name.endswith(ATTENTION[part]) and hasattr(module, "weight"):
                yield part, name


def layers_of(model, *kinds):
    """(part, module) of all layers of these types."""
    for part, root in (("unet", model.unet), ("text", model.text.model)):
        yield from ((part, name) for name, module in root.named_modules() if isinstance(module, kinds))


def weight_of(model, part, module):
    root = model.unet if part == "unet" else model.text.model
    return root.get_submodule(module).weight.detach().double()


def lora_tensors(model, places, kind=lora, dialect="kohya", seed=0):
    """The tensors of a file, and the weights that it makes of the model's, by (part, module)."""
    module_name, word_name, _ = DIALECTS[dialect]
    tensors, wanted = {}, {}
    for n, (part, module) in enumerate(places):
        own, wanted[part, module] = kind(weight_of(model, part, module), seed=seed + 10 * n)
        tensors |= {f"{module_name(model, part, module)}.{word_name(word)}": t for word, t in own.items()}
    return tensors, wanted


def write_lora(path: Path, tensors, metadata=None):
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata)
    return path


def with_weights(model, wanted):
    """The model's own class of copy, in which these weights stand: what a LoRA should be equal to."""
    import copy

    result = copy.deepcopy(model)
    for (part, module), w in wanted.items():
        root = result.unet if part == "unet" else result.text.model
        root.get_submodule(module).weight.data = w.to(model.dtype)
    return result


def peft_config(**fields):
    return json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, **fields})
