"""Configurations reject what they do not know."""

import dataclasses

import pytest

from dreamcache_core.config import Config
from dreamcache_core.errors import DreamCacheError, InputError


@dataclasses.dataclass(frozen=True)
class Settings(Config):
    """Distinct default values, so that swapped fields show."""

    learning_rate: float = 0.5
    num_steps: int = 7
    name: str = "a"


def test_every_field_arrives_where_it_belongs():
    values = {"name": "b", "num_steps": 3, "learning_rate": 0.25}
    assert Settings.from_dict(values) == Settings(learning_rate=0.25, num_steps=3, name="b")


def test_fields_left_out_keep_their_defaults():
    assert Settings.from_dict({"num_steps": 3}) == Settings(num_steps=3)


def test_dictionary_round_trip_in_order_of_declaration():
    settings = Settings(name="c")
    assert list(settings.to_dict()) == ["learning_rate", "num_steps", "name"]
    assert Settings.from_dict(settings.to_dict()) == settings


def test_misspelt_field_is_refused_with_the_nearest_name():
    with pytest.raises(
        InputError, match=r"no setting 'lerning_rate'\. Did you mean 'learning_rate'"
    ):
        Settings.from_dict({"lerning_rate": 1.0})


def test_unknown_field_is_refused_with_the_list_of_fields():
    with pytest.raises(
        DreamCacheError, match="Those that there are: learning_rate, num_steps, name"
    ):
        Settings.from_dict({"zzz": 1})


def test_configuration_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().name = "b"  # pyright: ignore[reportAttributeAccessIssue]
