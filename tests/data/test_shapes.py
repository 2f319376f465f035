"""Scenes and captions are functions of seed and index, and the held-out tenth is never trained on."""

import pytest
import torch

from slimstep.data.render import RGB
from slimstep.data.scene import Scene, Thing
from slimstep.data.shapes import (
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZES,
    ShapesPairs,
    Wording,
    caption,
    hard_negatives,
    is_held_out,
    scene_at,
    shapes_prompts,
)  # fmt: skip
from slimstep.data.shapes_tokenizer import MAX_TOKENS, build_tokenizer

N = 400


def scenes_of(split: str, n: int = N) -> list[tuple[Scene, Wording]]:
    return [scene_at(split, 0, index) for index in range(n)]


def test_a_scene_is_a_function_of_seed_and_index():
    small, large = ShapesPairs("train", 10, seed=3), ShapesPairs("train", 1000, seed=3)
    for index in (9, 0, 4):
        assert small.scene(index) == large.scene(index)
        assert torch.equal(small[index]["image"], large[index]["image"])
        assert small[index]["caption"] == large[index]["caption"]
    assert small.scene(1) != ShapesPairs("train", 10, seed=4).scene(1)
    assert small.scene(1) != small.scene(2)


def test_scenes_drawn_together_equal_scenes_drawn_alone():
    pairs = ShapesPairs("train", 20, seed=0)
    together = pairs.images(range(20))
    assert together.shape == (20, 3, 64, 64) and together.dtype == torch.uint8
    for index in range(20):
        assert torch.equal(together[index], pairs[index]["image"])


def test_a_rectangle_shows_the_scene_stretched():
    pairs, wide = ShapesPairs(size=4), ShapesPairs(size=4, resolution="64x128")
    for index in range(4):
        image, stretched = (p[index]["image"].float() for p in (pairs, wide))
        assert stretched.shape == (3, 64, 128)
        assert (stretched.unflatten(2, (64, 2)).mean(3) - image).abs().mean() < 3


def test_held_out_combinations_never_occur_in_training():
    train = {scene.combination() for scene, _ in scenes_of("train", 3000)}
    heldout = {scene.combination() for scene, _ in scenes_of("heldout", 1000)}
    assert not train & heldout
    assert all(is_held_out(scene) for scene, _ in scenes_of("heldout"))


def test_about_a_tenth_of_all_combinations_is_held_out():
    things = [Thing(size, colour, shape) for size in SIZES for colour in COLOURS for shape in SHAPES]
    scenes = [
        Scene("relation", (a, b), ("red",), (), (), relation=r)
        for a in things for b in things[::7] for r in RELATIONS
    ]  # fmt: skip
    assert 0.09 < sum(map(is_held_out, scenes)) / len(scenes) < 0.11


def test_a_scene_is_held_out_in_both_of_its_wordings():
    a, b = Thing("large", "red", "circle"), Thing("small", "blue", "square")
    above = Scene("relation", (a, b), ("red",), (), (), relation="above")
    below = Scene("relation", (b, a), ("red",), (), (), relation="below")
    assert above.combination() == below.combination()


def test_the_background_is_the_colour_the_caption_says():
    for index, (scene, _) in enumerate(scenes_of("train", 100)):
        image = ShapesPairs("train", N, seed=0).images([index])[0]
        for colour, x in ((scene.background[0], 5), (scene.background[-1], 58)):
            assert tuple(image[:, 5, x].tolist()) == RGB[colour], caption(scene)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "ring"])
def test_an_object_has_its_colour_at_its_centre(shape):
    pairs = ShapesPairs("train", N, seed=0)
    for index in range(N):
        scene, _ = pairs.scene(index)
        thing, (x, y) = scene.objects[-1], scene.centres[-1]
        if thing.shape == shape:
            assert tuple(pairs.images([index])[0][:, int(y * 64), int(x * 64)].tolist()) == RGB[thing.colour]


def test_relations_hold_in_the_picture():
    for scene, _ in scenes_of("train"):
        if scene.relation in ("above", "below", "left of", "right of"):
            (ax, ay), (bx, by) = scene.centres
            dx, dy = bx - ax, by - ay
            along = {"above": dy, "below": -dy, "left of": dx, "right of": -dx}[scene.relation]
            assert along > 0.4 and min(abs(dx), abs(dy)) < 0.15
        elif scene.relation:
            assert scene.centres[0] == scene.centres[1] and scene.radii[0] > 1.8 * scene.radii[1]


def test_objects_stay_in_the_picture_and_counts_are_drawn():
    for scene, _ in scenes_of("train"):
        assert len(scene.centres) == len(scene.radii) == len(scene.objects)
        assert len(scene.centres) == (scene.count if scene.kind == "count" else len(scene.things))
        for (x, y), radius in zip(scene.centres, scene.radii, strict=True):
            assert radius * 0.95 < min(x, y, 1 - x, 1 - y)


def test_things_differ_in_colour_from_each_other_and_from_what_is_behind_them():
    for scene, _ in scenes_of("heldout"):
        colours = [thing.colour for thing in scene.things] + [*scene.background, *filter(None, [scene.frame])]
        assert len(set(colours)) == len(colours)


def test_a_caption_reads_like_a_sentence():
    a, b = Thing("large", "red", "circle"), Thing("small", "blue", "cross")
    scene = Scene("relation", (a, b), ("yellow",), (), (), relation="left of", frame="black")
    assert caption(scene) == "a large red circle left of a small blue cross on a yellow background with a black frame"
    reticent = Wording(size=False, colour=False, background=True, frame=False, background_first=True)
    assert caption(scene, reticent) == "on a yellow background, a red circle left of a blue cross"
    assert caption(Scene("count", (b,), ("red", "white"), (), (), count=3)) == (
        "three small blue crosses on a red and white background"
    )
    assert caption(Scene("single", (a,), ("white",), (), (), position="top left"), Wording(background=False)) == (
        "a large red circle at the top left"
    )


def test_hard_negatives_are_wrong_about_one_thing_and_never_the_caption_itself():
    kinds = set()
    for turn, (scene, wording) in enumerate(scenes_of("train")):
        negatives = hard_negatives(scene, wording, turn)
        assert negatives and caption(scene, wording) not in negatives.values()
        kinds |= negatives.keys()
        if scene.kind == "relation":
            assert {"swapped colours", "reversed relation"} <= negatives.keys()
    assert {"wrong shape", "wrong count", "wrong position", "swapped shapes", "wrong relation"} <= kinds


def test_every_word_of_a_caption_is_one_token_and_all_captions_fit():
    tokenizer = build_tokenizer()
    for scene, wording in scenes_of("train"):
        text = caption(scene, wording)
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text.replace(",", " ,").split()) + 2 <= MAX_TOKENS
    assert tokenizer.unk_token_id not in tokenizer("Ein Bild von 3 Äpfeln!").input_ids[:-1]


def test_prompts_are_held_out_captions_with_every_attribute():
    prompts = shapes_prompts("heldout", 20, seed=5)
    assert prompts.prompts == tuple(caption(scene_at("heldout", 5, index)[0]) for index in range(20))
    assert shapes_prompts("heldout", 10, seed=5).prompts == prompts.prompts[:10]


def test_an_unknown_split_is_named_with_the_choices():
    with pytest.raises(ValueError, match=r"'test'.*train.*heldout"):
        ShapesPairs("test")
