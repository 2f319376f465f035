"""Moving scenes and captions are functions of seed and index; what a caption says of motion is to be seen."""

from itertools import product

import pytest
import torch

from slimstep.data.render import RGB
from slimstep.data.shapes_tokenizer import MAX_TOKENS, build_tokenizer
from slimstep.data.shapes_video import (
    DIRECTIONS,
    VIDEO_WORDS,
    MotionWording,
    MovingScene,
    ShapesVideoPairs,
    caption,
    free_ways,
    is_held_out,
    motions,
    scene_at,
    shapes_video_prompts,
    video_of,
)  # fmt: skip

N, FRAMES = 200, 9


def centroids(video_FHW3: torch.Tensor, colour: str) -> torch.Tensor:
    """[F, 2]: the mean x and y, as fractions of the width, of the pixels of a colour in every frame."""
    is_colour = (video_FHW3 == torch.tensor(RGB[colour], dtype=torch.uint8)).all(-1)
    size = video_FHW3.shape[2]
    return torch.stack([mask.nonzero().float().mean(0).flip(0) / size for mask in is_colour])


def test_a_video_is_a_function_of_seed_and_index():
    small, large = ShapesVideoPairs("train", 10, seed=3), ShapesVideoPairs("train", 1000, seed=3)
    for index in (9, 0, 4):
        assert small.scene(index) == large.scene(index)
        assert torch.equal(small[index]["video"], large[index]["video"])
        assert small[index]["caption"] == large[index]["caption"] == small.caption(index)
    assert small.scene(1) != ShapesVideoPairs("train", 10, seed=4).scene(1)
    assert small.scene(1) != small.scene(2)


def test_a_video_is_uint8_frames_of_the_length_and_the_size_asked_for():
    video = ShapesVideoPairs("train", 4, resolution=32, frames=5)[3]["video"]
    assert video.shape == (5, 32, 32, 3) and video.dtype == torch.uint8 and video.is_contiguous()


def test_a_longer_video_shows_the_same_in_more_frames():
    scene, _ = scene_at("train", 0, 5)
    assert torch.equal(video_of(scene, 17)[::2], video_of(scene, 9))


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_direction_in_a_caption_is_that_of_the_centroid_and_the_order_that_of_time(split):
    pairs = ShapesVideoPairs(split, N, frames=FRAMES)
    for index in range(N):
        item = pairs[index]
        said = motions(item["caption"])
        assert len(said) == len(pairs.scene(index)[0].moves)
        for turn, (colour, _, direction) in enumerate(said):
            path_F2 = centroids(item["video"], colour)
            moved = path_F2[-1] - path_F2[0]
            # Nothing is drawn over another thing, so a centroid goes straight, but for the pixels that edges cover.
            along = moved @ torch.tensor(DIRECTIONS[direction], dtype=torch.float32)
            assert along > 0.4 and moved.norm() - along < 0.01, item["caption"]
            half = path_F2[FRAMES // 2] - path_F2[0]
            share = 0.5 if len(said) == 1 else 1 - turn
            assert (half.norm() / moved.norm()).item() == pytest.approx(share, abs=0.05), item["caption"]


def test_a_caption_says_the_colour_and_the_shape_of_what_moves_in_the_order_of_time():
    for index in range(N):
        scene, wording = scene_at("train", 0, index)
        drawn = [(move.thing.colour, move.thing.shape, move.direction) for move in scene.moves]
        assert motions(caption(scene, wording)) == drawn


@pytest.mark.parametrize(("first", "second"), list(product(DIRECTIONS, DIRECTIONS)))
def test_two_ways_never_come_close(first, second):
    ways = free_ways((first, second))
    assert ways
    for way, other in ways:
        (waits, _), (_, ends) = torch.tensor(other), torch.tensor(way)
        for share in torch.linspace(0, 1, 20):
            on_way, on_other = torch.lerp(*torch.tensor(way), share), torch.lerp(*torch.tensor(other), share)
            assert min((on_way - waits).norm(), (on_other - ends).norm()) > 0.45


def test_things_stay_in_the_picture_and_differ_in_colour_from_all_else():
    for index in range(N):
        scene, _ = scene_at("heldout", 0, index)
        for time in (0.0, 0.5, 1.0):
            for (x, y), radius in zip(scene.at(time).centres, scene.at(time).radii, strict=True):
                assert radius < min(x, y, 1 - x, 1 - y)
        colours = [move.thing.colour for move in scene.moves] + [scene.background]
        assert len(set(colours)) == len(colours)


def test_held_out_combinations_never_occur_in_training():
    train = {scene_at("train", 0, index)[0].combination() for index in range(2000)}
    heldout = [scene_at("heldout", 0, index)[0] for index in range(500)]
    assert not train & {scene.combination() for scene in heldout} and all(map(is_held_out, heldout))


def test_the_order_counts_in_what_is_held_out():
    scene = next(s for s, _ in (scene_at("train", 0, i) for i in range(N)) if len(s.moves) == 2)
    assert MovingScene(scene.moves[::-1], scene.background).combination() != scene.combination()


def test_every_word_of_a_caption_is_one_token_of_the_video_tokenizer_and_all_fit():
    tokenizer = build_tokenizer(VIDEO_WORDS)
    for index in range(N):
        text = caption(*scene_at("train", 0, index))
        assert len(tokenizer(text).input_ids) == len(text.split()) + 2 <= MAX_TOKENS


def test_prompts_are_held_out_captions_with_every_attribute():
    prompts = shapes_video_prompts("heldout", 30, seed=5)
    said = [scene_at("heldout", 5, index) for index in range(30)]
    worded = [caption(scene, MotionWording(last_first=wording.last_first)) for scene, wording in said]
    assert list(prompts) == worded and shapes_video_prompts("heldout", 10, seed=5).prompts == prompts.prompts[:10]
    assert any(" after " in prompt for prompt in prompts) and any(" before " in prompt for prompt in prompts)


def test_what_cannot_be_is_named():
    with pytest.raises(ValueError, match=r"'test'.*train.*heldout"):
        ShapesVideoPairs("test")
    with pytest.raises(ValueError, match=r"data.frames=1: nothing moves"):
        ShapesVideoPairs(frames=1)
