"""Keys of configs that have another name now; an old key's error suggests the new one."""

NEW_NAME = {
    "chains": "cots",
    "chains_per_row": "cots_per_row",
    "keep": "keep_candidates",
    "max_bad": "max_bad_share",
    "max_not_finite": "max_nonfinite_updates",
    "mean_weight_1": "normalize_step_weights",
    "stock": "stock_scheduler",
    "stop_when_rising": "stop_on_displacement",
    "store": "latent_dtype",
    "watch": "displacement_window",
}
