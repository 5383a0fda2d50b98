"""Hypothesis strategies for the oracle's objects: NumPy only, every draw labelled, no filtering.

Discrete choices, scales and seeds are drawn, arrays are built from the seeds: a failing case is
printed as the recipe that rebuilds it, and shrinks towards one example, one layer and seed 0.
"""

from verification.strategies.batches import FORMS, batches
from verification.strategies.convolutions import conv_nets
from verification.strategies.discrepancies import DISCREPANCIES, discrepancies
from verification.strategies.fixed_heads import KFACCase, kfac_cases
from verification.strategies.networks import NETWORK_KINDS, SMOOTH, networks, parameters
from verification.strategies.outputs import ALL_DISCREPANCIES, ALL_LOSSES, CONVEX_LOSSES
from verification.strategies.problems import LOSSES, MetaCase, meta_cases
from verification.strategies.spd import SPD, spd_matrices
from verification.strategies.update_rules import ScaledNormal, ekfac_blocks, rates, scaled_normals
from verification.strategies.weights import ProximityWeights, proximity_weights, weights

__all__ = [
    "ALL_DISCREPANCIES",
    "ALL_LOSSES",
    "CONVEX_LOSSES",
    "DISCREPANCIES",
    "FORMS",
    "LOSSES",
    "NETWORK_KINDS",
    "SMOOTH",
    "SPD",
    "KFACCase",
    "MetaCase",
    "ProximityWeights",
    "ScaledNormal",
    "batches",
    "conv_nets",
    "discrepancies",
    "ekfac_blocks",
    "kfac_cases",
    "meta_cases",
    "networks",
    "parameters",
    "proximity_weights",
    "rates",
    "scaled_normals",
    "spd_matrices",
    "weights",
]
