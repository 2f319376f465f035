"""The export job: one diffusers folder of a pruned UNet that takes few steps and a pruned VAE, each made elsewhere."""

import logging
from functools import partial
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from slimstep.engine.planning import Plan
from slimstep.engine.run import Run
from slimstep.eval.config import Config
from slimstep.models.autoencoder import latents_meaning
from slimstep.models.card import origin_of
from slimstep.models.networks import network_of
from slimstep.models.pipeline import export_pipeline, load_pipeline, with_unet

log = logging.getLogger("slimstep")


def export_student(config: Config, run: Run) -> int | Plan:
    """Writes export/, or says that it would; returns exit code 0."""
    model, vae = (folder_of(config, key) for key in ("model", "vae"))
    if config.plan:
        return Plan(f"run     {run.path}\nexport  the network and scheduler of {model}, the VAE of {vae}")
    folder = run.sealed_folder("export", partial(write, model, vae))
    log.info(f"the student: {folder.resolve()}")
    return 0


export_student.is_tracked = False


def folder_of(config: Config, key: str) -> str:
    if not (where := config.export[key]):
        raise ValueError(f"export.{key} names no pipeline: export.{key}=FOLDER")
    return where


def write(model: str, vae: str, folder: Path) -> None:
    pipeline = joined(load_pipeline(model), load_pipeline(vae), f"export.vae={vae}")
    log.info(f"exported: {export_pipeline(pipeline, folder, origin=origin_of(model)).load}")


def joined(pipeline: DiffusionPipeline, of_vae: DiffusionPipeline, name: str) -> DiffusionPipeline:
    """The pipeline with the other's VAE. ValueError where that means another thing by its latents."""
    ours, other = (latents_meaning(part.vae) for part in (pipeline, of_vae))
    if differing := [key for key in ours if ours[key] != other[key]]:
        theirs_differing, here = ({key: part[key] for key in differing} for part in (other, ours))
        raise ValueError(f"{name} reads other latents than the model's: {theirs_differing} there, {here} here")
    encoder, weights = pipeline.vae.encoder.state_dict(), of_vae.vae.encoder.state_dict()
    if encoder.keys() != weights.keys() or not all(torch.equal(encoder[key], weights[key]) for key in encoder):
        raise ValueError(f"{name} has another encoder than the model's VAE: its latents are others")
    return with_unet(pipeline, network_of(pipeline), vae=of_vae.vae)
