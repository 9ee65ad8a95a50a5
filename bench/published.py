"""Published numbers the demonstration is set beside (arXiv:2604.27295, tables 2 and 3)."""

SOURCE = "arXiv:2604.27295, tables 2 and 3"
SEED = 42
EPOCHS = 80

# Table 2, column "synthetic": best test accuracy in percent over 80 epochs.
BEST_SYNTHETIC: dict[str, float] = {
    "Fixed SGD": 97.9,
    "Cosine Decay SGD": 97.6,
    "SGDR": 97.8,
    "Adam": 96.8,
    "AdamW": 96.2,
    "AdaBound": 95.5,
    "LARS": 97.7,
    "Discriminative LR": 97.1,
    "RAdam": 96.5,
    "Lion": 97.0,
    "Lookahead+AdamW": 96.0,
    "SAM": 97.5,
    "Grokfast": 97.3,
    "STLR+Discriminative": 95.9,
    "SAM+Discriminative": 97.4,
    "DALS": 98.0,
    "DALS-Fast": 97.8,
    "DALS-Acc": 97.8,
}

# Table 3: first epoch, counted from 1, with at least 60, 70, 80 and 90 % test accuracy.
THRESHOLDS = (60.0, 70.0, 80.0, 90.0)
FIRST_EPOCHS: dict[str, tuple[int, int, int, int]] = {
    "SGDR": (1, 1, 1, 1),
    "DALS": (2, 2, 3, 3),
    "DALS-Fast": (1, 1, 2, 3),
    "DALS-Acc": (1, 1, 1, 2),
    "LARS": (1, 1, 1, 2),
    "STLR+Discriminative": (1, 1, 1, 1),
}
