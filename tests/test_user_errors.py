"""What a user gets wrong: one line that names the culprit, its value and the way out, exit code 1, nothing lost.

The jobs run in this process: a new one costs seconds.
"""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.jobs import run_job
from tests.tiny import tiny_pipeline, tiny_tokenizer
from tests.user_errors import error_line

JOB = [
    "+experiment=prune_unet", "search.rounds=1", "train.steps=3", "train.batch_size=4", "recovery.train.steps=3",
    "recovery.train.batch_size=4", "scoring.prompts=4", "scoring.steps=2", "scoring.batch_size=8", "eval.prompts=4",
    "eval.steps=2", "eval.pictures=2", "latency.iterations=3", "latency.additive_samples=2",
]  # fmt: skip

PRUNING = {
    "an argument of no objective": (["+objective.momentum=3"], "StochasticDepth: TypeError.*momentum"),
    "an argument of no recovery": (["+recovery.objective.foo=1"], "Recovery: TypeError.*foo"),
    "a target that is no number": (["search.target_fraction=nan"], "search.target_fraction=nan must be above 0"),
    "a guidance that is no number": (["eval.guidance_scale=nan"], "guidance_scale=nan must be at least 0"),
    "an EMA of its own tail": (["train.ema_decay=2"], r"ema_decay=2.0.*must lie in \[0, 1\)"),
    "a name that leaves root": (["name=../x"], "name='../x' must name a folder under root"),
    "no name": (["name="], "name='' must name a folder under root"),
    "a word for a number": (["train.steps=many"], "train.steps=many: .*many.*Integer"),
    "an unknown start of copies": (["search.copy_init=banana"], "copy_init='banana' is unknown; choose from zero"),
    "an unknown skip rule": (["search.skip_rule=banana"], "banana"),
    "a copy that cannot be": (["search=manual", "search.method.architecture={up_blocks.0.resnets.0: 2}"],
                              "channels change"),
    "a negative group": (["search.method.group_size=-2"], "group_size=-2 must be at least 1"),
    "half a skip probability": (["objective.skip_prob={resnet: 2}"], "objective.skip_prob"),
    "weights twice": (["scorer.pretrained=openai"], "brings its weights"),
    "unknown experiment": (["+experiment=nothing"], r"Could not find 'experiment/nothing'.*prune_unet"),
    "unknown group choice": (["search=best"], r"Could not find 'search/best'.*snapfusion"),
    "unknown model": (["model=sd3"], r"Could not find 'model/sd3'.*sd15"),
    "misspelt key": (["train.stps=3"], r"train has no key 'stps'; did you mean steps\?"),
    "a key of null": (["train.learning_rates.fake_score=1"], r"train.learning_rates is null; give it whole, as"),
    "rates of nothing": (["train.learning_rates={a: b}"], r"must be a table of numbers, as \{fake_score: 2e-5\}"),
    "misspelt group": (["serch=manual"], r"has no key 'serch'; did you mean search\?"),
    "new key": (["+train.momentum=1"], r"no key train.momentum"),
    "unbalanced braces": (["train={steps:3"], r"train=\{steps:3"),
    "no value": (["train.steps"], r"train.steps"),
    "word for a number": (["train.steps=many"], r"train.steps"),
    "word for a switch": (["latency.compile=perhaps"], r"latency.compile"),
    "unknown schedule": (["train.schedule=linear"], r"train.schedule='linear' is unknown; choose"),
    "no steps": (["train.steps=0"], r"train: steps=0 must be at least 1"),
    "no batch": (["train.batch_size=0"], r"train: batch_size=0 must be at least 1"),
    "negative accumulation": (["train.accumulation=-2"], r"accumulation=-2 must be at least 1"),
    "negative learning rate": (["train.learning_rate=-1"], r"learning_rate=-1.0 must be above 0"),
    "no sampling steps": (["eval.steps=0"], r"steps=0 must be at least 1"),
    "one prompt": (["scoring.prompts=1"], r"prompts=1 must be at least 2"),
    "unknown protocol": (["scoring.protocol=quick"], r"scoring.protocol='quick' is unknown; choose from snapfusion"),
    "no rounds": (["search.rounds=0"], r"search: rounds=0 must be at least 1"),
    "negative target": (["search.target_ms=-1"], r"search.target_ms=-1.0 must be above 0"),
    "unknown skip rule": (["search.bypass=skip"], r"skip"),
    "unknown dtype": (["latency.dtype=int8"], r"latency.dtype='int8' is unknown; choose from float32"),
    "unknown precision": (["mixed_precision=fp4"], r"fp4"),
    "skip probability above one": (["objective.skip_prob.resnet=1.5"], r"objective.skip_prob"),
    "unknown block": (["search=manual", "search.method.remove=[mid]"], r"unknown blocks \['mid'\]; this network has"),
    "no architecture file": (["search=manual", "search.method.architecture=/nowhere.json"], r"/nowhere.json"),
    "no latency table": (["latency.table=/nowhere.json"], r"latency.table=/nowhere.json cannot be read: No such file"),
    "no model": (["model=path", "model.name_or_path=/nowhere"], r"/nowhere.*folder"),
    "no images": (["data=imagefolder", "data.root=/nowhere"], r"/nowhere does not exist"),
    "no data root": (["data=imagefolder"], r"data.root is not given: .*data=imagefolder data.root=DIR"),
    "braces that the shell wrote out": (["data.source=/t/0.tar", "data.source=/t/1.tar"], r"given 2 times.*quote"),
    "no data set": (["data=hub", "data.source=/nowhere"], r"/nowhere"),
    "no prompt file": (["data.prompt_file=/nowhere.txt"], r"/nowhere.txt does not exist"),
    "no scorer": (["scorer.model=local-dir:/nowhere"], r"/nowhere"),
    "no such weights": (["scorer=openclip", "scorer.model=ViT-B-32", "scorer.pretrained=openai"], r"not in the cache"),
    "misspelt scorer": (["scorer=openclip", "scorer.model=ViT-B-33"], r"ViT-B-33.*close names: ViT-B-32"),
    "resolution that does not fit": (["data.resolution=18"], r"18x18 px.*nearest: 16, 20"),
    "more prompts than there are": (["data.prompt_file={three}"], r"three distinct|3 distinct"),
    "empty prompts": (["data.prompt_file={empty}"], r"empty.txt: line 1 is empty"),
    "prompt file of another kind": (["data.prompt_file={picture}"], r"unknown kind '.png'"),
    "a folder without images": (["data=imagefolder", "data.root={void}"], r"holds no images"),
    "captions of missing images": (["data=imagefolder", "data.root={missing}", "data.max_broken=0"], r"is not in"),
    "a corrupt image": (["data=imagefolder", "data.root={corrupt}", "data.max_broken=0"], r"\d of \d+ images.*0\d.png"),
    "model of pickles": (["model=path", "model.name_or_path={pickles}"], r"pickle|safetensors"),
    "nothing at all": ([""], r"error: "),
    "a report without pictures": (["eval.pictures=0"], r"eval: pictures=0 must be at least 1"),
    "negative threads": (["threads=-1"], r"threads=-1 must be at least 0"),
    "no such job": (["job=typo"], r"job=typo is no function"),
    "one beta": (["train.betas=[0.9]"], r"betas=\[0.9\] must be two numbers"),
    "negative latents": (["latency.latent_size=-1"], r"latent_size=-1 must be at least 0"),
    "table of bare numbers": (["latency.table={bare}"], r"is no latency table"),
    "table without time": (["latency.table={timeless}"], r"full_ms that is not above 0"),
    "model without a tokenizer": (["model=path", "model.name_or_path={incomplete}"], r"incomplete.*tokenizer"),
    "torn weights": (["model=path", "model.name_or_path={torn}"], r"torn"),
    "config that is not JSON": (["model=path", "model.name_or_path={garbled}"], r"garbled"),
    "table that is not one": (["latency.table={three}"], r"is no latency table"),
    "table of another UNet": (["latency.table={other}"], r"no entry for .*another denoiser"),
    "root is a file": (["root={three}"], r"three.txt"),
    "a job of another library": (["job=os.system"], r"job=os.system is no job"),
    "no way to search": (["search.method=null"], r"search.method=None describes nothing"),
    "no search": (["~search"], r"search.method=None describes nothing|no key 'search'"),
    "no model at all": (["model=null"], r"model=None describes nothing|model"),
    "no data": (["data=null"], r"data=null: choose one of|data"),
    "a new key of data": (["+data.foo=1"], r"data has no key foo"),
    "no pixels": (["data.resolution=0"], r"resolution=0 must be a number of pixels from 1 up, or HEIGHTxWIDTH"),
    "pixels in words": (["data.resolution=big"], r"resolution=big must be a number of pixels"),
    "a number for a file": (["data.prompt_file=5"], r"prompt file 5 has the unknown kind"),
    "encoding nothing at a time": (["data.cache.batch_size=0"], r"data.cache: batch_size=0 must be at least 1"),
    "more threads than cores": (["threads=100000"], r"threads=100000, but there are \d+ cores"),
    "a damaged tokenizer": (["model=path", "model.name_or_path={untold}"], r"untold.*damaged"),
    "an index that is a list": (["model.name_or_path={listed}"], "model_index.json must hold a table, and holds"),
    "a text encoder of other names": (["model.name_or_path={renamed}"], "text_encoder/model.safetensors lacks"),
    "more tokens than embeddings": (["model.name_or_path={wordy}"], "tokenizer/ gives .*text_encoder/config.json has"),
    "a torn scorer": (["scorer.model=local-dir:{torn_clip}"], "torn_clip/open_clip_model.safetensors: .*header"),
    "a LoHa": (["model.loras=[{path: '{loha}'}]"], "loha.safetensors cannot be fused: it is a LoHa"),
    "a rectangle that does not fit": (["data.resolution=16x18"], r"16x18 px.*multiples of 4; nearest: 16, 20"),
    "a dtype of eight bits": (["model.dtype=float8"], r"model.dtype='float8': .*'float16' or 'bfloat16'"),
    "an unknown scheduler": (["model.scheduler=dpm++"], r"scheduler='dpm\+\+' is unknown; .* dpmsolver\+\+,.*unipc"),
    "a variant that is not there": (["model.variant=fp16"], r"has no weights of variant=fp16: choose null"),
    "a LoRA by its name alone": (["model.loras=[style.safetensors]"], r"must be a list of tables, as \[\{path: FILE"),
    "a LoRA that is nowhere": (["model.loras=[{path: /nowhere.safetensors}]"], r"loras: /nowhere.safetensors does not"),
    "a LoRA times a word": (["model.loras=[{path: x, scale: much}]"], r"model.loras: scale=much of x is no number"),
    "a LoRA of other weights": (["model.loras=[{path: '{weights}'}]"], r"weights.safetensors cannot be fused: "),
    "a VAE that is nowhere": (["model.vae=/nowhere.safetensors"], r"model.vae=/nowhere.safetensors cannot be loaded: "),
    "a VAE of other weights": (["model.vae={weights}"], r"weights.safetensors cannot be loaded: it is no autoencoder"),
    "a VAE of another latent": (["model.vae={sixteen}"], r"sixteen belongs to another kind.*its latent_channels"),
    "a file that is no model": (["model.name_or_path={weights}"], r"it holds no UNet .*: LoRAs belong into"),
    "a kind that is not known": (["model.name_or_path={weights}", "model.single_file_config=sd3"], r"=sd3 must be a d"),
    "a scorer of pickles": (["scorer.model=local-dir:{pickled}"], r"holds pickles.*scorer.allow_pickle=true"),
    "pairs in words": (["data.pairs.size=many"], r"data.pairs.size='many': .*integer"),
    "no pairs": (["data.pairs.size=0"], r"data.pairs.size=0 must be at least 1"),
    "prompts without end": (["data.prompts.n=100000000000"], r"data.prompts.n=100000000000 must lie between"),
    "captions dropped five times": (["objective.caption_dropout=5"], r"caption_dropout=5 must lie between 0 and 1"),
    "captions dropped in words": (["objective.caption_dropout=many"], r"objective.caption_dropout='many': .*number"),
    "a weight in words": (["recovery.objective.output_weight=lots"], r"objective.output_weight='lots': .*number"),
    "a negative weight": (["recovery.objective.output_weight=-1"], r"output_weight=-1.* must be at least 0"),
    "a weight that is no number": (["recovery.objective.feature_weight=nan"], r"feature_weight=nan must be at least 0"),
    "no search at all": (["search=null"], r"search=null: .*there are .*snapfusion"),
    "no objective": (["recovery.objective=null"], r"describes nothing"),
    "an objective from nowhere": (["objective._target_=nowhere.Nothing"], r"_target_=nowhere.Nothing: "),
    "a skip probability for all": (["objective.skip_prob=0.1"], r"objective.skip_prob=0.1: .*dict"),
    "a scale in words": (["scorer.scale=big"], r"scorer.scale='big': .*number"),
    "a scale of nothing": (["scorer.scale=nan"], r"scorer.scale=nan must be above 0"),
    "a scorer by number": (["scorer.model=5"], r"scorer.model=5: .*string"),
    "a seed in words": (["search=random", "search.method.seed=x"], r"search.method.seed='x': .*integer"),
    "half a group": (["search.method.group_size=1.5"], r"search.method.group_size=1.5: .*integer"),
    "no skip rule": (["search.skip_rule=null"], r"search.skip_rule=None must be shortcut, drop_skip or {block"),
    "rounds without end": (["search.rounds=1000000"], r"search.rounds=1000000 is more than"),
    "seconds that are no number": (["latency.seconds=nan"], r"seconds=nan must be at least 0"),
    "half a letter": (["data.prompt_file={surrogate}"], r"surrogate.jsonl: line 1 holds half a surrogate pair"),
    "a table with a path that wants quotes": (["models={a: /x=y}"], r"models=\{a: /x=y\}: .*quotes of its own"),
    "a quote that is open": (["data.prompt_file='x"], r"data.prompt_file='x: .*quotes around a value are closed"),
    "a folder that Hydra has no place for": (["data=imagefolder", "data.root=/photos/a=b (1)[2];#it's"],
                                             r"/photos/a=b \(1\)\[2\];#it's does not exist"),
    "a misspelt key beside such a folder": (["data=imagefolder", "data.rot=/a=b"], r"no key 'rot'; did you mean root"),
    "a key of a group that comes later": (["data.root=/x", "data=imagefolder", "train.stps=3"], r"no key 'stps'"),
    "no data source": (["data=webdataset"], r"data.source is not given: .*Tars of samples"),
    "a hub data set without its name": (["data=hub"], r"data.source is not given: .*data=hub data.source=NAME_OR_DIR"),
    "a model without a place": (["model=path", "model.name_or_path=???"], r"model.name_or_path is not given: .*WHERE"),
    "copies without end": (["search=manual", "search.method.architecture={mid_block.attentions.0: 100000}"],
                           r"gives mid_block.attentions.0 repeats=100000; .* 2 to \d+ repeat"),
    "half a copy": (["search=manual", "search.method.depths={mid_block.attentions.0: 1.5}"], r"repeats=1.5; 0 removes"),
    "a sweep into nowhere": (["-m", "seed=0,1", "hydra.sweep.dir=/proc/x"], r"/proc/x"),
    "no Slurm": (["-m", "hydra/launcher=submitit_slurm"], r"[Ss]lurm"),
}
DISTILLING = {
    "no embedding": (["objective=guidance", "distillation.guidance_embed_dim=0"], "needs distillation.guidance_emb"),
    "an embedding for nothing": (["distillation.guidance_embed_dim=32"], "needs distillation.guidance_embed_dim=0"),
    "another objective's sampler": (["distillation.sampler=LCMScheduler"], "trains no student for dist.*LCMScheduler"),
    "an unknown sampler": (["distillation.sampler=DDIM"], "distillation.sampler='DDIM' is unknown; choose from"),
    "an objective of pruning": (["objective=stochastic_depth"], "StochasticDepth distils no steps"),
    "two stages of consistency": (["objective=lcm", "distillation.steps=[32,8,4]"], "has one stage"),
    "a student that is nowhere": (["distillation.student=/nowhere"], "'/nowhere' is no folder"),
    "a recovery of nothing": (["distillation.recover=true"], "distillation.student names none"),
    "an unknown stage": (["distillation.stages={steps-4: {start: teacher}}"], r"\['steps-4'\]; this distillation has"),
    "an unknown key of a stage": (["distillation.stages={steps-8: {train: {step: 2}}}"], "step.*train has"),
    "an unknown key of stages": (["distillation.stages={steps-8: {steps: 2}}"], "'steps'.*keys: teacher"),
    "a teacher that comes later": (["distillation.stages={steps-16: {teacher: steps-8}}"], "=steps-8 is none of"),
    "a teacher of too few steps": (["distillation.stages={steps-8: {teacher_steps: 4}}"], "not nest in a teacher's 4"),
    "words in a stage": (["distillation.stages={steps-8: {train: {steps: many}}}"], "many.*converted to Integer"),
    "steps that go up": (["distillation.steps=[8,16]"], "must go down"),
    "a grid that does not nest": (["distillation.timestep_spacing=leading"], "distillation.timestep_spacing=trailing"),
    "more steps than timesteps": (["curves.steps=[100000]"], r"curves.steps=\[100000\]: .*100000"),
    "no curves": (["curves.steps=[]"], "curves.steps"),
    "an odd width": (["objective=guidance", "distillation.guidance_embed_dim=33"], "must be even"),
}
COMMAND_LINES = {
    **{name: ([*JOB, *overrides], message) for name, (overrides, message) in PRUNING.items()},
    **{name: (["+experiment=distill_steps", *rest], message) for name, (rest, message) in DISTILLING.items()},
}


@pytest.fixture(scope="module")
def places(tmp_path_factory, tiny_pipeline_folder, tiny_clip_folder):
    """Damaged files and folders, by name."""
    root = tmp_path_factory.mktemp("places")
    (root / "three.txt").write_text("a cat\na dog\na cow\n")
    (root / "empty.txt").write_text("\n")
    Image.new("RGB", (8, 8)).save(root / "picture.png")
    (root / "void").mkdir()
    (root / "surrogate.jsonl").write_text('{"text": "\\ud800 cat"}')
    (root / "other.json").write_text(json.dumps({"full_ms": 1.0, "sites": {"mid": {"ms": 1.0}}}))
    (root / "bare.json").write_text(json.dumps({"full_ms": 1.0, "sites": {"mid": 1.0}}))
    (root / "timeless.json").write_text(json.dumps({"full_ms": 0, "sites": {"mid": {"ms": 1.0}}}))
    for name in ("missing", "corrupt"):
        write_images(root / name)
    (root / "missing/00.png").unlink()
    for i in range(5):  # some of them fall into the training split
        (root / f"corrupt/{i:02d}.png").write_bytes((root / f"corrupt/{i:02d}.png").read_bytes()[:40])
    for name in ("pickles", "incomplete", "torn", "garbled", "untold", "listed", "renamed", "wordy"):
        shutil.copytree(tiny_pipeline_folder, root / name)
    weights = root / "pickles/unet/diffusion_pytorch_model.safetensors"
    weights.unlink()
    torch.save({}, weights.with_suffix(".bin"))
    shutil.rmtree(root / "incomplete/tokenizer")
    torn = root / "torn/unet/diffusion_pytorch_model.safetensors"
    torn.write_bytes(torn.read_bytes()[:1000])
    (root / "garbled/unet/config.json").write_text("{")
    (root / "untold/tokenizer/tokenizer.json").write_text("{")
    (root / "listed/model_index.json").write_text("[]")
    texts = root / "renamed/text_encoder/model.safetensors"
    save_file({f"my.{key}": value for key, value in load_file(texts).items()}, texts, {"format": "pt"})
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["photograph"])
    tokenizer.save_pretrained(root / "wordy/tokenizer")
    shutil.copytree(tiny_clip_folder, root / "torn_clip")
    torn_clip = root / "torn_clip/open_clip_model.safetensors"
    torn_clip.write_bytes(torn_clip.read_bytes()[:-20])
    save_file({"lora_unet_mid_block_resnets_0_conv1.hada_w1_a": torch.zeros(1)}, root / "loha.safetensors")
    shutil.copytree(tiny_clip_folder, root / "pickled")
    save_file({"weight": torch.zeros(1)}, root / "weights.safetensors")
    wide = tiny_pipeline().vae.config
    AutoencoderKL.from_config(wide, latent_channels=16).save_pretrained(root / "sixteen")
    (root / "pickled/open_clip_model.safetensors").rename(root / "pickled/open_clip_pytorch_model.bin")
    messages = {path.stem: path for path in root.iterdir()}
    return messages


def write_images(folder, count=40):
    folder.mkdir()
    draw = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(draw.integers(255, size=(16, 16, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    rows = [json.dumps({"file_name": f"{i:02d}.png", "text": f"number {i}"}) for i in range(count)]
    (folder / "metadata.jsonl").write_text("\n".join(rows))


@pytest.mark.parametrize("case", COMMAND_LINES)
def test_a_mistake_gets_one_line_and_a_non_zero_exit(leave, places, tiny_model, tmp_path, case):
    overrides, message = COMMAND_LINES[case]
    overrides = [re.sub(r"\{(\w+)\}", lambda place: str(places.get(place[1], place[0])), word) for word in overrides]
    size = [] if any(override.startswith("data=") for override in overrides) else ["data.pairs.size=16"]
    line = error_line(*leave(*tiny_model, *size, *overrides))
    assert re.search(message, line), line
    assert not list((tmp_path / "runs").rglob("weights.safetensors"))


def test_a_value_that_follows_a_key_of_null_names_that_key(leave, tiny_model):
    line = error_line(*leave("+experiment=prune_few_step", *tiny_model))
    assert "scoring.steps takes its value from model.trained_steps, which is null; set model.trained_steps" in line


def test_an_experiment_without_its_plus_is_shown_the_plus(leave):
    assert "an experiment is added, +experiment=prune_unet" in error_line(*leave("experiment=prune_unet"))


@pytest.mark.parametrize("experiment", ["evaluate", "benchmark", "cumulative", "pipelines"])
@pytest.mark.parametrize("models", ["[]", "{}"])
def test_an_empty_list_of_models_is_reported(leave, tiny_model, experiment, models):
    line = error_line(*leave(f"+experiment={experiment}", *tiny_model, f"models={models}"))
    assert "models names nothing to " in line


def test_what_is_timed_has_no_guidance_or_scheduler_of_its_own(leave, tiny_model, tiny_pipeline_folder):
    few = f"{{path: {tiny_pipeline_folder}, scheduler: lcm, guidance: 0}}"
    models = f"models={{teacher: {tiny_pipeline_folder}, few: {few}}}"
    line = error_line(*leave("+experiment=benchmark", *tiny_model, models))
    assert "models.few has scheduler, guidance, which +experiment=evaluate alone reads: time it by itself" in line


def test_overrides_without_an_experiment_run_nothing_and_say_so(leave):
    assert "seed=5 names no experiment; add +experiment=NAME" in error_line(*leave("seed=5"))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data=imagefolder", "data.root=DIR"], "data=imagefolder wants model= and scorer= beside it"),
        (["data=hub", "data.source=NAME", "model=sd15"], "data=hub wants scorer= beside it, as scorer=openclip"),
        (["data=hub", "data.source=NAME", "scorer=shapes"], "data=hub wants model= beside it, as model=sd15"),
        (["data.prompt_file=/captions.txt", "model=sd15"], "data.prompt_file=/captions.txt wants scorer= beside it"),
        (["data=imagefolder", "data.root=/nowhere", "model=shapes", "scorer=shapes"], "/nowhere does not exist"),
        (["data=shapes_video"], "the data are videos, and a StableDiffusionPipeline draws images"),
        (["data=shapes_video", "data.prompt_file=/captions.txt"], "data.prompt_file=/captions.txt wants scorer= besi"),
    ],
)
def test_own_data_ask_for_the_model_and_the_scorer(leave, tmp_path, overrides, said):
    assert said in error_line(*leave("+experiment=prune_unet", *overrides))
    assert not (tmp_path / "runs/prune_unet").exists()


def test_another_model_does_not_take_the_length_of_the_bundled_ones_prompts(leave, tmp_path):
    error = error_line(*leave("+experiment=prune_transformer", f"model.name_or_path={tmp_path}/sd3"))
    assert "cuts prompts to model.max_sequence_length=1: give model=path beside it" in error
    for word in ("model=path", "model.max_sequence_length=77"):
        error = error_line(*leave("+experiment=prune_transformer", f"model.name_or_path={tmp_path}/sd3", word))
        assert "cuts prompts" not in error and f"{tmp_path}/sd3" in error


def test_a_failed_start_leaves_no_folder_and_what_was_there(leave, tiny_model, tmp_path):
    error_line(*leave(*JOB, *tiny_model, "search=manual", "search.method.remove=[mid]"))
    assert not (tmp_path / "runs/prune_unet").exists()
    (tmp_path / "runs/prune_unet").mkdir(parents=True)
    (tmp_path / "runs/prune_unet/notes.txt").write_text("mine")
    error_line(*leave(*JOB, *tiny_model, "search=manual", "search.method.remove=[mid]"))
    assert (tmp_path / "runs/prune_unet/notes.txt").read_text() == "mine"


def test_a_plan_is_reported_whatever_the_directory_holds(leave, tiny_model, tmp_path, caplog):
    folder = tmp_path / "runs/prune_unet"
    (folder / "export").mkdir(parents=True)
    rates = "rates={forward: 1, sampling: 1, training: 1, decoding: 1}"
    for content in ("seed: 5\n", "[]", "{"):
        (folder / "config.yaml").write_text(content)
        caplog.clear()
        assert leave(*JOB, *tiny_model, "plan=true", rates)[0] == 0
        assert "This is the plan of a new run" in caplog.text
        assert (folder / "config.yaml").read_text() == content


def test_a_corrected_mistake_goes_on_under_the_same_name(leave, tiny_model, tmp_path):
    small = [*JOB, "search=manual", "data.pairs.size=16", *tiny_model]
    error_line(*leave(*small, "scorer.model=ViT-B-33"))
    assert leave(*small)[0] == 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model):
    """The words of a small pruning, and the root under which it has run."""
    root, small = tmp_path_factory.mktemp("finished"), [*JOB, "search=manual", "data.pairs.size=16", *tiny_model]
    done = run_job("name=prune_unet", f"root={root}", *small)
    assert done.returncode == 0, done.stderr
    return small, root


@pytest.fixture
def copied(finished, tmp_path):
    """The words of a small pruning, which has run under the root of the test."""
    small, root = finished
    shutil.copytree(root, tmp_path / "runs")
    config = tmp_path / "runs/prune_unet/config.yaml"
    config.write_text(config.read_text().replace(f"root: {root}", f"root: {tmp_path / 'runs'}"))
    return small


@pytest.mark.slow
def test_damaged_files_of_a_run_are_one_line(leave, copied, tmp_path):
    small, path = copied, tmp_path / "runs/prune_unet"
    (path / "recovery/weights.safetensors").write_bytes(b"torn")
    (path / "export.sealed.json").unlink()
    assert "recovery/weights.safetensors is damaged" in error_line(*leave(*small))
    (point,) = (str(file.relative_to(path)) for file in path.glob("evaluation/teacher/*.json"))
    for content in ('{"half', "{}", "null"):
        for name in (point, "evaluation.json"):
            (path / name).write_text(content)
        assert "evaluation.json is damaged" in error_line(*leave(*small))
        (path / "evaluation.json").unlink()
        assert f"{point} is damaged" in error_line(*leave(*small))
    decision = (path / "round-00/decision.json").read_text()
    (path / "round-00/decision.json").unlink()
    (path / point).unlink()
    assert "decision.json is gone, and evaluation/round-00, recovery" in error_line(*leave(*small))
    (path / "round-00/decision.json").write_text(decision)
    (path / "recovery/weights.safetensors").unlink()
    (path / "metrics.jsonl").write_text("null\n")
    assert "metrics.jsonl is damaged" in error_line(*leave(*small))
    for content in (b"{", b"\xff\xfe\x00", b"", b"[]"):
        (path / "config.yaml").write_bytes(content)
        assert "config.yaml is damaged" in error_line(*leave(*small))


def test_a_loss_that_is_not_finite_is_reported_with_what_is_kept(leave, tiny_model, tmp_path):
    line = error_line(*leave(*JOB, "data.pairs.size=16", "train.learning_rate=1e30", *tiny_model))
    assert re.search(r"'round-00' is not finite at step 2; .*not-finite-step-00000002.*learning_rate", line)
    assert (tmp_path / "runs/prune_unet/round-00/not-finite-step-00000002-rank-0.pt").is_file()


def test_a_run_of_another_configuration_is_refused_or_moved_aside(leave, copied, tmp_path):
    small = copied
    assert leave(*small)[0] == 0
    assert "seed: 0 there, 1 now" in error_line(*leave(*small, "seed=1"))
    assert leave(*small, "seed=1", "run.overwrite=true")[0] == 0
    assert {path.name for path in (tmp_path / "runs").iterdir()} >= {"prune_unet", "prune_unet.before-1"}


def test_prompts_that_the_tokenizer_cuts_are_reported(leave, tiny_model, tmp_path):
    prompts = [f"a much too long prompt number {n}" for n in "abcdefgh"]
    (tmp_path / "long.txt").write_text("\n".join(prompts))
    job = [*JOB, "search=manual", "data.pairs.size=16", *tiny_model, f"data.prompt_file={tmp_path / 'long.txt'}"]
    code, stderr = leave(*job)
    assert code == 0 and "8 of 8 prompts are longer than the text encoder takes" in stderr, stderr


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(leave, tiny_model, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here: that takes root")
    try:
        places = [f"root={disk}", f"data.cache.folder={tmp_path}"]
        job = [*JOB, "search=manual", "data.pairs.size=16", *places, *tiny_model]
        line = error_line(*leave(*job))
        assert "No space left" in line or "cannot be written" in line, line
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        assert leave(*job)[0] == 0 and (disk / "prune_unet/export/export_report.json").is_file()
    finally:
        subprocess.run(["umount", str(disk)])
