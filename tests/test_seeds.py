from fedproxy.seeds import derive_seed


def test_seeds_repeat_and_differ_by_every_label():
    seeds = [derive_seed(0, "train", 1, "a"), derive_seed(0, "train", 1, "b"), derive_seed(0, "train", 2, "a")]
    seeds += [derive_seed(1, "train", 1, "a"), derive_seed(0, "data", 1, "a")]
    assert len(set(seeds)) == len(seeds)
    assert derive_seed(0, "train", 1, "a") == seeds[0]
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_labels_are_not_just_joined():
    assert derive_seed(0, "ab", "c") != derive_seed(0, "a", "bc")
    assert derive_seed(0, 1) != derive_seed(0, "1")
