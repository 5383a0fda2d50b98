"""The oracle: amortized proximal optimization in float64 NumPy, in the papers' letters.

P22 is "Amortized Proximal Optimization" (Bae, Vicol, HaoChen, Grosse, 2022); P18 is its 2018
predecessor. Vectors stack the columns of their matrices (`vec`). The modules, in reading order:
networks, losses, problem; discrepancies, curvature; update_rules, meta_objective, meta_gradients;
proximal_point, optimal_preconditioners.
"""

from reference.arrays import unvec, vec
from reference.curvature import (
    EKFACBasis,
    KFACFactors,
    ekfac_basis,
    ekfac_eigenvalues,
    empirical_fisher,
    exact_fisher,
    fsd_hessian,
    ggn,
    kfac_factors,
)
from reference.discrepancies import Bregman, CategoricalKL, Discrepancy, SquaredEuclidean
from reference.losses import CrossEntropy, Loss, ModelTargets, SquaredError
from reference.meta_gradients import (
    dense_gradient,
    diagonal_gradient,
    ekfac_gradient,
    log_lr_gradient,
    per_layer_log_lr_gradient,
)
from reference.meta_objective import (
    MetaObjective,
    MetaTerms,
    approximate_meta_gradient,
    approximate_meta_objective,
    proximity_matrix,
)
from reference.networks import MLP, FixedHead, Layer, Linear, Network, Trace
from reference.optimal_preconditioners import (
    LinearOptimum,
    dense,
    diagonal,
    ekfac,
    kronecker,
    linear_in_phi,
    per_layer,
    scalar,
)
from reference.problem import Batch, Problem, complex_step_jacobian
from reference.proximal_point import ProximalPoint, certify, closed_form_step, exact_step
from reference.update_rules import (
    EKFACBlocks,
    MomentumStep,
    ekfac_matrix,
    ekfac_preconditioner,
    ekfac_product,
    heavy_ball,
    nesterov,
    preconditioned,
    sgd,
    sgd_per_layer,
)

__all__ = [
    "MLP",
    "Batch",
    "Bregman",
    "CategoricalKL",
    "CrossEntropy",
    "Discrepancy",
    "EKFACBasis",
    "EKFACBlocks",
    "FixedHead",
    "KFACFactors",
    "Layer",
    "Linear",
    "LinearOptimum",
    "Loss",
    "MetaObjective",
    "MetaTerms",
    "ModelTargets",
    "MomentumStep",
    "Network",
    "Problem",
    "ProximalPoint",
    "SquaredError",
    "SquaredEuclidean",
    "Trace",
    "approximate_meta_gradient",
    "approximate_meta_objective",
    "certify",
    "closed_form_step",
    "complex_step_jacobian",
    "dense",
    "dense_gradient",
    "diagonal",
    "diagonal_gradient",
    "ekfac",
    "ekfac_basis",
    "ekfac_eigenvalues",
    "ekfac_gradient",
    "ekfac_matrix",
    "ekfac_preconditioner",
    "ekfac_product",
    "empirical_fisher",
    "exact_fisher",
    "exact_step",
    "fsd_hessian",
    "ggn",
    "heavy_ball",
    "kfac_factors",
    "kronecker",
    "linear_in_phi",
    "log_lr_gradient",
    "nesterov",
    "per_layer",
    "per_layer_log_lr_gradient",
    "preconditioned",
    "proximity_matrix",
    "scalar",
    "sgd",
    "sgd_per_layer",
    "unvec",
    "vec",
]
