"""Which tokens of a reference are attended to where its subject is marked."""

import pytest
import torch

from dreamcache_core.method.tokens import BACKGROUND_GROUP, keep_tokens, num_kept, spread_shares

COUNT = 40


def tokens_and_subject(subject):
    generator = torch.Generator().manual_seed(subject)
    order = torch.randperm(COUNT, generator=generator)
    is_subject = torch.zeros(COUNT, dtype=torch.bool)
    is_subject[order[:subject]] = True
    return torch.randn(COUNT, 3, generator=generator), is_subject


@pytest.mark.parametrize("subject", [1, 7, 8, 24, 39, 40])
def test_the_subject_stays_and_the_background_is_averaged_in_groups(subject):
    tokens, is_subject = tokens_and_subject(subject)
    kept = keep_tokens(tokens, is_subject)
    groups = -(-(COUNT - subject) // BACKGROUND_GROUP)
    assert len(kept) == num_kept(is_subject) == subject + groups
    assert torch.equal(kept[:subject], tokens[is_subject])
    background = tokens[~is_subject]
    for group in range(groups):
        part = background[group * BACKGROUND_GROUP : (group + 1) * BACKGROUND_GROUP]
        torch.testing.assert_close(kept[subject + group], part.mean(dim=0))


@pytest.mark.parametrize("subject", [1, 24, 40])
def test_shares_spread_over_the_places_that_they_stand_for(subject):
    _, is_subject = tokens_and_subject(subject)
    shares = torch.rand(2, num_kept(is_subject), generator=torch.Generator().manual_seed(1))
    spread = spread_shares(shares, is_subject)
    torch.testing.assert_close(spread.sum(dim=-1), shares.sum(dim=-1))
    assert torch.equal(spread[:, is_subject], shares[:, :subject])
    first = spread[:, ~is_subject][:, :BACKGROUND_GROUP]
    torch.testing.assert_close(first, first[:, :1].expand_as(first))


def test_a_subject_that_fills_the_image_changes_nothing():
    tokens, is_subject = tokens_and_subject(COUNT)
    assert torch.equal(keep_tokens(tokens, is_subject), tokens)
