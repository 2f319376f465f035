"""What pixels tell of moving shapes: whether a video follows its caption."""

from dataclasses import replace

import pytest
import torch

from scripts.shapes_video_evaluation import shares
from slimstep.data.shapes_video import ShapesVideoPairs, caption, shapes_video_prompts, video_of
from slimstep.eval.metrics.moving_shapes import FollowedDirections, followed, seen_as


def one_of(shapes: int, split: str = "heldout"):
    """A scene of so many shapes, and its caption."""
    pairs = ShapesVideoPairs(split, 64, seed=3)
    scene = next(scene for scene, _ in map(pairs.scene, range(64)) if len(scene.moves) == shapes)
    return scene, caption(scene)


def test_real_videos_follow_their_captions():
    pairs, prompts = ShapesVideoPairs("heldout", 24, seed=5), shapes_video_prompts("heldout", 24, seed=5).prompts
    videos = torch.stack([pairs[index]["video"] for index in range(24)])
    right = shares(videos, prompts)
    assert right["directions"] == right["order"] == right["colours"] == 1 and right["shapes"] >= 0.9
    assert shares(videos, prompts[1:] + prompts[:1])["all"] < 0.1


@pytest.mark.parametrize("shapes", [1, 2])
def test_a_video_played_backwards_goes_the_other_way(shapes):
    scene, text = one_of(shapes)
    assert followed(video_of(scene, 9), text)["all"]
    right = followed(video_of(scene, 9).flip(0), text)
    assert right["colours"] and right["shapes"] and not right["directions"] and not right["all"]


def test_a_video_that_stands_still_goes_nowhere():
    scene, text = one_of(1)
    assert not followed(video_of(scene, 9)[:1].expand(9, -1, -1, -1), text)["directions"]


def test_another_shape_or_order_is_noticed():
    scene, text = one_of(1)
    move = scene.moves[0]
    shape = "ring" if move.thing.shape != "ring" else "square"
    other = replace(scene, moves=(replace(move, thing=replace(move.thing, shape=shape)),))
    right = followed(video_of(other, 9), text)
    assert right["directions"] and not right["shapes"]
    scene, text = one_of(2)
    right = followed(video_of(replace(scene, moves=scene.moves[::-1]), 9), text)
    assert right["directions"] and not right["order"]


def test_what_is_lost_for_some_frames_keeps_its_place_in_time():
    scene, text = one_of(2)
    video, move = video_of(scene, 9), scene.moves[1]
    bare = video_of(replace(scene, moves=scene.moves[:1]), 9)
    video[1:6] = bare[1:6]  # the one that waits is not seen while the other goes
    right = followed(video, text)
    assert seen_as(video, move.thing.colour)[1:6].sum() == 0 and right["order"]


def test_the_metric_counts_the_shapes_that_go_where_the_caption_says():
    scene, text = one_of(2)
    first, second = scene.moves
    still = replace(scene, moves=(first, replace(second, end=second.start)))
    videos = torch.stack([video_of(scene, 9), video_of(still, 9), video_of(scene, 9).flip(0)])
    assert FollowedDirections()(videos, [text] * 3).tolist() == [100, 50, 0]
    with pytest.raises(ValueError, match="'a dog' names no shape that moves"):
        FollowedDirections()(videos, ["a dog"] * 3)
