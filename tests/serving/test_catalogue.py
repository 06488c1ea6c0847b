"""Names of models in requests, and whom the candidate answers."""

from dataclasses import replace

import pytest

from ray_jobs.registry.models import RegisteredModel, RegistryEntry
from serving.service.routing import Catalogue, UnknownModel

FIRST = RegisteredModel("m", 1, "/weights/1", "aa" * 32, "base-model", None, "lora", {})
SECOND = replace(FIRST, version=2, digest="bb" * 32)
THIRD = replace(FIRST, version=3, digest="cc" * 32)
OTHER = replace(FIRST, name="other", version=1, digest="dd" * 32)
FOREIGN = replace(OTHER, version=2, digest="ee" * 32, base="another-base")
FULL = replace(FOREIGN, version=3, digest="ff" * 32, method="full")


@pytest.fixture
def catalogue() -> Catalogue:
    catalogue = Catalogue("m", SECOND, ["other"], candidate_share=0.2)
    catalogue.entries = {
        "m": RegistryEntry(
            {1: FIRST, 2: SECOND, 3: THIRD}, {"champion": 2, "previous": 1, "candidate": 3, "best": 1}
        ),
        "other": RegistryEntry({1: OTHER, 2: FOREIGN, 3: FULL}, {"champion": 1}),
    }
    return catalogue


@pytest.mark.parametrize(
    ("model", "version"),
    [
        (None, SECOND),
        ("m", SECOND),
        ("m@1", FIRST),
        ("m@2", SECOND),
        ("m:champion", SECOND),
        ("m:candidate", THIRD),
        ("m:previous", FIRST),
        ("m:best", FIRST),
        ("other", OTHER),
        ("other@1", OTHER),
        ("other:champion", OTHER),
        ("base", None),
    ],
)
def test_a_name_means_a_version(
    catalogue: Catalogue, model: str | None, version: RegisteredModel | None
) -> None:
    assert catalogue.find(model) == version


@pytest.mark.parametrize("model", ["", "m@4", "m@", "m:", "m:none", "m2", "dall-e-3", "m@1@1", "m@-1"])
def test_an_unknown_name_is_refused(catalogue: Catalogue, model: str) -> None:
    with pytest.raises(UnknownModel, match="GET /v1/models"):
        catalogue.find(model)


@pytest.mark.parametrize("foreign", ["other@2", "other@3"])
def test_what_was_trained_on_another_base_is_not_offered(catalogue: Catalogue, foreign: str) -> None:
    """A fully trained version could be drawn, but in a size of its own."""
    assert foreign not in [offer.id for offer in catalogue.offers()]
    with pytest.raises(UnknownModel):
        catalogue.find(foreign)


def test_every_offer_can_be_asked_for_and_means_what_it_says(catalogue: Catalogue) -> None:
    offers = list(catalogue.offers())
    assert len({offer.id for offer in offers}) == len(offers)
    assert offers[0].id == "m"
    assert all(catalogue.find(offer.id) == offer.version for offer in offers)


def test_the_champion_answers_until_another_is_warm(catalogue: Catalogue) -> None:
    catalogue.entries = {"m": RegistryEntry({1: FIRST, 2: SECOND}, {"champion": 1})}
    assert catalogue.find("m") == catalogue.find("m:champion") == SECOND


def test_the_candidate_answers_its_share_of_users(catalogue: Catalogue) -> None:
    catalogue.candidate = THIRD
    answered = [catalogue.find(None, f"user {number}") for number in range(5000)]
    assert answered.count(THIRD) / 5000 == pytest.approx(0.2, abs=0.02)
    assert answered.count(THIRD) + answered.count(SECOND) == 5000


def test_a_user_stays_with_one_version(catalogue: Catalogue) -> None:
    catalogue.candidate = THIRD
    for number in range(50):
        assert len({str(catalogue.find(None, f"user {number}")) for _ in range(20)}) == 1


def test_the_next_candidate_meets_other_users(catalogue: Catalogue) -> None:
    def met(candidate: RegisteredModel) -> set[int]:
        catalogue.candidate = candidate
        return {number for number in range(1000) if catalogue.find(None, str(number)) == candidate}

    assert len(met(THIRD) & met(FIRST)) < 100


def test_requests_without_a_user_are_shared_out_too(catalogue: Catalogue) -> None:
    catalogue.candidate = THIRD
    answered = [catalogue.find(None) for _ in range(2000)]
    assert answered.count(THIRD) / 2000 == pytest.approx(0.2, abs=0.05)


def test_whoever_names_a_version_gets_it_whatever_the_share(catalogue: Catalogue) -> None:
    catalogue.candidate, catalogue.candidate_share = THIRD, 0.99
    assert {str(catalogue.find("m:champion", str(number))) for number in range(50)} == {str(SECOND)}
