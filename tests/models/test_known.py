"""What is known without files: CLIP's tokenizer, and the configurations of whole pipelines."""

import open_clip
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import fetch_diffusers_config
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from slimstep.models.known import KNOWN, clip_tokenizer, known_by, write_configuration
from slimstep.models.original_layout import clip_weights, open_clip_weights, unet_weights, vae_weights

TEXTS = ["a photo of a cat", "Hello, World! 123 it's", "naïve café", "日本語 🙂", "UPPER lower's a_b-c", "", "x" * 300]
SIZES = {  # parameters of UNet, VAE and text encoders, as published
    "sd15": (859_520_964, 83_653_863, 123_060_480),
    "sd21": (865_910_724, 83_653_863, 340_387_840),
    "sd21_base": (865_910_724, 83_653_863, 340_387_840),
    "sdxl": (2_567_463_684, 83_653_863, 123_060_480, 694_659_840),
}


def test_the_tokenizer_gives_open_clips_ids():
    ours, theirs = clip_tokenizer(), open_clip.get_tokenizer("ViT-L-14")
    assert len(ours) == 49408
    for text in TEXTS:
        ids = ours(text, padding="max_length", truncation=True).input_ids
        expected = theirs([text])[0].tolist()
        length = expected.index(49407) + 1
        assert ids[:length] == expected[:length] and set(ids[length:]) <= {49407}, text
    assert ours.decode(ours("a photo of a cat").input_ids, skip_special_tokens=True) == "a photo of a cat"


def test_a_saved_tokenizer_is_the_same_and_pads_as_configured(tmp_path):
    for pad, token in ((None, 49407), ("!", 0)):
        clip_tokenizer(pad).save_pretrained(tmp_path)
        loaded = CLIPTokenizer.from_pretrained(tmp_path)
        for text in TEXTS:
            assert loaded(text).input_ids == clip_tokenizer(pad)(text).input_ids
        padded = loaded("a cat", padding="max_length").input_ids
        assert len(padded) == 77 and padded[:4] == [49406, 320, 2368, 49407] and set(padded[4:]) == {token}


@pytest.mark.parametrize("name", KNOWN)
def test_a_configuration_is_that_of_its_kind_at_its_full_size(tmp_path, name):
    write_configuration(name, tmp_path)
    index, kind = DiffusionPipeline.load_config(tmp_path), KNOWN[name]
    with torch.device("meta"):
        networks = [
            UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(tmp_path, subfolder="unet")),
            AutoencoderKL.from_config(AutoencoderKL.load_config(tmp_path, subfolder="vae")),
        ]
        for part, text_class in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
            if part in index:
                networks.append(text_class(CLIPTextConfig.from_pretrained(tmp_path, subfolder=part)))
    assert tuple(sum(p.numel() for p in network.parameters()) for network in networks) == SIZES[name]
    weights = dict(unet_weights(networks[0])) | dict(vae_weights(networks[1]))
    if name == "sdxl":
        weights |= open_clip_weights(networks[3], "conditioner.embedders.1.model")
    else:
        weights |= clip_weights(networks[2], "cond_stage_model.transformer.text_model")
    found = known_by(fetch_diffusers_config(weights)["pretrained_model_name_or_path"])
    assert found == ("sd21" if kind.networks[0] == "sd21" else name)


def test_an_unknown_kind_is_answered_with_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="no pipeline is known as 'sd3'; choose from .*sd21_base"):
        write_configuration("sd3", tmp_path)
