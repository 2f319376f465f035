"""Diversity of the images of a prompt: laws, and an evaluation that is killed while it draws them."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch.nn.functional import cosine_similarity

from slimstep.data.prompts import PromptSet
from slimstep.engine.run import Run
from slimstep.engine.seeding import generator
from slimstep.eval.config import EvalConfig, EvaluationConfig
from slimstep.eval.evaluator import Candidate, Evaluator
from slimstep.eval.metrics.compare import paired_difference, paired_ratio, relative_to
from slimstep.eval.metrics.diversity import further_seeds, mean_pairwise_distance
from slimstep.eval.metrics.metric import Preference
from slimstep.eval.sampling import Sampler
from tests.tiny import small_pipeline

PROMPTS = PromptSet(("a cat", "a dog", "a cat", "a bird", "a fish"), "prompts")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


def test_equal_images_have_no_diversity_orthogonal_ones_have_1_opposite_ones_the_most():
    same = normal(3, 1, 5).expand(3, 8, 5)
    torch.testing.assert_close(mean_pairwise_distance(same), torch.zeros(3).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(mean_pairwise_distance(torch.eye(6)[None]), torch.ones(1).double())
    torch.testing.assert_close(mean_pairwise_distance(torch.tensor([[[1.0], [-1.0]]])), torch.full((1,), 2.0).double())


def test_diversity_is_the_mean_over_pairs_whatever_the_order_of_seeds_and_the_length_of_features():
    features = normal(2, 5, 3)
    found = mean_pairwise_distance(features)
    for values, own in zip(found, features, strict=True):
        pairs = [1 - cosine_similarity(a, b, dim=0) for a, b in itertools.combinations(own, 2)]
        assert values.item() == pytest.approx(torch.stack(pairs).mean().item(), abs=1e-6)
    torch.testing.assert_close(mean_pairwise_distance(3 * features[:, torch.tensor([4, 0, 2, 1, 3])]), found)


def test_the_expected_diversity_does_not_depend_on_the_number_of_seeds():
    few, many = (mean_pairwise_distance(normal(4000, k, 3, seed=k)) for k in (2, 8))
    assert few.mean().item() == pytest.approx(1, abs=0.03) and many.mean().item() == pytest.approx(1, abs=0.03)


def test_further_seeds_are_functions_of_the_seed_and_their_number():
    assert further_seeds(1, 8)[:3] == further_seeds(1, 4) and len({1, *further_seeds(1, 8), *further_seeds(2, 8)}) == 15


def test_another_seed_is_another_noise_for_every_scheduler_and_shares_what_is_encoded():
    sampler = Sampler(small_pipeline(), 2, 2.5, seed=1)
    other, encoded = sampler.reseeded(5), sampler.encode(["a"])
    assert other.encode(["a"]) is encoded and sampler.seed == 1
    fresh = Sampler(small_pipeline(), 2, 2.5, seed=5)
    assert torch.equal(other.noise(3), fresh.noise(3)) and not torch.equal(other.noise(3), sampler.noise(3))
    drawn = [torch.rand(1, generator=own.generators([3])[0]).item() for own in (other, fresh, sampler)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_ratios_and_differences_are_of_equal_prompts_and_seeds_alone():
    def measured(values, seeds=8):
        mean = sum(values) / len(values)
        return {"kind": "per_prompt", "mean": mean, "n": len(values), "seeds": seeds, "per_prompt": values}

    student, teacher = measured([0.1, 0.2, 0.3]), measured([0.3, 0.2, 0.6])
    found = relative_to(teacher, student)
    assert found["versus_reference"] == vars(paired_difference([0.1, 0.2, 0.3], [0.3, 0.2, 0.6]))
    assert found["ratio_to_reference"] == vars(paired_ratio([0.1, 0.2, 0.3], [0.3, 0.2, 0.6]))
    for other in (None, measured([0.3, 0.2, 0.6], seeds=4), measured([0.3, 0.2])):
        assert relative_to(other, student) == {**student, "versus_reference": None, "ratio_to_reference": None}
    assert relative_to(measured([0.0, 0.0, 0.0]), student)["ratio_to_reference"] is None


class Killed(Exception):
    pass


class Drawing:
    """A model whose image of prompt i is a function of (seed, i), as far from a mean as `spread` says; what it draws
    is counted, and after `limit` batches it is killed."""

    def __init__(self, spread=1.0, limit=None):
        self.spread, self.limit, self.batches = spread, limit, []

    def __call__(self, seed, indices):
        if self.limit is not None and len(self.batches) >= self.limit:
            raise Killed
        self.batches.append((seed, indices))
        texts = [generator("text", i) for i in indices]
        return torch.stack([
            torch.randn(3, 4, 4, generator=text) + self.spread * normal_of(seed, i)
            for i, text in zip(indices, texts, strict=True)
        ])  # fmt: skip


def normal_of(seed, index):
    return torch.randn(3, 4, 4, generator=generator("image", seed, index))


def evaluator(path, models, prompts=3, seeds=3):
    config = SimpleNamespace(
        eval=EvalConfig(batch_size=2, seed=7, pictures=0),
        evaluation=EvaluationConfig(diversity_prompts=prompts, diversity_seeds=seeds),
    )
    scorer = SimpleNamespace(image=lambda images: torch.nn.functional.normalize(images.flatten(1), dim=1))

    def candidate(name, *_):
        draw = lambda seed: lambda indices: models[name](seed, indices)  # noqa: E731
        return Candidate(draw(7), {}, {}, reseeded=draw)

    metrics = {"mean": Preference(lambda images, prompts: images.mean((1, 2, 3)))}
    return Evaluator(config, Run(path, Accelerator(cpu=True)), candidate, PROMPTS, metrics, scorer, ("teacher", 4))


def test_a_collapsed_student_has_a_small_share_of_the_teachers_diversity(tmp_path):
    models = {"teacher": Drawing(), "collapsed": Drawing(0.01), "same": Drawing()}
    own = evaluator(tmp_path, models)
    points = [own.point(name, 4, 1.0) for name in models]
    evaluation = own.evaluate(points, {name: name for name in models}, {}, {})
    teacher, collapsed, same = (point.metrics["diversity"] for point in evaluation.points)
    assert teacher["ratio_to_reference"] is None and (teacher["n"], teacher["seeds"]) == (3, 3)
    assert collapsed["ratio_to_reference"]["high"] < 0.01 < 0.3 < teacher["mean"]
    assert same["ratio_to_reference"]["low"] == same["ratio_to_reference"]["high"] == 1
    # the first three distinct prompts are 0, 1 and 3, each with the evaluation's own seed and two more
    images = {seed: Drawing()(seed, [0, 1, 3]) for seed in (7, *further_seeds(7, 3))}
    expected = mean_pairwise_distance(torch.stack([x.flatten(1) for x in images.values()], 1))
    assert teacher["per_prompt"] == pytest.approx(expected.tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("model", "limit"), [("teacher", 1), ("teacher", 4), ("student", 1), ("student", 3), ("student", 5)]
)
def test_an_evaluation_that_is_killed_goes_on_at_its_batch_and_equals_an_uninterrupted_one(tmp_path, model, limit):
    """Limits end within an evaluation's own seed (the teacher's samples come first), and within further ones."""
    teacher = {} if model == "teacher" else {"teacher": Drawing()}
    whole, killed, again = Drawing(), Drawing(limit=limit), Drawing()
    expected = evaluator(tmp_path / "whole", {**teacher, model: whole}).point(model, 4, 1.0)
    with pytest.raises(Killed):
        evaluator(tmp_path / "killed", {**teacher, model: killed}).point(model, 4, 1.0)
    assert evaluator(tmp_path / "killed", {**teacher, model: again}).point(model, 4, 1.0) == expected
    assert sorted(killed.batches + again.batches) == sorted(whole.batches)
    file = f"evaluation/{model}/guidance-1.0-steps-4.json"
    assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_no_further_image_is_drawn_where_diversity_is_off(tmp_path):
    teacher = Drawing()
    own = evaluator(tmp_path, {"teacher": teacher}, prompts=0)
    assert "diversity" not in own.point("teacher", 4, 1.0).metrics
    assert sum(len(indices) for _, indices in teacher.batches) == len(PROMPTS)


def test_one_prompt_is_refused():
    with pytest.raises(ValueError, match="diversity_prompts=1 gives no standard error"):
        EvaluationConfig(diversity_prompts=1)
