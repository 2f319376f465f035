"""Metrics of videos: laws of consistency, motion and frames' scores, and distances of features of whole videos."""

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from transformers import VideoMAEConfig, VideoMAEForVideoClassification, VideoMAEImageProcessor

from slimstep import ROOT
from slimstep.data.shapes_video import ShapesVideoPairs
from slimstep.eval.inputs import load_metrics
from slimstep.eval.metrics.clip import ClipScorer
from slimstep.eval.metrics.compare import paired_ratio, relative_to
from slimstep.eval.metrics.distribution import frechet_distance
from slimstep.eval.metrics.metric import ClipScore, FeatureDistance, FeatureSimilarity, PixelDistance, Psnr, Ssim
from slimstep.eval.metrics.video import (
    FrameDistance,
    Motion,
    OfFrames,
    TemporalConsistency,
    VideoDistance,
    frames_of,
    i3d_distance,
    on_videos,
    video_metrics,
    videomae_distance,
)  # fmt: skip
from slimstep.eval.metrics.video_features import I3DFeatures, VideoMAE

PAIRS = ShapesVideoPairs(resolution=32, frames=17)
B, F = 3, 9
SHUFFLED = torch.tensor([5, 0, 8, 3, 6, 1, 7, 2, 4])  # no neighbours stay neighbours


@pytest.fixture(scope="module")
def scorer(tiny_clip_folder):
    return ClipScorer(f"local-dir:{tiny_clip_folder}")


def slow_videos() -> Tensor:
    """[B, 17, 32, 32, 3]"""
    return torch.stack([PAIRS[index]["video"] for index in range(B)])


def videos() -> Tensor:
    """[B, 9, 32, 32, 3]: the first half of the movement, in half steps"""
    return slow_videos()[:, :F]


def prompts(count: int = B) -> list[str]:
    return [PAIRS.caption(index) for index in range(count)]


def backwards(video_BFHW3: Tensor) -> Tensor:
    return video_BFHW3.flip(1)


def frozen(video_BFHW3: Tensor) -> Tensor:
    return video_BFHW3[:, :1].expand_as(video_BFHW3).contiguous()


# ---- frames ----


def test_frames_are_images_in_the_order_of_videos_and_of_time():
    frames = frames_of(shown := videos())
    assert frames.shape == (B * F, 3, 32, 32) and frames_of(shown) is frames
    assert torch.equal(frames[1 * F + 4], shown[1, 4].permute(2, 0, 1))


def test_the_mean_and_the_worst_frame_are_of_each_frame_scored_alone(scorer):
    shown, texts = videos(), prompts()
    each = torch.stack([scorer(frames_of(video[None]), [text] * F) for video, text in zip(shown, texts, strict=True)])
    torch.testing.assert_close(OfFrames(ClipScore(scorer))(shown, texts), each.mean(1))
    torch.testing.assert_close(OfFrames(ClipScore(scorer), "worst")(shown, texts), each.amin(1))


def test_of_an_error_the_worst_frame_is_the_one_with_the_highest(scorer):
    shown, other = videos(), backwards(videos())
    metrics = on_videos({"psnr": Psnr(), "features": FeatureSimilarity(scorer)})
    assert (metrics["psnr"].kind, metrics["psnr"].better) == ("paired", "high")
    mean, worst = (OfFrames(Psnr(), reduction)(shown, prompts(), other) for reduction in ("mean", "worst"))
    assert (worst < mean).all() and torch.equal(metrics["psnr"](shown, prompts(), other), mean)
    # The middle frame is where it was, and the first and the last have changed places: these are the worst.
    ends = Psnr().compare(shown[:, 0].movedim(-1, 1), other[:, 0].movedim(-1, 1))
    torch.testing.assert_close(worst, ends, atol=3, rtol=0)


def test_features_of_frames_are_computed_once_for_all_metrics_of_a_scorer(scorer, monkeypatch):
    seen, encode = [], scorer.model.encode_image
    monkeypatch.setattr(scorer.model, "encode_image", lambda x: seen.append(len(x)) or encode(x))
    shown = videos()
    for metric in video_metrics(scorer, ClipScore(scorer)).values():
        assert metric(shown, prompts()).shape == (B,)
    assert sum(seen) == B * F


# ---- consistency and motion ----


def test_a_video_that_stands_still_has_motion_0_and_consistency_1(scorer):
    still = frozen(videos())
    assert torch.equal(Motion()(still, prompts()), torch.zeros(B))
    torch.testing.assert_close(TemporalConsistency(scorer)(still, prompts()), torch.ones(B))


def test_shuffled_frames_are_less_consistent_and_move_more():
    """By the bundled scorer: features of random weights differ by less than a machine's rounding."""
    shown, consistency = videos(), TemporalConsistency(ClipScorer(f"local-dir:{ROOT}/assets/shapes-clip"))
    mixed = shown[:, SHUFFLED]
    assert (consistency(mixed, prompts()) < consistency(shown, prompts()) - 0.01).all()
    assert (Motion()(mixed, prompts()) > Motion()(shown, prompts())).all()


def test_playing_backwards_changes_neither_consistency_nor_motion(scorer):
    shown = videos()
    for metric in (TemporalConsistency(scorer), Motion()):
        torch.testing.assert_close(metric(backwards(shown), prompts()), metric(shown, prompts()))


def test_twice_the_speed_is_more_motion_and_half_of_it_less():
    slow = slow_videos()
    fast = slow[:, ::2]
    assert (Motion()(fast, prompts()) > 1.5 * Motion()(slow, prompts())).all()


def test_motion_is_in_percent_of_the_range():
    flicker = torch.zeros(1, 4, 2, 2, 3, dtype=torch.uint8)
    flicker[:, 1::2] = 255
    assert Motion()(flicker, [""]).item() == pytest.approx(100)


def test_videos_of_one_frame_are_refused():
    with pytest.raises(ValueError, match="videos of 1 frame have no neighbouring frames"):
        Motion()(videos()[:, :1], prompts())


def test_a_student_that_stops_moving_shows_in_the_ratio_to_the_reference():
    def measured(values):
        return {"kind": "per_image", "mean": sum(values) / len(values), "per_prompt": values, "compared_by_ratio": True}

    teacher = Motion()(videos(), prompts())
    half = videos()
    half[:, F // 2 :] = half[:, F // 2 : F // 2 + 1]
    student = Motion()(half, prompts())
    found = relative_to(measured(teacher.tolist()), measured(student.tolist()))["ratio_to_reference"]
    assert found == vars(paired_ratio(student.tolist(), teacher.tolist())) and found["high"] < 0.8
    assert relative_to(measured([0.0, 0.0]), measured([1.0, 2.0]))["ratio_to_reference"] is None


# ---- distances ----


def test_a_distance_of_frames_is_that_of_the_mean_of_their_features(scorer):
    metric, shown = FrameDistance(PixelDistance()), videos()
    expected = PixelDistance().features(frames_of(shown)).view(B, F, -1).mean(1)
    torch.testing.assert_close(metric.features(shown), expected)
    found = metric.distances(torch.randn(8, 4), torch.randn(8, 4))
    assert found["features"] == "8×8 pixels, mean over frames"
    assert isinstance(on_videos({"fd": FeatureDistance(scorer)})["fd"], FrameDistance)


@pytest.fixture(scope="module")
def videomae_folder(tmp_path_factory):
    """A random VideoMAE with a classifier, as published checkpoints are, of four frames of 16×16."""
    folder = tmp_path_factory.mktemp("videomae")
    torch.manual_seed(0)
    config = VideoMAEConfig(
        image_size=16, patch_size=8, num_frames=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, use_mean_pooling=True,
    )  # fmt: skip
    VideoMAEForVideoClassification(config).save_pretrained(folder)
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    VideoMAEImageProcessor(**size).save_pretrained(folder)
    return folder


def test_features_of_videomae_are_those_of_the_library_for_frames_equally_far_apart(videomae_folder):
    network, shown = VideoMAE(str(videomae_folder)), videos()
    reference = VideoMAEForVideoClassification.from_pretrained(videomae_folder).eval()
    frames = [list(video[[0, 3, 5, 8]].permute(0, 3, 1, 2)) for video in shown]
    pixels = network.processor(frames, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        tokens = reference.videomae(pixels).last_hidden_state
    features = network(shown)
    torch.testing.assert_close(features, tokens.mean(1))
    assert features.shape == (B, 16) and str(videomae_folder.name) in network.name


def test_a_video_distance_is_0_to_itself_grows_when_time_stands_still_and_says_of_what(videomae_folder):
    metric = videomae_distance(str(videomae_folder))
    many = torch.stack([PAIRS[index]["video"] for index in range(24)])
    real, still = metric.features(many), metric.features(frozen(many))
    itself, apart = metric.distances(real, real), metric.distances(still, real)
    assert itself["fvd"] == pytest.approx(0, abs=1e-6) and itself["coverage"] == 1
    assert apart["fvd"] == frechet_distance(still, real) > 1e-3 and "4 frames" in apart["features"]


class Stub(nn.Module):
    """What StyleGAN-V's file takes and gives."""

    def forward(self, x: Tensor, rescale: bool, resize: bool, return_features: bool) -> Tensor:
        assert rescale and resize and return_features
        return x.mean(dim=[3, 4]).flatten(1)


def test_i3d_is_given_what_its_torchscript_file_takes(tmp_path):
    file = tmp_path / "i3d.pt"
    torch.jit.script(Stub()).save(str(file))
    network, shown = I3DFeatures(str(file)), slow_videos()
    torch.testing.assert_close(network(shown), shown.float().mean((2, 3)).transpose(1, 2).flatten(1))
    with pytest.raises(ValueError, match="I3D takes 10 frames or more, and these videos have 9"):
        network(videos())


def test_checkpoints_that_cannot_be_had_are_one_line(tmp_path, videomae_folder):
    (tmp_path / "text.pt").write_text("no module")
    for make, message in (
        (lambda: i3d_distance(str(tmp_path / "no.pt")), r"I3D: .*no\.pt does not exist; bring https://"),
        (lambda: i3d_distance(str(tmp_path / "text.pt")), r"I3D: .*text\.pt is no TorchScript"),
        (lambda: videomae_distance(str(tmp_path)), r"VideoMAE: .* cannot be read: .*; give a folder with"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            make()
        assert "\n" not in str(error.value)


def test_a_described_metric_is_given_the_device_and_the_scorer_where_it_takes_them(scorer, videomae_folder):
    described = {
        "ssim": {"_target_": "slimstep.eval.metrics.metric.Ssim"},
        "consistency": {"_target_": "slimstep.eval.metrics.video.TemporalConsistency"},
        "fvd": {"_target_": "slimstep.eval.metrics.video.videomae_distance", "folder": str(videomae_folder)},
    }
    config = OmegaConf.create({"metrics": described, "evaluation": {"preferences": None}})
    made = load_metrics(config, scorer, torch.device("cpu"))
    assert isinstance(made["ssim"], Ssim) and made["consistency"].scorer is scorer
    assert isinstance(made["fvd"], VideoDistance)
