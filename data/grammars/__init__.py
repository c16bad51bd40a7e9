"""The grammars of the bundled corpus: one module per domain, each with a function `document(rng, heldout)`."""
