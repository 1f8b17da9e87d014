"""The digits zoo: loading, row independence, quality of the shipped weights, and training."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from searchlab.errors import DataError, EvaluationError
from searchlab.evaluators.distances import FrechetReference, frechet_distance
from searchlab.evaluators.noise import noise_bank, split_seed
from searchlab.experiments.zoo import digits, train_digits

ROWS = (16, 64, 100, 256, 1000, 4000)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def denoiser() -> digits.DigitsDenoiser:
    return digits.load_digits_denoiser()


@pytest.fixture(scope="module")
def classifier() -> digits.DigitsClassifier:
    return digits.load_digits_classifier()


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor, Tensor]:
    """4000 noisy samples with a noise level and a class (or none) each."""
    generator = torch.Generator().manual_seed(0)
    sigma = (torch.rand(4000, generator=generator) * 10 - 6).exp()
    noise = torch.randn(4000, 64, generator=generator)
    images = digits.digits_images()[0][torch.randint(1797, (4000,), generator=generator)]
    return (
        images + sigma[:, None] * noise,
        sigma,
        torch.randint(-1, 10, (4000,), generator=generator),
    )


def _sample(
    denoiser: digits.DigitsDenoiser, x: Tensor, steps: int, labels: Tensor | None = None
) -> Tensor:
    """Second-order multistep data prediction on a grid that is even in sigma^(1/7)."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    top, bottom = denoiser.sigma_max ** (1 / 7), 0.002 ** (1 / 7)
    sigmas = [float(s) for s in (top + ramp * (bottom - top)) ** 7] + [0.0]
    x = x * denoiser.sigma_max
    previous = torch.zeros_like(x)
    for i in range(steps):
        prediction = denoiser(x, torch.full((len(x),), sigmas[i]), labels=labels)
        used = prediction
        if 0 < i < steps - 1:
            log = [torch.tensor(s, dtype=torch.float64).log() for s in sigmas[i - 1 : i + 2]]
            ratio = float((log[1] - log[2]) / (log[0] - log[1]))
            used = prediction + ratio / 2 * (prediction - previous)
        x = used + sigmas[i + 1] / sigmas[i] * (x - used)
        previous = prediction
    return x


@pytest.mark.parametrize("rows", [3, 100, 300])
def test_conditions_that_share_a_call_give_the_bits_of_calls_of_their_own(
    denoiser: digits.DigitsDenoiser, batch: tuple[Tensor, Tensor, Tensor], rows: int
) -> None:
    x = batch[0][: 4 * rows]
    sigma = batch[1][:4].repeat_interleave(rows)
    together = denoiser(x, sigma)
    for start in range(0, 4 * rows, rows):
        own = denoiser(x[start : start + rows], sigma[start : start + rows])
        assert torch.equal(together[start : start + rows], own)


def test_the_files_are_those_of_the_card() -> None:
    folder = Path(digits.__file__).parent
    card = json.loads((folder / "digits.json").read_text())
    for kind in ("denoiser", "classifier"):
        data = (folder / card[kind]["file"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == card[kind]["sha256"]
        assert len(data) < 3_000_000
    assert digits.load_digits_denoiser().model_hash == card["denoiser"]["sha256"]
    assert digits.load_digits_denoiser(label=3).model_hash == card["denoiser"]["sha256"] + "-3"
    assert digits.load_digits_classifier().model_hash == card["classifier"]["sha256"]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("same_level", [False, True])
def test_a_row_does_not_depend_on_the_others(
    rows: int,
    same_level: bool,
    denoiser: digits.DigitsDenoiser,
    classifier: digits.DigitsClassifier,
    batch: tuple[Tensor, Tensor, Tensor],
) -> None:
    x, sigma, labels = batch
    if same_level:
        sigma, labels = torch.full_like(sigma, 0.7), torch.full_like(labels, 4)
        x = digits.digits_images()[0][:1].expand(4000, -1) + 0.7 * (x / x.std(1, keepdim=True))
    reference = denoiser(x, sigma, labels=labels)
    features, logits = classifier(x), classifier.logits(x)
    shuffled = torch.randperm(4000, generator=torch.Generator().manual_seed(rows))[:rows]
    for chosen in (torch.arange(rows), shuffled, torch.arange(4000 - rows, 4000)):
        answer = denoiser(x[chosen], sigma[chosen], labels=labels[chosen])
        assert torch.equal(answer, reference[chosen])
        assert torch.equal(classifier(x[chosen]), features[chosen])
        assert torch.equal(classifier.logits(x[chosen]), logits[chosen])


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 7, 15, 17, 4099])
def test_odd_row_counts_agree_too(
    rows: int,
    denoiser: digits.DigitsDenoiser,
    classifier: digits.DigitsClassifier,
    batch: tuple[Tensor, Tensor, Tensor],
) -> None:
    # One row count lies beyond the rows of a single pass.
    x, sigma, labels = (torch.cat((value, value[:100])) for value in batch)
    reference = denoiser(*batch[:2], labels=batch[2])
    answer = denoiser(x[:rows], sigma[:rows], labels=labels[:rows])
    assert torch.equal(answer[:4000], reference[:rows])
    assert torch.equal(answer[4000:], reference[: max(0, rows - 4000)])
    features = classifier(x[:rows])
    assert torch.equal(features[:100], classifier(x[:100])[:rows])


def test_one_level_for_all_rows_gives_the_bits_of_mixed_levels(
    denoiser: digits.DigitsDenoiser, batch: tuple[Tensor, Tensor, Tensor]
) -> None:
    x = batch[0][:200]
    alike = denoiser(x, torch.full((200,), 1.3))
    levels = torch.full((200,), 1.3)
    levels[150:] = 0.2
    assert torch.equal(denoiser(x, levels)[:150], alike[:150])


def test_short_products_round_differently_without_padding(
    batch: tuple[Tensor, Tensor, Tensor],
) -> None:
    # The reason of the padding rule: if this fails everywhere, the rule may be reconsidered.
    generator = torch.Generator().manual_seed(1)
    differing = set()
    for width in (64, 256, 384):
        weight = torch.randn(width, 64, generator=generator)
        bias = torch.randn(width, generator=generator)
        whole = functional.linear(batch[0], weight, bias)
        differing |= {
            rows
            for rows in range(1, 8)
            if not torch.equal(functional.linear(batch[0][:rows], weight, bias), whole[:rows])
        }
    assert differing


def test_class_conditions_change_the_prediction(
    denoiser: digits.DigitsDenoiser, batch: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, sigma = batch[0][:32], torch.full((32,), 3.0)
    three = digits.load_digits_denoiser(label=3)(x, sigma)
    assert torch.equal(three, denoiser(x, sigma, labels=torch.full((32,), 3)))
    plain = denoiser(x, sigma)
    assert torch.equal(plain, denoiser(x, sigma, labels=torch.full((32,), -1)))
    assert float((three - plain).abs().mean()) > 0.01


def test_limits_of_the_noise_level(denoiser: digits.DigitsDenoiser) -> None:
    images = digits.digits_images()[0]
    assert torch.equal(denoiser(images, torch.zeros(1797)), images)
    noise = torch.from_numpy(noise_bank(0, 0, 1797, (64,)))
    far = denoiser(80 * noise, torch.full((1797,), 80.0))
    assert float((far.mean(0) - digits.data_mean()).abs().max()) < 0.1
    near = denoiser(images + 0.01 * noise, torch.full((1797,), 0.01))
    assert float((near - images).pow(2).mean().sqrt()) < 0.01


def test_the_type_of_the_samples_is_kept(
    denoiser: digits.DigitsDenoiser, batch: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, sigma = batch[0][:20], batch[1][:20]
    double = denoiser(x.double(), sigma.double())
    assert double.dtype == torch.float64
    assert torch.equal(double.float(), denoiser(x, sigma))
    assert denoiser(x[:0], sigma[:0]).shape == (0, 64)


def test_a_copy_in_another_process_would_be_the_same_model(
    denoiser: digits.DigitsDenoiser, batch: tuple[Tensor, Tensor, Tensor]
) -> None:
    again = pickle.loads(pickle.dumps(denoiser))
    assert again.model_hash == denoiser.model_hash
    x, sigma = batch[0][:20], batch[1][:20]
    assert torch.equal(again(x, sigma), denoiser(x, sigma))


def test_bad_calls_are_named(denoiser: digits.DigitsDenoiser) -> None:
    x = torch.zeros(4, 64)
    with pytest.raises(EvaluationError, match=r"x \(4, 64\) and sigma \(3,\)"):
        denoiser(x, torch.ones(3))
    with pytest.raises(EvaluationError, match="negative or NaN"):
        denoiser(x, torch.tensor([1.0, 1.0, float("nan"), 1.0]))
    with pytest.raises(EvaluationError, match="-1 to 9"):
        denoiser(x, torch.ones(4), labels=torch.full((4,), 10))
    with pytest.raises(EvaluationError, match="label is 10"):
        digits.load_digits_denoiser(label=10)
    with pytest.raises(EvaluationError, match=r"x has shape \(4, 63\)"):
        digits.load_digits_classifier()(x[:, 1:])


def _copy_of_the_zoo(folder: Path) -> Path:
    source = Path(digits.__file__).parent
    for name in ("digits_edm.safetensors", "digits_classifier.safetensors", "digits.json"):
        shutil.copy(source / name, folder / name)
    return folder


def test_a_corrupt_file_is_refused_with_both_hashes(tmp_path: Path) -> None:
    path = _copy_of_the_zoo(tmp_path) / "digits_edm.safetensors"
    good = digits.load_digits_denoiser(path).model_hash
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        digits.load_digits_denoiser(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert good[:12] in message
    assert hashlib.sha256(data).hexdigest()[:12] in message


def test_missing_files_and_wrong_cards_are_named(tmp_path: Path) -> None:
    path = _copy_of_the_zoo(tmp_path) / "digits_edm.safetensors"
    with pytest.raises(DataError, match="are not those of DigitsClassifierNet"):
        _as_classifier(path)
    path.unlink()
    with pytest.raises(DataError, match=r"digits_edm.safetensors cannot be read .*sha256 \w{12}"):
        digits.load_digits_denoiser(path)
    card = tmp_path / "digits.json"
    card.write_text('{"format": 2}')
    with pytest.raises(DataError, match="not of format 1"):
        digits.load_digits_denoiser(path)
    card.write_text('{"format": 1}')
    with pytest.raises(DataError, match="no complete entry 'denoiser'"):
        digits.load_digits_denoiser(path)
    card.write_text("{")
    with pytest.raises(DataError, match="cannot be read: JSONDecodeError"):
        digits.load_digits_denoiser(path)
    card.unlink()
    with pytest.raises(DataError, match="cannot be read: FileNotFoundError"):
        digits.load_digits_denoiser(path)


def _as_classifier(weights: Path) -> None:
    """Loads the denoiser's weights under a card that calls them the classifier's."""
    card = weights.parent / "digits.json"
    content = json.loads(card.read_text())
    content["classifier"]["sha256"] = content["denoiser"]["sha256"]
    card.write_text(json.dumps(content))
    digits.load_digits_classifier(weights)


def test_the_classifier_is_accurate_and_its_features_are_scaled(
    classifier: digits.DigitsClassifier,
) -> None:
    _, _, test_x, test_y = train_digits.digits_split(train_digits.TrainingSettings())
    accuracy = float((classifier.logits(test_x).argmax(1) == test_y).double().mean())
    assert accuracy >= 0.98
    features = digits.reference_features()
    assert features.shape == (1797, 32)
    assert torch.equal(features, classifier(digits.digits_images()[0]))
    assert float(torch.cov(features.double().T).trace()) == pytest.approx(32, rel=1e-5)


def test_the_data_mean_is_that_of_the_images() -> None:
    images = digits.digits_images()[0]
    torch.testing.assert_close(digits.data_mean(), images.mean(0), rtol=0, atol=1e-6)


def test_samples_are_close_to_the_data(
    denoiser: digits.DigitsDenoiser, classifier: digits.DigitsClassifier
) -> None:
    noise = torch.from_numpy(noise_bank(split_seed(0, "search"), 0, 1000, (64,)))
    reference = FrechetReference.from_features(digits.reference_features())
    distances = {}
    for steps in (2, 10):
        statistics = reference.statistics()
        statistics.add(classifier(_sample(denoiser, noise, steps)))
        distances[steps] = frechet_distance(statistics, reference)
    # White noise is at 32, the data itself at 0.1 for this number of rows.
    assert distances[10] < 2
    assert distances[2] > 5 * distances[10]


def test_samples_of_a_class_are_recognised(
    denoiser: digits.DigitsDenoiser, classifier: digits.DigitsClassifier
) -> None:
    noise = torch.from_numpy(noise_bank(split_seed(0, "search"), 0, 500, (64,)))
    labels = torch.arange(500) % 10
    samples = _sample(denoiser, noise, 10, labels)
    assert float((classifier.logits(samples).argmax(1) == labels).double().mean()) > 0.95


def test_training_is_deterministic_and_its_files_load(tmp_path: Path) -> None:
    settings = train_digits.TrainingSettings(steps=12, batch=32, classifier_epochs=1)
    cards = [train_digits.train(settings, tmp_path / name) for name in ("a", "b")]
    other = train_digits.train(
        train_digits.TrainingSettings(steps=12, batch=32, classifier_epochs=1, seed=1),
        tmp_path / "c",
    )
    for kind in ("denoiser", "classifier"):
        assert cards[0][kind]["sha256"] == cards[1][kind]["sha256"] != other[kind]["sha256"]
    loaded = digits.load_digits_denoiser(tmp_path / "a" / "digits_edm.safetensors")
    assert loaded.model_hash == cards[0]["denoiser"]["sha256"]
    assert digits.load_digits_classifier(tmp_path / "a" / "digits_classifier.safetensors")
