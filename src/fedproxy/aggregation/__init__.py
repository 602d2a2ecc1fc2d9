"""The maths of merging, pure and on tensors: analysis, rules, spaces, server optimizers, regularisers."""
