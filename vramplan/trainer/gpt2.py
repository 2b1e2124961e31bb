"""GPT-2's layout as others write it down: transformers' and nanoGPT's names of our weights, and what it cannot hold."""

from __future__ import annotations

from ..errors import ConfigError, Problem
from ..planner.shape import Shape
from ..runconfig import ModelSection, RunConfig

HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"

_IN_A_BLOCK = {
    "ln_1": "ln_1", "attn.qkv": "attn.c_attn", "attn.proj": "attn.c_proj",
    "ln_2": "ln_2", "mlp.fc": "mlp.c_fc", "mlp.proj": "mlp.c_proj",
}  # fmt: skip
_CHOICES = ("norm", "positions", "mlp", "qk_norm", "logit_softcap")
"""Settings of the model for which GPT-2 has one value, the default of :class:`~vramplan.runconfig.ModelSection`."""


def gpt2_names(shape: Shape) -> dict[str, str]:
    """Our name of each parameter and theirs, in the order of nanoGPT's ``named_parameters``; an untied head is last."""
    kinds = ("weight", "bias") if shape.bias else ("weight",)
    names = {"wte": EMBEDDING, "wpe": "transformer.wpe.weight"}
    for layer in range(shape.n_layer):
        for ours, theirs in _IN_A_BLOCK.items():
            names |= {f"blocks.{layer}.{ours}.{kind}": f"transformer.h.{layer}.{theirs}.{kind}" for kind in kinds}
    names |= {f"ln_f.{kind}": f"transformer.ln_f.{kind}" for kind in kinds}
    return names if shape.tied else {**names, "lm_head": HEAD}


def check_gpt2_layout(config: RunConfig, form: str, *, may_be_untied: bool) -> None:
    """Raise ConfigError naming every setting of ``[model]`` that ``form``, a format of GPT-2's layout, cannot hold."""
    model, gpt2 = config.model, ModelSection.model_fields
    others = [name for name in _CHOICES if getattr(model, name) != gpt2[name].default]
    if config.shape.grouped:
        others.append("n_kv_head")
    problems = [Problem(f"model.{name}", getattr(model, name), "does not exist in GPT-2's layout") for name in others]
    if not model.tied and not may_be_untied:
        problems.append(Problem("model.tied", False, f"does not exist in {form}, which ties the output head"))
    if problems:
        raise ConfigError(problems, source=f"--format {form} cannot hold this model, --format safetensors can")
