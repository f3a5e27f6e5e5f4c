"""The card of a dictionary: what it was trained on, how, and what it measures on held-out text. Written by the run."""

from __future__ import annotations

import shlex
from typing import Any

from sae.architectures import Penalty
from sae.dictionary import Provenance
from sae.harvesting import DEFAULT
from sae.spec import RunSpec


def command_of(spec: RunSpec, out: str) -> str:
    """The command line that carries out `spec`; options at their defaults are left out."""
    learn, text = spec.learn, spec.text
    words = ["undertow sae train", f"--model {_word(spec.model)}", f"--site {spec.site}", f"--width {learn.width}",
             *([f"--k {learn.k}"] if learn.k is not None else []), f"--text {_word(text.source)}", f"--tokens {spec.tokens}"]
    optional = {
        "--column": (text.column, None), "--context": (text.context, 256), "--held-out": (text.held_out, 0.05),
        "--architecture": (learn.architecture, "topk"), "--sparsity": (learn.penalty.coefficient, None),
        "--sparsity-warm-up": (learn.penalty.warm_up, Penalty().warm_up),
        "--bandwidth": (learn.penalty.bandwidth, Penalty().bandwidth),
        "--prefixes": (learn.prefixes and ",".join(map(str, learn.prefixes)), None),
        "--normalize": (learn.normalize, "expected_average_only_in"),
        "--precision": (learn.precision, "float32"), "--epochs": (learn.epochs, 3.0), "--lr": (learn.lr, None),
        "--batch-size": (learn.batch_size, 2048), "--aux-coefficient": (learn.aux_coefficient, 1 / 32),
        "--eval-tokens": (spec.eval_tokens, 65_536), "--ce-tokens": (spec.ce_tokens, 8_192),
        "--store": (spec.store.dtype, DEFAULT.dtype), "--memory": (spec.store.memory_mb, None),
        "--weights": (spec.weights, "float32"), "--seed": (spec.seed, 0),
    }
    words += [f"{name} {_word(value)}" for name, (value, default) in optional.items() if value != default]
    return " ".join([*words, *(["--chat"] if text.chat else []), f"--out {_word(out)}"])


def _word(value: str | float | None) -> str:
    """A value as a shell reads it back, exactly; as short as that allows."""
    short = f"{value:g}" if isinstance(value, float) else str(value)
    return shlex.quote(repr(value) if isinstance(value, float) and float(short) != value else short)


def card_markdown(spec: RunSpec, figures: dict[str, Any], provenance: Provenance) -> str:
    """The card as Markdown. `figures` are those of `Evaluation.summary` and of the run."""
    extra = provenance.extra
    variant = f" ({extra['subject_variant']})" if extra.get("subject_variant") else ""
    rows = [
        ("FVU (mean-centred)", f"{figures['fvu']:.4f}"), ("L0", f"{figures['l0']:.2f}"),
        ("dead latents", f"{100 * figures['dead_share']:.2f} % on {figures['tokens']:,} tokens"),
        ("CE, untouched", f"{figures['ce_base']:.4f} nats"), ("CE, reconstructed", f"{figures['ce_recon']:.4f} nats"),
        ("CE, mean ablation", f"{figures['ce_mean_ablation']:.4f} nats"),
        ("CE, zero ablation", f"{figures['ce_zero_ablation']:.4f} nats"),
        *([("CE recovered against mean ablation", f"{figures['ce_recovered']:.4f}")] if "ce_recovered" in figures else []),
        ("KL(untouched ‖ reconstructed)", f"{figures['kl_recon']:.4f} nats"),
        ("tokens with massive activations left out", f"{figures['massive_tokens']:,}"),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    density = "\n".join(f"| {name} | {count:,} |" for name, count in figures["density_histogram"].items())
    return f"""# SAE at {spec.site} of {spec.model}

{spec.learn.describe()}. Subject: {spec.model}{variant}, digest
`{extra.get('subject_digest', '')}`. Text: {spec.text.source} (training split, digest `{extra.get('text_digest', '')}`),
{figures['train_tokens']:,} activations seen {spec.learn.epochs:g} times in {figures['steps']:,} steps. Seed {spec.seed}.

    {command_of(spec, 'DIR')}

Measured on the held-out documents of the same text ({figures['tokens']:,} activations; cross-entropy and KL on
{figures['ce_tokens']:,} tokens). Position 0, special tokens and massive activations are left out of every figure.

| figure | value |
|---|---|
{table}

Latents by firing frequency:

| share of tokens | latents |
|---|---|
{density}
"""
