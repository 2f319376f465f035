"""Weights that are not there: no network is loaded with others than its file's, and the line names file and key."""

import json
import logging
import shutil

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from slimstep.engine.quiet import quiet
from slimstep.models.folder import check_folder, check_weights
from slimstep.models.networks import load_network
from slimstep.models.original_layout import vae_weights, write_original
from slimstep.models.pipeline import load_pipeline
from tests.models.conftest import assert_equal_weights
from tests.models.test_pipeline import save_with_checker
from tests.tiny import tiny_pipeline, tiny_sdxl_pipeline, tiny_tokenizer

FILES = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model",
         "text_encoder_2": "model"}  # fmt: skip
DAMAGES = {
    "none there": lambda weights: {},
    "renamed": lambda weights: {f"module.{key}": value for key, value in weights.items()},
    "half": lambda weights: dict(list(weights.items())[::2]),
    "all but one": lambda weights: dict(list(weights.items())[:-1]),
}


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdxl") / "model"
    with quiet():
        tiny_sdxl_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def copied(sdxl, tmp_path):
    """A copy whose files may be damaged."""
    return shutil.copytree(sdxl, tmp_path / "model")


def rewrite(file, change):
    save_file({key: value.contiguous() for key, value in change(load_file(file)).items()}, file, {"format": "pt"})


def refusal(folder, match, **options):
    with pytest.raises(ValueError, match=match) as caught:
        load_pipeline(folder, **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700 + len(str(folder))
    return str(caught.value)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("part", FILES)
def test_a_network_without_all_its_weights_is_refused_by_file_and_key(copied, part, damage):
    file = copied / part / f"{FILES[part]}.safetensors"
    keys = load_file(file).keys()
    rewrite(file, DAMAGES[damage])
    message = refusal(copied, rf"{part}/{FILES[part]}.safetensors lacks \d+ of the weights that config.json asks for, ")
    first = message.split("asks for, ")[1].split(",")[0].split(" and ")[0].split(";")[0]
    assert any(key.endswith(first) for key in keys), f"{first} is no weight of it"
    assert ("it holds module." in message) == (damage == "renamed")


def test_a_unet_that_was_saved_with_a_lora_attached_is_named(copied):
    """PEFT calls what an adapter wraps `base_layer`."""
    file = copied / "unet/diffusion_pytorch_model.safetensors"
    rewrite(file, lambda w: {key.replace(".to_q.weight", ".to_q.base_layer.weight"): v for key, v in w.items()})
    refusal(copied, "unet/.*safetensors lacks .*to_q.weight.*, as one that was saved with a LoRA attached")


@pytest.mark.parametrize("part", ["safety_checker", "controlnet"])
def test_a_network_beside_the_usual_ones_is_looked_at_too(tmp_path, part):
    pipeline = tiny_pipeline()
    if part == "controlnet":
        controlnet = ControlNetModel.from_unet(pipeline.unet, conditioning_embedding_out_channels=(4, 8))
        StableDiffusionControlNetPipeline(**pipeline.components, controlnet=controlnet).save_pretrained(tmp_path)
    else:
        save_with_checker(pipeline, tmp_path)
    assert getattr(load_pipeline(tmp_path), part) is not None
    (file,) = (tmp_path / part).glob("*.safetensors")
    rewrite(file, DAMAGES["all but one"])
    refusal(tmp_path, f"{part}/{file.name} lacks 1 of the weights")


def test_weights_that_nothing_asks_for_are_left_out_with_a_line(copied, sdxl, caplog):
    file = copied / "text_encoder/model.safetensors"
    rewrite(file, lambda weights: weights | {"vision_model.embeddings.weight": torch.ones(2)})
    with caplog.at_level(logging.WARNING, "slimstep"):
        loaded = load_pipeline(copied)
    assert "text_encoder/model.safetensors holds more weights than config.json asks for, vision_model." in caplog.text
    assert_equal_weights(loaded, load_pipeline(sdxl))


# ---- what may be absent


def test_buffers_of_old_files_and_either_prefix_are_no_mistake(copied, sdxl, caplog):
    """`position_ids` were saved once; `text_model.` comes and goes with transformers' releases."""
    file = copied / "text_encoder/model.safetensors"
    bare = {key.removeprefix("text_model."): value for key, value in load_file(file).items()}
    positions = {"embeddings.position_ids": torch.arange(16)[None]}
    for prefix in ("", "text_model."):
        save_file({prefix + key: value for key, value in (bare | positions).items()}, file, {"format": "pt"})
        with caplog.at_level(logging.WARNING, "slimstep"):
            assert_equal_weights(load_pipeline(copied), load_pipeline(sdxl))
    assert not caplog.text


def test_tied_weights_are_stored_once(tmp_path):
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
    T5EncoderModel(T5Config(**sizes)).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors").keys()
    assert ("shared.weight" in stored) != ("encoder.embed_tokens.weight" in stored)
    loaded = load_network(tmp_path, None, T5EncoderModel, torch.float32)
    assert loaded.shared.weight is loaded.encoder.embed_tokens.weight


def test_a_whole_clip_gives_its_half(tmp_path, caplog):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    whole = CLIPModel(CLIPConfig(text_config=sizes, vision_config=sizes))
    whole.save_pretrained(tmp_path)
    CLIPTextConfig(**sizes).save_pretrained(tmp_path)
    loaded = load_network(tmp_path, None, CLIPTextModel, torch.float32)
    assert torch.equal(loaded.embeddings.token_embedding.weight, whole.text_model.embeddings.token_embedding.weight)
    assert "holds more weights than config.json asks for" in caplog.text


def test_old_names_of_a_vaes_attention_are_read(copied, sdxl):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(key):
        for new, name in old.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{name}.")
        return key

    rewrite(copied / "vae/diffusion_pytorch_model.safetensors", lambda w: {rename(key): v for key, v in w.items()})
    assert_equal_weights(load_pipeline(copied), load_pipeline(sdxl))


def test_networks_without_files_of_the_variant_give_their_plain_ones(copied, sdxl):
    file = copied / "unet/diffusion_pytorch_model.safetensors"
    file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert_equal_weights(load_pipeline(copied, variant="fp16"), load_pipeline(sdxl))


# ---- torn files and parts of files


@pytest.mark.parametrize("size", [0, 100, -20])
@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_torn_file_is_named_before_anything_is_loaded(copied, part, size):
    file = copied / part / f"{FILES[part]}.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=f"{part}/{file.name} is torn, or no safetensors file"):
        check_weights(copied, None)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded") / "model"
    with quiet():
        tiny_pipeline().save_pretrained(folder)
        for part, kind in {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}.items():
            network = kind.from_pretrained(folder / part)
            shutil.rmtree(folder / part)
            network.save_pretrained(folder / part, max_shard_size="100KB" if part == "unet" else "3KB")
    return folder


def drop_from_shard(index):
    shard = sorted(index.parent.glob("*-0000*.safetensors"))[1]
    rewrite(shard, lambda weights: dict(list(weights.items())[1:]))


SHARDS = {
    "a shard is missing": (lambda index: sorted(index.parent.glob("*-0000*.safetensors"))[1].unlink(),
                           "index.json names shards that are not there: .*-00002-of-"),
    "a shard is torn": (lambda index: sorted(index.parent.glob("*-0000*.safetensors"))[1].write_bytes(b"{"),
                        "-00002-of-.* is torn"),
    "a shard is half": (drop_from_shard, "index.json names weights that their shards lack: .* of .*-00002-of-"),
    "no index": (lambda index: index.unlink(), "index.json, the index of .*-00001-of-.*, cannot be read"),
    "a torn index": (lambda index: index.write_text('{"weight_map"'), "index.json, the index of .*, cannot be read"),
    "an index that is a list": (lambda index: index.write_text("[]"), "index.json, the index of .*, cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("case", SHARDS)
@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_half_saved_network_of_several_files_is_refused_by_name(sharded, tmp_path, part, case):
    damage, message = SHARDS[case]
    folder = shutil.copytree(sharded, tmp_path / "model")
    (index,) = (folder / part).glob("*.index.json")
    damage(index)
    refusal(folder, f"{part}.*{message}")


def test_an_index_that_does_not_know_a_weight_hides_none(sharded, tmp_path):
    """Diffusers reads what the index names, transformers all that the shards hold."""
    folder = shutil.copytree(sharded, tmp_path / "model")
    (index,) = (folder / "unet").glob("*.index.json")
    table = json.loads(index.read_text())
    dropped = next(iter(table["weight_map"]))
    table["weight_map"].pop(dropped)
    index.write_text(json.dumps(table))
    refusal(folder, f"unet lacks 1 of the weights that config.json asks for, {dropped}")


def test_a_network_of_several_files_is_read(sharded):
    assert_equal_weights(load_pipeline(sharded), tiny_pipeline())


# ---- single files and other VAEs


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_sdxl_pipeline])
def test_a_single_file_names_what_it_lacks_by_its_own_names(make, tmp_path):
    with quiet():
        make().save_pretrained(tmp_path / "model")
    write_original(make(), tmp_path / "whole.safetensors")
    weights = load_file(tmp_path / "whole.safetensors")
    ends = ("input_blocks.1.0.in_layers.2.weight", "input_blocks.3.0.op.bias", "label_emb.0.2.bias",
            "encoder.conv_in.bias", "upsample.conv.bias", "layers.0.mlp.fc1.bias", "resblocks.0.mlp.c_fc.weight")
    names = [next(key for key in weights if key.endswith(end)) for end in ends if any(k.endswith(end) for k in weights)]
    for name in names:
        save_file({key: value for key, value in weights.items() if key != name}, tmp_path / "part.safetensors")
        message = f"part.safetensors' is incomplete or damaged: it lacks weights that .* asks for: of the .*{name}"
        refusal(tmp_path / "part.safetensors", message, single_file_config=str(tmp_path / "model"))


@pytest.mark.parametrize("damage", DAMAGES)
def test_another_vae_without_all_its_weights_is_refused(copied, tmp_path, damage):
    vae = AutoencoderKL.from_pretrained(copied / "vae")
    vae.save_pretrained(tmp_path / "vae")
    rewrite(tmp_path / "vae/diffusion_pytorch_model.safetensors", DAMAGES[damage])
    message = r"model.vae=.*vae cannot be loaded: diffusion_pytorch_model.safetensors lacks"
    refusal(copied, message, vae=str(tmp_path / "vae"))
    original = {key: value.contiguous() for key, value in vae_weights(vae)}
    save_file(DAMAGES[damage](original), tmp_path / "vae.safetensors")
    message = "model.vae=.*vae.safetensors cannot be loaded: .*(it lacks|of the vae)"
    refusal(copied, message, vae=str(tmp_path / "vae.safetensors"))


# ---- tables that are none, and tokenizers of another model


@pytest.mark.parametrize("text", ["[]", "null", '"a"', "3", "{", ""])
@pytest.mark.parametrize("place", [
    "model_index.json", "unet/config.json", "vae/config.json", "text_encoder_2/config.json",
    "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json", "tokenizer/tokenizer.json",
])  # fmt: skip
def test_a_table_that_is_none_is_named(copied, place, text):
    (copied / place).write_text(text)
    with pytest.raises(ValueError, match=f"is damaged: {place} (must hold a table, and holds|is no JSON file)"):
        check_folder(copied)


@pytest.mark.parametrize(("change", "message"), [
    ({"_class_name": "Nothing"}, "names the pipeline class 'Nothing'"), ({"_class_name": None}, "class None"),
    ({"unet": None}, "names no unet"), ({"vae": "x", "scheduler": []}, "scheduler=|names no vae"),
    ({"text_encoder": ["transformers"]}, r"has text_encoder=\['transformers'\], which must be \[library, class\]"),
    ({"tokenizer": [None, "CLIPTokenizer"]}, "has tokenizer="),
])  # fmt: skip
def test_an_index_of_no_pipeline_is_an_error(copied, change, message):
    index = copied / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | change))
    with pytest.raises(ValueError, match=f"its model_index.json .*{message}|its model_index.json {message}"):
        check_folder(copied)


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_a_network_without_its_configuration_takes_no_other(copied, part):
    (copied / part / "config.json").unlink()
    refusal(copied, f"it lacks {part}/config.json")


@pytest.mark.parametrize("part", ["", "_2"])
def test_a_tokenizer_of_more_words_than_the_text_encoder_knows_is_refused(copied, part):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["photograph"])
    tokenizer.save_pretrained(copied / f"tokenizer{part}")
    refusal(copied, f"tokenizer{part}/ gives the token 'photograph' the number 55, and text_encoder{part}/config.json")


def test_a_tokenizer_of_more_places_than_the_text_encoder_has_is_refused(copied):
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 77
    tokenizer.save_pretrained(copied / "tokenizer")
    refusal(copied, "tokenizer/tokenizer_config.json has model_max_length=77, .*max_position_embeddings=16")


def test_what_is_whole_is_loaded_as_ever(copied, sdxl):
    check_folder(copied)
    check_weights(copied, None)
    assert_equal_weights(load_pipeline(copied), tiny_sdxl_pipeline())
