"""SAEDashboard on one job, timed: run by the Python that has it (`pip install torch sae-dashboard`), and by no other.

    PYTHON -I peer.py JOB.json

Nothing of ours is imported; what SAEDashboard brings is imported by name, because ours is another version of it or none.
The last line of stdout is one JSON object: seconds, cpu_seconds, page_seconds, bytes, difference, versions.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MODEL, SAE, TOKENS, ACTS = "model", "sae", "tokens.npy", "acts.npy"
VERSIONS = ("sae-dashboard", "transformer-lens", "sae-lens", "torch")


def main(path: Path) -> dict[str, Any]:
    """Read the job beside whose file the model, the SAE and the tokens lie; make the data, then the page."""
    job, beside = json.loads(path.read_text(encoding="utf-8")), path.parent
    numpy, torch = importlib.import_module("numpy"), importlib.import_module("torch")
    torch.set_num_threads(job["threads"])
    model = _model(beside / MODEL, job["rope_theta"])
    sae = importlib.import_module("sae_lens").SAE.load_from_disk(beside / SAE)
    tokens = torch.from_numpy(numpy.load(beside / TOKENS, allow_pickle=False)).long()
    acts = torch.from_numpy(numpy.load(beside / ACTS, allow_pickle=False))
    with torch.inference_mode():
        own = model.run_with_cache(tokens[:1], names_filter=job["site"])[1][job["site"]]
    config = importlib.import_module("sae_dashboard.sae_vis_data").SaeVisConfig
    runner = importlib.import_module("sae_dashboard.sae_vis_runner").SaeVisRunner
    save = importlib.import_module("sae_dashboard.data_writing_fns").save_feature_centric_vis
    with tempfile.TemporaryDirectory() as folder:
        settings = config(hook_point=job["site"], features=list(range(job["features"])), ignore_positions=[0],
                          cache_dir=Path(folder) / "cache")
        began, cpu = time.perf_counter(), time.process_time()
        made = runner(settings).run(encoder=sae, model=model, tokens=tokens)
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
        page, began = Path(folder) / "page.html", time.perf_counter()
        save(sae_vis_data=made, filename=page)
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "page_seconds": time.perf_counter() - began,
                "bytes": page.stat().st_size,
                "difference": float((own[:, 1:] - acts[:, 1:]).abs().max() / acts[:, 1:].abs().max()),
                "versions": {name: importlib.metadata.version(name) for name in VERSIONS}}


def _model(folder: Path, rope_theta: float | None) -> Any:
    """The subject as SAEDashboard wants it. The base of the rotations is set by hand: it reads that of some names only."""
    lens, loading = (importlib.import_module(f"transformer_lens{part}") for part in ("", ".loading_from_pretrained"))
    known = importlib.import_module("transformers")
    whole = known.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = known.AutoTokenizer.from_pretrained(folder)
    config = loading.get_pretrained_model_config(str(folder), device="cpu")
    if rope_theta is not None:
        config.rotary_base = rope_theta
    model = lens.HookedTransformer(config, tokenizer=tokenizer)
    state = loading.get_pretrained_state_dict(str(folder), config, whole)
    model.load_and_process_state_dict(state, fold_ln=False, center_writing_weights=False, center_unembed=False,
                                      fold_value_biases=False)
    return model


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]))) + "\n")
