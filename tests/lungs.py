"""Tests of lungs."""

import numpy as np

import demo
from lungs import LEAST, MOST, lung_mask


def overlap(a, b):
    """Intersection over union of two masks."""
    return (a & b).sum() / (a | b).sum()


def test_lung_mask_finds_the_lungs_of_drawn_chests():
    y, x = np.mgrid[-1:1:200j, -1:1:200j]
    drawn = (((x + 0.42) / 0.3) ** 2 + (y / 0.62) ** 2 < 1) | (((x - 0.42) / 0.28) ** 2 + (y / 0.6) ** 2 < 1)
    for seed in range(4):
        image = demo._draw_radiograph(np.random.default_rng(seed), sick=False, shifted=False, side=200)
        mask = lung_mask(image)
        assert mask.shape == image.shape and mask.dtype == bool
        assert overlap(mask, drawn) > 0.5  # the drawn heart lies over one lung


def test_lung_mask_leaves_out_what_is_dark_at_the_edge_and_fills_holes():
    image = np.full((100, 100), 220, np.uint8)
    image[:, :12] = image[:, -12:] = 10  # air beside the patient
    lungs = np.zeros((100, 100), bool)
    lungs[25:75, 25:45] = lungs[25:75, 55:75] = True
    image[lungs] = 30
    image[48:52, 33:37] = 220  # a nodule
    mask = lung_mask(image)
    assert overlap(mask, lungs) > 0.9 and mask[50, 35] and not mask[:, :15].any() and not mask[:, -15:].any()


def test_lung_mask_is_two_ellipses_where_no_lungs_can_be_seen():
    everything_dark = np.zeros((60, 60), np.uint8)
    everything_dark[0] = everything_dark[-1] = everything_dark[:, 0] = everything_dark[:, -1] = 255
    ellipses = lung_mask(np.full((60, 60), 128, np.uint8))
    assert LEAST < ellipses.mean() < MOST
    assert ellipses[28, 18] and ellipses[28, 41] and not ellipses[28, 30] and not ellipses[2].any()
    a_speck = np.full((60, 60), 200, np.uint8)
    a_speck[28:33, 28:33] = 0
    for image in (everything_dark, a_speck, np.zeros((60, 60), np.uint8)):
        assert np.array_equal(lung_mask(image), ellipses)
    assert lung_mask(np.zeros((1, 1), np.uint8)).shape == (1, 1)  # of any size
