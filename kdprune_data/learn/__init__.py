"""Networks: what they are, what they are shown, how they learn, how they are run. Torch lives here (and in `scores`), files do not."""
