"""The core quantities of the engine and the reference, each by the function that returns it."""

from __future__ import annotations

from verification.detection.errors import Quantity

_OBJECTIVE = "apo_core.objective:ProximalObjective"
_STRUCTURES = {
    "scalar": "scalar:Scalar",
    "diagonal": "diagonal:Diagonal",
    "dense": "dense:Dense",
    "block-diagonal": "block_diagonal:BlockDiagonal",
    "Kronecker": "kronecker:Kronecker",
    "EKFAC": "ekfac:EKFAC",
    "block EKFAC": "block_ekfac:BlockEKFAC",
    "embedding EKFAC": "embedding_ekfac:EmbeddingEKFAC",
    "one-sided": "one_sided:OneSided",
    "low rank": "low_rank:LowRank",
    "stacked": "stacked:Stacked",
}
_RULES = {
    "SGD": "sgd:SGD",
    "RMSprop": "rmsprop:RMSprop",
    "Adam": "adam:Adam",
    "KFAC": "kfac:KFAC",
    "LearningRate": "learning_rate:LearningRate",
    "Preconditioned": "preconditioned:Preconditioned",
}
_KLS = ("CategoricalKL", "BernoulliKL", "GaussianKL")
_LOSSES = ("SquaredError", "CrossEntropy", "BinaryCrossEntropy", "PoissonLoss", "GaussianNLL")
_DISCREPANCIES = ("SquaredEuclidean", *_KLS, "Bregman")

ENGINE = (
    Quantity("loss term of Q", f"{_OBJECTIVE}.look_ahead", (0, "loss")),
    Quantity("FSD term of Q", f"{_OBJECTIVE}.look_ahead", (0, "fsd")),
    Quantity("WSD term of Q", f"{_OBJECTIVE}.look_ahead", (0, "wsd")),
    Quantity("q = dQ/dθ'", f"{_OBJECTIVE}.look_ahead", (1,)),
    Quantity("½ΔᵀGΔ", f"{_OBJECTIVE}._quadratic_fsd", (0,)),
    Quantity("GΔ", f"{_OBJECTIVE}._quadratic_fsd", (1,)),
    Quantity("HΔ", "apo_core.objective:_hessian_product"),
    Quantity("dQ/dφ", "apo_core.meta_gradient:_pull_back"),
    Quantity("ρ, squared error", "apo_core.discrepancies:SquaredEuclidean.per_example"),
    *(Quantity(f"ρ, {name}", f"apo_core.discrepancies:{name}.between") for name in _KLS),
    Quantity("ρ, Bregman", "apo_core.discrepancies:Bregman.per_example"),
    Quantity("D_F of a mask", "apo_core.discrepancies:Discrepancy.masked"),
    *(
        Quantity(f"update of {rule}", f"apo_core.rules.{target}.forward", (0,))
        for rule, target in _RULES.items()
    ),
    *(
        Quantity(f"dQ/dφ of {rule}", f"apo_core.rules.{target}.forward", (0,), "derivative")
        for rule, target in _RULES.items()
    ),
    Quantity("momentum of SGD", "apo_core.rules.sgd:SGD.forward", (1,)),
    Quantity("second moment of RMSprop", "apo_core.rules.rmsprop:RMSprop.forward", (1,)),
    Quantity("moments of Adam", "apo_core.rules.adam:Adam.forward", (1,)),
    *(
        Quantity(f"apply of {name}", f"apo_core.preconditioners.{target}.forward")
        for name, target in _STRUCTURES.items()
    ),
    *(
        Quantity(f"dense of {name}", f"apo_core.preconditioners.{target}.dense")
        for name, target in _STRUCTURES.items()
    ),
    Quantity("A of KFAC", "apo_core.rules.kfac_factors:Sums.factors", (0,)),
    Quantity("B of KFAC", "apo_core.rules.kfac_factors:Sums.factors", (1,)),
    Quantity("KFAC's damped step", "apo_core.rules.kfac_factors:Factors.step"),
)

REFERENCE = (
    *(Quantity(f"L, {name}", f"reference.losses:{name}.value") for name in _LOSSES),
    *(Quantity(f"dL/dz, {name}", f"reference.losses:{name}.gradient") for name in _LOSSES),
    *(Quantity(f"d²L/dz², {name}", f"reference.losses:{name}.hessian") for name in _LOSSES),
    *(
        Quantity(f"ρ, {name}, reference", f"reference.discrepancies:{name}.value")
        for name in _DISCREPANCIES
    ),
    *(
        Quantity(f"dρ/dz, {name}", f"reference.discrepancies:{name}.gradient")
        for name in _DISCREPANCIES
    ),
    *(
        Quantity(f"H_ρ, {name}", f"reference.discrepancies:{name}.output_hessian")
        for name in _DISCREPANCIES
    ),
    Quantity("z", "reference.networks:Network.outputs"),
    Quantity("J = dz/dθ", "reference.networks:Network.jacobian"),
    Quantity("∇J_B", "reference.problem:Problem.gradient"),
    Quantity("∇²J_B", "reference.problem:Problem.hessian"),
    Quantity("G", "reference.curvature:ggn"),
    Quantity("the Fisher", "reference.curvature:exact_fisher"),
    Quantity("the empirical Fisher", "reference.curvature:empirical_fisher"),
    Quantity("A and B, reference", "reference.curvature:kfac_factors"),
    Quantity("EKFAC's eigenvalues", "reference.curvature:ekfac_eigenvalues"),
    Quantity("EKFAC's damped inverse", "reference.curvature:damped_ekfac_inverse"),
    Quantity("factored damping", "reference.curvature:factored_damped_factors"),
    *(
        Quantity(f"{name} term, reference", "reference.meta_objective:MetaObjective.terms", (name,))
        for name in ("loss", "fsd", "wsd")
    ),
    Quantity("q, reference", "reference.meta_objective:MetaObjective.lookahead_gradient"),
    Quantity("M = λ_FSD G + λ_WSD I", "reference.meta_objective:proximity_matrix"),
    Quantity("Q̂", "reference.meta_objective:approximate_meta_objective"),
    Quantity("dQ̂/dP", "reference.meta_objective:approximate_meta_gradient"),
    Quantity("dQ/d log η", "reference.meta_gradients:log_lr_gradient"),
    Quantity("dQ/d log η of each layer", "reference.meta_gradients:per_layer_log_lr_gradient"),
    Quantity("dQ/dP", "reference.meta_gradients:dense_gradient"),
    Quantity("dQ/ds", "reference.meta_gradients:diagonal_gradient"),
    Quantity("dQ/d(A, B, S)", "reference.meta_gradients:ekfac_gradient"),
    Quantity("P_S of eq. 9", "reference.update_rules:ekfac_matrix"),
    Quantity("P_S g of eq. 10", "reference.update_rules:ekfac_product"),
    Quantity("step of Adam, reference", "reference.update_rules:adam"),
    Quantity("step of RMSprop, reference", "reference.update_rules:rmsprop"),
    *(
        Quantity(f"P*, {name}", f"reference.optimal_preconditioners:{name}", ("P",))
        for name in ("scalar", "per_layer", "diagonal", "dense")
    ),
    Quantity("P*, Kronecker", "reference.optimal_preconditioners:kronecker"),
    Quantity("P*, EKFAC", "reference.optimal_preconditioners:ekfac"),
    Quantity("P*, best Kronecker", "reference.structured_optima:best_kronecker", ("P",)),
    Quantity("P*, best EKFAC", "reference.structured_optima:best_ekfac", ("P",)),
    Quantity("the proximal point", "reference.proximal_point:exact_step", ("u",)),
    Quantity("P22 eq. 4", "reference.proximal_point:closed_form_step"),
    *(
        Quantity(f"step, {name}", f"reference.classical_methods:{name}")
        for name in ("newton", "natural_gradient", "generalized_gauss_newton", "gauss_newton")
    ),
    Quantity("P18 eq. 6", "reference.classical_methods:p18_step"),
)

QUANTITIES = (*ENGINE, *REFERENCE)
