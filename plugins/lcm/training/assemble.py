"""Put the trained parts together as a diffusers folder, every number rounded to half precision.

`ovforge convert` then makes the OpenVINO folder from it, so that both hold the same numbers.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import LCMScheduler
from models import GUIDANCE_WIDTH, autoencoder, restore, text_encoder, unet
from transformers import CLIPTokenizer

COMPONENTS = {
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "LCMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--guidance", type=float, default=3.0, help="the guidance scale that ovforge uses by default")
    arguments = parser.parse_args()
    vae_state, trained = restore(arguments.work / "vae.pt"), restore(arguments.work / "unet.pt")
    distilled, pool = restore(arguments.work / "lcm.pt"), restore(arguments.work / "pool.pt")
    assert all((vae_state, trained, distilled, pool)), "train the parts first"
    tokenizer = CLIPTokenizer.from_pretrained(arguments.work / "tokenizer")
    vae, words, denoiser = autoencoder(), text_encoder(len(tokenizer)), unet(GUIDANCE_WIDTH)
    vae.load_state_dict(vae_state["full"])
    vae.register_to_config(scaling_factor=round(pool["scale"], 5))
    words.load_state_dict(trained["words_ema"])
    denoiser.load_state_dict(distilled["average"])
    output: Path = arguments.output
    for name, part in (("vae", vae), ("text_encoder", words), ("unet", denoiser)):
        part.to(torch.float16).save_pretrained(output / name)
    shutil.copytree(arguments.work / "tokenizer", output / "tokenizer", dirs_exist_ok=True)
    LCMScheduler(prediction_type="v_prediction").save_pretrained(output / "scheduler")
    index = {
        "_class_name": "LatentConsistencyModelPipeline",
        "_diffusers_version": "0.42.1",
        "requires_safety_checker": False,
        **COMPONENTS,
    }
    (output / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    defaults = {"defaults": {"steps": 4, "guidance_scale": arguments.guidance}}
    (output / "ovforge.json").write_text(json.dumps(defaults, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
